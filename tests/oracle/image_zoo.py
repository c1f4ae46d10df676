"""Tiny image and video models with random weights, in the names of diffusers and in those of the single files."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils as converters  # noqa: E402

from loramerge.adapters.operators import gather  # noqa: E402
from loramerge.adapters.views import View  # noqa: E402
from loramerge.binding.layouts import Layout, detect_layout  # noqa: E402

State = dict[str, Tensor]


def randomised(model: torch.nn.Module, seed: int = 0) -> State:
    """Its state dict with every entry random, so that no two tensors can be mistaken for one another."""
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    layout = detect_layout({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert layout is not None
    return layout


def seen(view: View, state: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a view shows."""
    tensors = {part.tensor: state[part.tensor].flatten() for part in view.parts}
    return gather(view, tensors).reshape(view.shape)


def single_file(state: State, prefixes: Mapping[str, str]) -> State:
    """A pipeline's tensors (`folder/key`) in the other layout, as the tables say; the test then asks diffusers."""
    layout = layout_of(state)
    return {
        f"{prefixes[name.component]}{name.path}": seen(view, state).contiguous()
        for name, view in layout.parameters("ldm").items()
        if name.component in prefixes
    }


def unet15() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        sample_size=8,
    )


def unet_xl() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )


def flux1() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def chroma() -> torch.nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=12,
        approximator_layers=2,
    )


def flux2() -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )


def sd3() -> torch.nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=4,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def wan() -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=20,
        num_layers=2,
        image_dim=10,
        added_kv_proj_dim=16,
    )


def hunyuan_video() -> torch.nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(2, 2, 4),
    )


def z_image() -> torch.nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[2, 2, 4],
        axes_lens=[8, 8, 8],
    )


def ltx() -> torch.nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )


def qwen_image() -> torch.nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )


def ldm_unet(state: State, model: Any) -> State:
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    converted: State = converters.convert_ldm_unet_checkpoint(prefixed, dict(model.config))
    return converted


def by(convert: Callable[..., State]) -> Callable[[State, Any], State]:
    """A converter of diffusers, some of which know one width only: it is made that of the tiny models."""
    source = textwrap.dedent(inspect.getsource(convert)).replace("3072", "16")
    scope = dict(vars(converters))
    exec(source, scope)
    return lambda state, model: scope[convert.__name__](dict(state))


NETWORKS: dict[str, tuple[str, str, Callable[[], Any], Callable[[State, Any], State]]] = {
    "sd15": ("sd15", "unet", unet15, ldm_unet),
    "sdxl": ("sdxl", "unet", unet_xl, ldm_unet),
    "sd3": ("sd3", "transformer", sd3, by(converters.convert_sd3_transformer_checkpoint_to_diffusers)),
    "flux1": ("flux1", "transformer", flux1, by(converters.convert_flux_transformer_checkpoint_to_diffusers)),
    "chroma": ("flux1", "transformer", chroma, by(converters.convert_chroma_transformer_checkpoint_to_diffusers)),
    "flux2": ("flux2", "transformer", flux2, by(converters.convert_flux2_transformer_checkpoint_to_diffusers)),
    "wan": ("wan", "transformer", wan, by(converters.convert_wan_transformer_to_diffusers)),
    "hunyuan_video": (
        "hunyuan_video",
        "transformer",
        hunyuan_video,
        by(converters.convert_hunyuan_video_transformer_to_diffusers),
    ),
    "z_image": ("z_image", "transformer", z_image, by(converters.convert_z_image_transformer_checkpoint_to_diffusers)),
    "ltx": ("ltx", "transformer", ltx, by(converters.convert_ltx_transformer_checkpoint_to_diffusers)),
    "qwen_image": ("qwen_image", "transformer", qwen_image, lambda state, model: dict(state)),
}
"""family's model -> (table, folder, tiny model, what makes diffusers' names of the original ones)."""


def clip(root: bool, layers: int = 2) -> State:
    """A tiny CLIP text encoder's tensors as transformers names them (random)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=6,
        projection_dim=10,
    )
    state = randomised(transformers.CLIPTextModelWithProjection(config), seed=5)
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    if not root:
        state = {name.removeprefix("text_model."): t for name, t in state.items() if name != "text_projection.weight"}
    return state


def sdxl_pipeline(root: bool) -> tuple[State, State]:
    """(folders, single file), the latter's OpenCLIP made by hand, its UNet by the tables."""
    unet, first, second = randomised(unet_xl()), clip(root), clip(True, 3)
    folders = {f"unet/{n}": t for n, t in unet.items()}
    folders |= {f"text_encoder/{n}": t for n, t in first.items()} | {
        f"text_encoder_2/{n}": t for n, t in second.items()
    }
    single = {f"model.diffusion_model.{n}": t for n, t in single_file(unet, {"unet": ""}).items()}
    single |= {f"conditioner.embedders.0.transformer.{n if root else 'text_model.' + n}": t for n, t in first.items()}
    head = "conditioner.embedders.1.model."
    for name, tensor in second.items():
        if ".self_attn.k_proj" in name or ".self_attn.v_proj" in name:
            continue
        new = name.removeprefix("text_model.")
        for old, now in (
            ("encoder.layers.", "transformer.resblocks."),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("self_attn.q_proj.", "attn.in_proj_"),
            ("text_projection.weight", "text_projection"),
        ):
            new = new.replace(old, now)
        if "in_proj" in new:
            tensor = torch.cat([second[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
        single[head + new] = tensor.T.contiguous() if new == "text_projection" else tensor
    return folders, single
