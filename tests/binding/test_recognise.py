"""Which family names belong to: of adapters by module paths, of checkpoints by tensors."""

from __future__ import annotations

import pytest

from loramerge.binding.recognise import families_of_adapter, family_of_checkpoint


@pytest.mark.parametrize(
    ("paths", "families"),
    [
        (["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder"], ["sdxl"]),
        (["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], ["sd15", "sd2"]),
        (["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"], ["wan"]),
        (["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"], ["flux2"]),
        (["double_blocks.3.processor.qkv_lora1"], ["flux1"]),
        (["lora_unet_layers_0_attention_qkv"], ["z_image"]),
        (["transformer.transformer_blocks.11.img_mlp.net.0.proj"], ["qwen_image"]),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv"], ["sd3"]),
        (["transformer.transformer_blocks.0.attn1.to_q"], ["ltx"]),
        (["lora_unet_single_blocks_1_linear1"], ["flux1", "flux2", "hunyuan_video"]),
        (["base_model.model.model.layers.0.self_attn.q_proj"], []),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], []),
        ([], []),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_an_adapter(paths: list[str], families: list[str]) -> None:
    assert families_of_adapter(paths) == families


def test_a_few_strange_modules_do_not_matter_and_many_do() -> None:
    known = [f"diffusion_model.blocks.{i}.self_attn.q" for i in range(4)]
    assert families_of_adapter([*known, "diffusion_model.other.thing"]) == ["wan"]
    assert families_of_adapter([*known, *(f"other.{i}" for i in range(5))]) == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_checkpoint_in_the_original_layout(prefix: str) -> None:
    names = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "txt_in", "img_in")
    found = family_of_checkpoint({f"{prefix}{name}.weight": (4, 4) for name in names})
    assert found == {"name": "flux1", "layouts": {"transformer": "ldm"}}


@pytest.mark.parametrize("prefix", ["", "transformer/"])
def test_a_checkpoint_in_the_layout_of_folders(prefix: str) -> None:
    names = (
        "transformer_blocks.0.attn.add_q_proj",
        "single_transformer_blocks.0.proj_mlp",
        "context_embedder",
        "x_embedder",
    )
    found = family_of_checkpoint({f"{prefix}{name}.weight": (4, 4) for name in names})
    assert found is not None and (found["name"], found["layouts"]) == ("flux1", {"transformer": "hf"})


def test_what_no_table_knows_has_no_family() -> None:
    assert family_of_checkpoint({"model.layers.0.self_attn.q_proj.weight": (4, 4)}) is None
    assert family_of_checkpoint({"transformer/blocks.0.strange.weight": (4, 4)}) is None
