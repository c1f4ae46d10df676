"""Both layouts of image and video families, held against the converters of diffusers, bit for bit."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from image_zoo import (
    NETWORKS,
    State,
    clip,
    flux1,
    layout_of,
    randomised,
    sdxl_pipeline,
    seen,
    single_file,
    unet15,
    wan,
)

from loramerge.binding.layouts import detect_layout
from loramerge.errors import MismatchError


@pytest.fixture(scope="module", params=list(NETWORKS))
def both(request: Any) -> tuple[str, str, State, State]:
    """(table, folder, tensors as diffusers names them, the same as the single file does)."""
    table, folder, make, convert = NETWORKS[request.param]
    model = make()
    hf = randomised(model)
    ldm = single_file(hf, {folder: ""})
    back = convert(ldm, model)
    assert back.keys() == hf.keys()
    assert all(torch.equal(back[name], hf[name]) for name in hf)
    return table, folder, hf, ldm


@pytest.mark.parametrize("stored", ["", "model.diffusion_model."])
def test_every_diffusers_name_is_found_in_a_single_file(both: tuple[str, str, State, State], stored: str) -> None:
    table, folder, hf, ldm = both
    base = {f"{stored}{name}": tensor for name, tensor in ldm.items()}
    layout = layout_of(base)
    assert layout.family.name == table
    for name, tensor in hf.items():
        for prefix in ("", f"{folder}.", "diffusion_model.", f"{folder}.base_model.model."):
            view = layout.view(f"{prefix}{name}")
            assert view is not None, name
            assert torch.equal(seen(view, base), tensor), name


@pytest.mark.parametrize("stored", ["", "folder/", "folder."])
def test_every_original_name_is_found_in_a_folder_of_diffusers(
    both: tuple[str, str, State, State], stored: str
) -> None:
    table, folder, hf, ldm = both
    base = {f"{stored.replace('folder', folder)}{name}": tensor for name, tensor in hf.items()}
    layout = layout_of(base)
    assert layout.family.name == table
    for name, tensor in ldm.items():
        for prefix in ("", "diffusion_model.", "model.diffusion_model."):
            view = layout.view(f"{prefix}{name}")
            assert view is not None, name
            assert torch.equal(seen(view, base), tensor), name


@pytest.mark.parametrize("which", ["hf", "ldm"])
def test_flattened_names_of_both_layouts_are_found(both: tuple[str, str, State, State], which: str) -> None:
    _, _, hf, ldm = both
    base = hf if which == "hf" else {f"model.diffusion_model.{name}": tensor for name, tensor in ldm.items()}
    layout = layout_of(base)
    for state in (hf, ldm):
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            if not module:
                continue
            for prefix in ("lora_unet_", "lora_unet__", "lycoris_"):
                view = layout.view(f"{prefix}{module.replace('.', '_')}.{leaf}")
                assert view is not None, name
                assert torch.equal(seen(view, base), tensor), name


def test_names_go_back_to_the_layout_that_they_came_from(both: tuple[str, str, State, State]) -> None:
    _, folder, hf, ldm = both
    for base in (hf, ldm):
        layout = layout_of(base)
        for side, state in (("hf", hf), ("ldm", ldm)):
            for name, tensor in state.items():
                view = layout.view(name)
                assert view is not None
                called = layout.called(view, side)
                assert [n.component for n in called] == [folder]
                if called[0].path != name:  # the same view by another name: no two tensors are equal
                    assert torch.equal(state[called[0].path], tensor)
            whole = layout.parameters(side)
            assert {n.path for n in whole} == set(state)


def test_a_fused_weight_is_called_by_its_parts_where_they_are_apart() -> None:
    hf = randomised(flux1())
    layout = layout_of(hf)
    view = layout.view("single_blocks.1.linear1.weight")
    assert view is not None
    paths = [name.path for name in layout.called(view, "hf")]
    head = "single_transformer_blocks.1."
    assert paths == [f"{head}{p}.weight" for p in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    part = layout.view(f"{head}attn.to_k.weight")
    assert part is not None
    assert layout.called(part, "ldm") == ()


@pytest.mark.parametrize("root", [True, False])
def test_text_encoders_are_found_by_every_name(root: bool) -> None:
    folders, single = sdxl_pipeline(root)
    text = {n: t for n, t in folders.items() if n.startswith("text_encoder")}
    for base in (folders, single):
        layout = layout_of(base)
        assert set(layout.sides) == {"unet", "text_encoder", "text_encoder_2"}
        for name, tensor in text.items():
            folder, _, path = name.partition("/")
            bare = path.removeprefix("text_model.")
            module, _, leaf = bare.rpartition(".")
            number = "1" if folder == "text_encoder" else "2"
            tries = [f"{folder}.{path}", f"{folder}.{bare}", f"lora_te{number}_{module.replace('.', '_')}.{leaf}"]
            if module != "text_projection":
                tries += [
                    f"{folder}.text_model.{bare}",
                    f"lora_te{number}_text_model_{module.replace('.', '_')}.{leaf}",
                ]
                clip_name = "clip_l" if number == "1" else "clip_g"
                tries.append(f"text_encoders.{clip_name}.transformer.text_model.{bare}")
            for old, new in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                if f".{old}." in path:
                    tries.append(f"{folder}.{path.replace(old, new)}")
            for name_tried in tries:
                view = layout.view(name_tried)
                assert view is not None, name_tried
                assert torch.equal(seen(view, base), tensor), name_tried


def test_open_clip_names_are_found_in_folders() -> None:
    folders, single = sdxl_pipeline(True)
    layout = layout_of(folders)
    for name, tensor in single.items():
        view = layout.view(name)
        assert view is not None, name
        assert torch.equal(seen(view, folders), tensor), name


def test_sd2_is_told_by_its_text_encoder() -> None:
    unet = {f"unet/{n}": t for n, t in randomised(unet15()).items()}
    text = {f"text_encoder/{n}": t for n, t in clip(True, 23).items() if n != "text_projection.weight"}
    assert layout_of(unet | text).family.name == "sd2"
    assert layout_of(unet).family.name == "sd15"
    _, xl = sdxl_pipeline(True)
    head = "conditioner.embedders.1.model."
    single = {f"cond_stage_model.model.{n.removeprefix(head)}": t for n, t in xl.items() if n.startswith(head)}
    single |= {f"model.diffusion_model.{n}": t for n, t in single_file(unet, {"unet": ""}).items()}
    layout = layout_of(single)
    assert layout.family.name == "sd2"
    view = layout.view("lora_te_text_model_encoder_layers_1_self_attn_k_proj.weight")
    assert view is not None
    assert torch.equal(
        seen(view, single), single["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"][8:16]
    )


def test_processor_names_of_old_files() -> None:
    unet = randomised(unet15())
    layout = layout_of(unet)
    head = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    for old, new in (("processor.to_q", "to_q"), ("processor.to_v", "to_v"), ("processor.to_out", "to_out.0")):
        view = layout.view(f"unet.{head}{old}.weight")
        assert view is not None
        assert torch.equal(seen(view, unet), unet[f"{head}{new}.weight"])


@pytest.mark.parametrize("which", ["hf", "ldm"])
def test_processor_names_of_xlabs(which: str) -> None:
    hf = randomised(flux1())
    ldm = single_file(hf, {"transformer": ""})
    base = hf if which == "hf" else ldm
    layout = layout_of(base)
    for i in range(2):
        for n, side in ((1, "img"), (2, "txt")):
            for what, module in (("qkv_lora", "qkv"), ("proj_lora", "proj")):
                view = layout.view(f"double_blocks.{i}.processor.{what}{n}.weight")
                assert view is not None
                assert torch.equal(seen(view, base), ldm[f"double_blocks.{i}.{side}_attn.{module}.weight"])
    for leaf in ("weight", "bias"):
        view = layout.view(f"single_blocks.2.processor.qkv_lora.{leaf}")
        assert view is not None
        assert torch.equal(seen(view, base), ldm[f"single_blocks.2.linear1.{leaf}"][:48])
        view = layout.view(f"single_blocks.2.processor.proj_lora.{leaf}")
        assert view is not None
        assert torch.equal(seen(view, base), ldm[f"single_blocks.2.linear2.{leaf}"])


def test_two_transformers_are_told_by_their_prefix() -> None:
    first, second = randomised(wan(), 0), randomised(wan(), 1)
    base = {f"transformer/{n}": t for n, t in first.items()} | {f"transformer_2/{n}": t for n, t in second.items()}
    layout = layout_of(base)
    for prefix, state in (("transformer.", first), ("transformer_2.", second)):
        for name in ("blocks.1.attn2.to_k.weight", "blocks.1.norm2.bias"):
            view = layout.view(prefix + name)
            assert view is not None
            assert torch.equal(seen(view, base), state[name])
    with pytest.raises(MismatchError, match="could be") as caught:
        layout.view("diffusion_model.blocks.1.self_attn.q.weight")
    assert caught.value.code == "binding.ambiguous"


def test_a_component_that_is_not_there_is_not_looked_for_elsewhere() -> None:
    layout = layout_of(randomised(wan()))
    assert layout.view("transformer_2.blocks.1.attn1.to_q.weight") is None
    assert layout.lacks("transformer_2.blocks.1.attn1.to_q.weight")
    assert not layout.lacks("transformer.blocks.1.attn1.to_q.weight")
    assert not layout.lacks("blocks.1.attn1.to_q.weight")


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"],
        ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"],
        [
            "down_blocks.3.resnets.0.norm1.weight",
            "add_embedding.linear_1.weight",
            "down_blocks.2.resnets.0.norm1.weight",
        ],
        ["layers.0.attention.qkv.weight", "cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"],
        [],
    ],
    ids=["llm", "gpt2", "sdxl-refiner", "lumina", "nothing"],
)
def test_other_models_have_no_layout(names: list[str]) -> None:
    assert detect_layout({name: (4, 4) for name in names}) is None


def test_models_without_a_table_are_found_through_prefixes_and_folders() -> None:
    names = ["layers.0.attention.qkv.weight", "cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"]
    for prefix in ("transformer/", "unet/", "model.diffusion_model.", "diffusion_model."):
        state = {f"{prefix}{name}": torch.randn(4, 6) for name in names}
        text = {"text_encoder/text_model.encoder.layers.0.mlp.fc1.weight": torch.randn(5, 3)} if "/" in prefix else {}
        layout = layout_of(state | text)
        for name in names:
            module = name.removesuffix(".weight").replace(".", "_")
            for tried in (name, f"diffusion_model.{name}", f"lora_unet_{module}.weight"):
                view = layout.view(tried)
                assert view is not None, (prefix, tried)
                assert torch.equal(seen(view, state), state[f"{prefix}{name}"])
        assert bool(text) == (layout.view("lora_te_encoder_layers_0_mlp_fc1.weight") is not None)


def test_a_thousand_lookups_among_twenty_thousand_tensors_take_less_than_a_second() -> None:
    hf = {name: tuple(tensor.shape) for name, tensor in flux1().state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {f"transformer/{n}": s for n, s in hf.items()}
    block = {n: s for n, s in hf.items() if n.startswith("transformer_blocks.0.")}
    for i in range(1, 600):
        shapes |= {f"transformer/{n.replace('.0.', f'.{i}.', 1)}": s for n, s in block.items()}
    assert len(shapes) > 18_000
    began = time.process_time()
    layout = detect_layout(shapes)
    assert layout is not None
    found = [layout.view(f"lora_unet_double_blocks_{i}_img_attn_qkv.weight") for i in range(500)]
    found += [layout.view(f"diffusion_model.double_blocks.{i}.img_mlp.2.weight") for i in range(500)]
    assert all(found)
    assert time.process_time() - began < 1
