"""Extraction into other dialects, and of image models in either of their layouts; each merged back into the base."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from tuned import dense, load, low_rank, make, outputs, tensors_of, tune, with_peft

import loramerge as lm
from loramerge.errors import LoramergeError, UnsupportedError

image_zoo = pytest.importorskip("image_zoo")

State = dict[str, Tensor]
PIXELS = "model.diffusion_model."


def changed(state: State, seed: int = 3) -> State:
    torch.manual_seed(seed)
    return {name: value + dense(name, value) for name, value in state.items()}


def check(base: State, tuned: State, adapter: Path, left: Sequence[str] = ()) -> None:
    """Base and adapter are the fine-tune, tensor by tensor, but for those that were left out."""
    merged = lm.merge_tensors(base, adapter)
    assert merged.keys() == tuned.keys()
    for name, value in tuned.items():
        wanted = base[name] if any(fnmatch.fnmatchcase(name, glob) for glob in left) else value
        assert torch.allclose(merged[name], wanted, rtol=1e-5, atol=2e-6), name


@pytest.fixture(scope="module")
def flux() -> tuple[State, State, State, State]:
    """A tiny Flux and its fine-tune, as diffusers keeps them and as one file."""
    hf = {n: t.float() for n, t in image_zoo.randomised(image_zoo.flux1()).items()}
    tuned = changed(hf)
    single = [
        {f"{PIXELS}{n}": t.contiguous() for n, t in image_zoo.single_file(s, {"transformer": ""}).items()}
        for s in (hf, tuned)
    ]
    return hf, tuned, single[0], single[1]


@pytest.mark.parametrize("layout", ["hf", "ldm"])
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_an_image_model_whatever_its_layout(
    layout: str, to: str, flux: tuple[State, State, State, State], tmp_path: Path
) -> None:
    base, tuned = flux[:2] if layout == "hf" else flux[2:]
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    # kohya has no name for the parameters of norms that are no weights.
    left = ["*.scale", "*norm_[qk]*", "*norm_added_[qk]*"] if to == "kohya" else []
    inputs = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    data = lm.extract(*inputs, out, rank=999, to=to, exclude=left)
    assert data["model_error"] < 1e-6 and data["modules"]
    check(base, tuned, out, left)
    check(*(flux[2:] if layout == "hf" else flux[:2]), out, left)


def test_a_fine_tune_in_the_other_layout(flux: tuple[State, State, State, State], tmp_path: Path) -> None:
    hf, tuned, _, single = flux
    save_file(hf, tmp_path / "base.safetensors")
    save_file(single, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    data = lm.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, rank=999, to="comfyui")
    assert any("other names" in note for note in data["notes"])
    check(hf, tuned, out)


def test_diffusers_has_no_place_for_norms_and_says_what_leaves_them_out(
    flux: tuple[State, State, State, State], tmp_path: Path
) -> None:
    hf, tuned = flux[:2]
    save_file(hf, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    arguments = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "lora")
    with pytest.raises(UnsupportedError, match="diffusers") as caught:
        lm.extract(*arguments, rank=999, to="diffusers")
    assert caught.value.code == "extract.kind" and "--only-linear" in caught.value.fix
    assert not (tmp_path / "lora").exists()
    data = lm.extract(*arguments, rank=999, to="diffusers", only_linear=True)
    assert data["left_out"] and 0 < data["model_error"] < 0.5
    merged = lm.merge_tensors(hf, tmp_path / "lora")
    for name, value in tuned.items():
        kept = value if name not in data["left_out"] else hf[name]
        assert torch.allclose(merged[name], kept, rtol=1e-5, atol=2e-6), name


def test_peft_loads_what_is_made_of_a_diffusers_model(tmp_path: Path) -> None:
    model = image_zoo.unet15().float()
    base = {n: t.detach().clone() for n, t in image_zoo.randomised(model).items()}
    tuned = changed({n: t.float() for n, t in base.items()})
    save_file({n: t.float() for n, t in base.items()}, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    data = lm.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "lora", rank=9999)
    assert data["whole"] and data["model_error"] < 1e-6
    model.load_state_dict(base)
    merged = with_peft(model.float(), tmp_path / "lora").merge_and_unload().state_dict()
    for name, value in tuned.items():
        assert torch.allclose(merged[name], value, rtol=1e-5, atol=2e-6), name


def test_convolutions_of_a_unet(tmp_path: Path) -> None:
    base = {n: t.float() for n, t in image_zoo.randomised(image_zoo.unet15()).items()}
    tuned = changed(base)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    data = lm.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, rank=9999, to="kohya")
    assert any(len(row["shape"]) == 4 and row["shape"][2] == 3 for row in data["rows"])
    check(base, tuned, out)


@pytest.mark.parametrize("to", ["mlx", "gguf", "loralib", "vllm"])
def test_language_models_in_other_dialects(to: str, tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", low_rank(2), only=lambda n: "proj" in n)
    out = tmp_path / {"gguf": "lora.gguf", "loralib": "lora.bin"}.get(to, "lora")
    data = lm.extract(base, tuned, out, rank=8, energy=1.0, to=to)
    pickled = {"allow_pickle": True, "alpha": data["alpha"]} if to == "loralib" else {}
    lm.merge(base, out, tmp_path / "merged", **pickled)
    for key, value in tensors_of(tuned).items():
        assert torch.allclose(tensors_of(tmp_path / "merged")[key], value, atol=1e-5), key
    assert torch.allclose(outputs(load(tmp_path / "merged"), "llama"), outputs(load(tuned), "llama"), atol=1e-4)


def test_a_budget_holds_where_all_modules_have_one_rank(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only=lambda n: "proj" in n)
    data = lm.extract(base, tuned, tmp_path / "lora", budget=40_000, to="mlx")
    assert sum(n for name, n in data["files"].items() if name.endswith(".safetensors")) <= 40_000
    assert len({row["rank"] for row in data["rows"] if row["rank"]}) == 1


def test_unknown_dialects_and_places_are_usage_errors(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    for out, to in (("lora", "pefft"), ("lora.safetensors", None), ("lora", "kohya")):
        with pytest.raises(LoramergeError) as caught:
            lm.extract(base, tuned, tmp_path / out, rank=2, to=to)
        assert caught.value.exit_code == 2 and not (tmp_path / out).exists()
