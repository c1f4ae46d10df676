"""Merges into whole pipelines: diffusers loads the output, and it computes what the base with its adapters does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loramerge as lm
from loramerge.merging import run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
CLIP = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "projection_dim": 12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
    "transformer_layers_per_block": (1, 1),
}
VAE = {
    "block_out_channels": (8,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "norm_num_groups": 4,
    "sample_size": 8,
}
FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": False,
}


def tokenizer(folder: Path) -> Any:
    folder.mkdir()
    words = ("<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b", "ab</w>")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return transformers.CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL: two text encoders whose tensors have the same names."""
    root = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    words = tokenizer(root / "words")
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
        tokenizer=words,
        tokenizer_2=words,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(root / "base")
    (root / "base" / "LICENSE.md").write_text("a licence")
    return root / "base"


def trained(model: Any, targets: list[str], seed: int, **config: Any) -> Any:
    """The model with an active adapter whose factors are all random."""
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return model.eval()


class Trained:
    """The components with active adapters, and the file that holds all of those."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
        trained(self.pipeline.unet, ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "conv1"], 1, rank_pattern={"to_k": 1})
        trained(self.pipeline.text_encoder, ["q_proj", "fc1"], 2)
        trained(self.pipeline.text_encoder_2, ["v_proj", "out_proj"], 3)
        self.parts = {name: getattr(self.pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
        layers, metadata = {}, {}
        for name, part in self.parts.items():
            layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(part, adapter_name="default")
            metadata[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
        type(self.pipeline).save_lora_weights(folder, **layers, **metadata)
        self.file = folder


@pytest.fixture(scope="module")
def lora(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(sdxl, tmp_path_factory.mktemp("lora"))


def compute(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What every component makes of the same input."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(parts["unet"].parameters()).dtype
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(2, 5, 32, generator=generator).to(dtype)
    more = {"text_embeds": torch.randn(2, 12, generator=generator).to(dtype), "time_ids": torch.ones(2, 6).to(dtype)}
    ids = torch.tensor([[0, 2, 3, 4, 1]])
    with torch.no_grad():
        out = {"unet": parts["unet"](latents, 3, states, added_cond_kwargs=more).sample}
        for name in ("text_encoder", "text_encoder_2"):
            out[name] = parts[name].eval()(ids).last_hidden_state
    return out


def load(out: Path, **options: Any) -> dict[str, Any]:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(out, **options)
    return {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the result ---------------------------------------------------------------------------------------


def test_the_merged_pipeline_computes_what_the_base_with_its_adapters_does(
    sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    before = hashes(sdxl)
    out = tmp_path / "out"
    receipt = lm.merge(sdxl, lora.file, out)
    row = receipt.data["adapters"][0]
    assert row["modules"] == row["modules_matched"] > 20
    wanted, plain, got = compute(lora.parts), compute(load(sdxl)), compute(load(out))
    for name in wanted:
        assert error(got[name], wanted[name]) <= 1e-5, name
        assert error(plain[name], wanted[name]) > 1e-2, f"the adapter of {name} does nothing"
    assert hashes(sdxl) == before


def test_everything_else_travels_byte_for_byte(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lm.merge(sdxl, lora.file, out)
    before, after = hashes(sdxl), hashes(out)
    changed = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    changed |= {"text_encoder_2/model.safetensors"}
    assert after.keys() == before.keys() | {"loramerge.json"}
    assert {name for name in before if before[name] != after[name]} == changed
    assert {"scheduler/scheduler_config.json", "tokenizer_2/tokenizer_config.json", "model_index.json"} <= after.keys()


def test_files_hold_the_names_that_their_loaders_know(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lm.merge(sdxl, lora.file, out)
    for path in sdxl.glob("*/*.safetensors"):
        stored, old = load_file(out / path.relative_to(sdxl)), load_file(path)
        assert stored.keys() == old.keys()
        assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in old.items()}


def test_old_names_of_factors_find_their_component(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    """`lora.down`, as diffusers wrote it before it used PEFT; its text encoders had `lora_linear_layer.down`."""
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(lora.parts["text_encoder_2"]))
    assert any(".lora_linear_layer.down." in key for key in layers)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path / "old", text_encoder_2_lora_layers=layers)
    lm.merge(sdxl, {tmp_path / "old": 1.5}, tmp_path / "out")  # alpha 3 and rank 2 are not in such a file
    got = compute(load(tmp_path / "out"))
    assert error(got["text_encoder_2"], compute(lora.parts)["text_encoder_2"]) <= 1e-5
    assert torch.equal(got["text_encoder"], compute(load(sdxl))["text_encoder"])


@pytest.mark.parametrize("leading", [True, False])
def test_text_encoders_are_found_with_and_without_their_leading_level(
    sdxl: Path, lora: Trained, tmp_path: Path, leading: bool
) -> None:
    """transformers 5 drops `text_model.` from one kind of CLIP, and older files and adapters have it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(sdxl, base)
    tensors = load_file(base / "text_encoder" / "model.safetensors")
    tensors = {(f"text_model.{k}" if leading else k): v for k, v in tensors.items()}
    save_file(tensors, base / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    layers = {}
    for key, value in peft.get_peft_model_state_dict(lora.parts["text_encoder"]).items():
        layers[f"text_encoder.{key.removeprefix('text_model.')}"] = value
        layers[f"text_encoder_2.text_model.{key.removeprefix('text_model.')}"] = value + 1
    adapter.mkdir()
    save_file(layers, adapter / "pytorch_lora_weights.safetensors")
    receipt = lm.merge(base, {adapter: 1.5}, tmp_path / "out")
    assert receipt.data["adapters"][0]["modules_matched"] == receipt.data["adapters"][0]["modules"] == 8
    assert error(compute(load(tmp_path / "out"))["text_encoder"], compute(lora.parts)["text_encoder"]) <= 1e-5


def test_an_adapter_of_one_component_alone_needs_no_folder_in_its_names(
    sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(sdxl / "unet")
    model = peft.get_peft_model(unet, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    lm.merge(sdxl, tmp_path / "adapter", tmp_path / "out")
    parts = lora.parts | {"unet": model.eval()}
    assert error(compute(load(tmp_path / "out"))["unet"], compute(parts)["unet"]) <= 1e-5


FACTORS = {"A": (1, 16), "B": (16, 1)}


def test_names_that_two_components_have_are_not_guessed(sdxl: Path, tmp_path: Path) -> None:
    """Both text encoders have it: nothing says which was trained."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(sdxl, base)
    shutil.copy(sdxl / "text_encoder_2" / "model.safetensors", base / "text_encoder" / "model.safetensors")
    stored = load_file(base / "text_encoder" / "model.safetensors")
    name = next(k.removesuffix(".weight") for k in stored if k.endswith("q_proj.weight"))
    folder.mkdir()
    factors = {f"base_model.model.{name}.lora_{ab}.weight": torch.ones(s) for ab, s in FACTORS.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    with pytest.raises(lm.LoramergeError) as caught:
        lm.merge(base, folder, tmp_path / "out")
    assert caught.value.code == "binding.ambiguous"
    assert "text_encoder_2/" in caught.value.message


@pytest.mark.parametrize("folder", ["text_encoder_3", "transformer"])
def test_an_adapter_for_a_component_that_is_not_there_matches_nothing(sdxl: Path, folder: str, tmp_path: Path) -> None:
    """Never the component that happens to have the rest of the name."""
    rest = next(k for k in load_file(sdxl / "text_encoder" / "model.safetensors") if k.endswith("q_proj.weight"))
    keys = {f"{folder}.{rest.removesuffix('.weight')}.lora_{ab}.weight": torch.ones(s) for ab, s in FACTORS.items()}
    save_file(keys, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(lm.LoramergeError) as caught:
        lm.plan_merge(sdxl, tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "out")
    assert caught.value.code == "adapter.no-match"


# --- shards, dtypes, variants ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux transformer in several shards, as one component of a pipeline."""
    root = tmp_path_factory.mktemp("flux")
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel(**FLUX)
    model.save_pretrained(root / "transformer", max_shard_size="20KB")
    assert len(list((root / "transformer").glob("*.safetensors"))) > 2
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def flux_output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 6, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=generator),
        "pooled_projections": torch.randn(1, 6, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        return model.eval()(**inputs).sample


@pytest.fixture(scope="module")
def flux_lora(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter of one block, so that some shards stay as they are."""
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux / "transformer")
    trained(model, r"single_transformer_blocks\.1\.(attn\.to_q|proj_mlp|norm\.linear)", 5)
    folder = tmp_path_factory.mktemp("flux-lora")
    diffusers.FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder, flux_output(model)


def load_flux(out: Path) -> Any:
    return diffusers.FluxTransformer2DModel.from_pretrained(out, subfolder="transformer")


def test_a_sharded_component_stays_cut_as_it_is(
    flux: Path, flux_lora: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    adapter, wanted = flux_lora
    out = tmp_path / "out"
    receipt = lm.merge(flux, adapter, out, link=True)
    assert error(flux_output(load_flux(out)), wanted) <= 1e-5
    before, after = hashes(flux), hashes(out)
    assert after.keys() == before.keys() | {"loramerge.json"}
    whole = [row["name"] for row in receipt.data["files"] if row.get("copied_whole")]
    assert whole and len(whole) < len(receipt.data["files"])
    for name in whole:
        assert before[name] == after[name]
        assert os.path.samefile(flux / name, out / name)
    assert lm.verify(out)["ok"]


@pytest.mark.parametrize("size", [20_000, 1 << 30])
def test_shard_size_cuts_each_component_under_its_own_name(
    flux: Path, sdxl: Path, lora: Trained, flux_lora: tuple[Path, torch.Tensor], tmp_path: Path, size: int
) -> None:
    lm.merge(flux, flux_lora[0], tmp_path / "flux", shard_size=size)
    assert error(flux_output(load_flux(tmp_path / "flux")), flux_lora[1]) <= 1e-5
    out = tmp_path / "sdxl"
    lm.merge(sdxl, lora.file, out, shard_size=size)
    wanted, got = compute(lora.parts), compute(load(out))
    assert all(error(got[name], wanted[name]) <= 1e-5 for name in wanted)
    stems = {path.name.partition(".")[0].partition("-")[0] for path in out.glob("unet/*.safetensors")}
    assert stems == {"diffusion_pytorch_model"}
    shards = sorted(path.name for path in out.glob("unet/*.safetensors"))
    assert (
        (len(shards) > 1) == (size < 1 << 20) == (out / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    )
    for index in out.glob("*/*.index.json"):
        data = json.loads(index.read_text())
        stored = {k: f for f in set(data["weight_map"].values()) for k in load_file(index.parent / f)}
        assert data["weight_map"] == stored
        tensors = [load_file(index.parent / f) for f in set(stored.values())]
        assert data["metadata"]["total_size"] == sum(t.nbytes for file in tensors for t in file.values())
    assert lm.verify(out, base=sdxl)["ok"]


def test_one_component_folder_is_cut_under_the_name_that_its_loader_knows(
    flux: Path, flux_lora: tuple[Path, torch.Tensor], sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    lm.merge(sdxl / "unet", lora.file, tmp_path / "unet", shard_size=20_000, include=["unet.*"], allow_unmatched=True)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert error(compute(load(sdxl) | {"unet": unet})["unet"], compute(lora.parts)["unet"]) <= 1e-5


def test_another_dtype_goes_for_every_component_and_its_config(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lm.merge(sdxl, lora.file, out, dtype="bfloat16")
    parts = load(out, torch_dtype=torch.bfloat16)
    wanted = compute(lora.parts)
    assert all(error(value, wanted[name]) < 0.1 for name, value in compute(parts).items())
    for path in out.glob("*/*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.bfloat16}, path
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert (out / "unet" / "config.json").read_bytes() == (sdxl / "unet" / "config.json").read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pipeline_of_a_variant_stays_one_until_it_is_cut_anew(
    sdxl: Path, lora: Trained, tmp_path: Path, sharded: bool
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.save_pretrained(base, variant="fp16", **({"max_shard_size": "20KB"} if sharded else {}))
    assert all(".fp16" in path.name for path in base.glob("*/*.safetensors"))
    wanted = compute(lora.parts)
    for size, options in ((None, {"variant": "fp16"}), (30_000, {})):
        lm.merge(base, lora.file, out, shard_size=size, force=True)
        got = compute(load(out, **options))
        assert all(error(got[name], wanted[name]) <= 1e-5 for name in wanted)
        names = [path.name for path in out.rglob("*") if "fp16" in path.name]
        assert bool(names) == (size is None)
        assert lm.verify(out, base=base)["ok"]


def test_pickled_components_become_safetensors_under_the_names_that_loaders_know(
    sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sdxl, base)
    for path in base.glob("*/*.safetensors"):
        name = "pytorch_model.bin" if path.name.startswith("model") else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    lm.merge(base, lora.file, out, allow_pickle=True)
    assert hashes(out).keys() == hashes(sdxl).keys() | {"loramerge.json"}
    wanted, got = compute(lora.parts), compute(load(out, use_safetensors=True))
    assert all(error(got[name], wanted[name]) <= 1e-5 for name in wanted)


def test_weights_of_other_formats_and_unlisted_models_stay_behind(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sdxl, base)
    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(unet, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (base / "unet" / "model.safetensors.index.fp16.json").write_text("{}")
    shutil.copytree(base / "vae", base / "vae_1_0")
    (base / "notes").mkdir()
    (base / "notes" / "text.txt").write_text("kept")
    shutil.copy(unet, base / "single_file.safetensors")
    lm.merge(base, lora.file, out)
    assert hashes(out).keys() == hashes(sdxl).keys() | {"loramerge.json", "notes/text.txt"}


# --- receipt, verify, diff, inspect, dry run --------------------------------------------------------------


def test_verify_replays_a_merge_and_finds_a_flipped_byte(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lm.merge(sdxl, lora.file, out)
    assert lm.verify(out)["ok"]
    report = lm.verify(out, base=sdxl, adapters=lora.file)
    assert report["ok"] and report["replayed"]
    assert report["tensors"] == report["equal"] == sum(len(load_file(p)) for p in sdxl.glob("*/*.safetensors"))
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"):
        with open(out / name, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        report = lm.verify(out)
        assert not report["ok"]
        assert [tensor.partition("/")[0] for tensor in report["differ"]] == [name.partition("/")[0]]
        shutil.rmtree(out)
        lm.merge(sdxl, lora.file, out)
    (out / "scheduler" / "scheduler_config.json").write_text("{}")
    assert [f["name"] for f in lm.verify(out)["files"] if not f["ok"]] == ["scheduler/scheduler_config.json"]


def test_a_receipt_that_calls_a_component_by_something_else_is_not_believed(
    sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lm.merge(sdxl, lora.file, out)
    data = json.loads((out / "loramerge.json").read_text())
    for component in (None, 3, "vae", "../x"):
        changed = [row | {"component": component} if row["name"].startswith("unet/") else row for row in data["files"]]
        (out / "loramerge.json").write_text(json.dumps(data | {"files": changed}))
        assert not lm.verify(out)["ok"]


def test_an_adapter_is_not_merged_twice_into_a_pipeline_or_its_component(
    sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    lm.merge(sdxl, lora.file, tmp_path / "once")
    part = tmp_path / "part"
    shutil.copytree(sdxl, part)
    shutil.rmtree(part / "unet")
    lm.merge(sdxl / "unet", lora.file, part / "unet", include=["unet.*"], allow_unmatched=True)
    for base in (tmp_path / "once", part):
        with pytest.raises(lm.LoramergeError) as caught:
            lm.merge(base, lora.file, tmp_path / "twice")
        assert caught.value.code == "base.already-merged"


def test_diff_names_the_tensors_of_every_changed_component(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    lm.merge(sdxl, lora.file, tmp_path / "out", exclude=["text_encoder.*"])
    report = lm.diff(sdxl, tmp_path / "out")
    assert {row["name"].partition("/")[0] for row in report["changed"]} == {"unet", "text_encoder_2"}
    assert report["only_a"] == report["only_b"] == []
    assert lm.diff(sdxl, sdxl)["same"]


def test_inspect_tells_the_components(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    lm.merge(sdxl, lora.file, tmp_path / "out")
    data = lm.inspect(tmp_path / "out")
    assert data["kind"] == "checkpoint"
    assert [(row["folder"], row["class"]) for row in data["models"]] == [
        ("text_encoder", "CLIPTextModel"),
        ("text_encoder_2", "CLIPTextModelWithProjection"),
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
    ]
    assert sum(row["parameters"] for row in data["models"]) == data["parameters"]
    assert data["receipt"]["adapters"] == [{"source": str(lora.file), "weight": 1}]
    assert data["notes"] == []


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "loramerge", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line_speaks_of_a_pipeline(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    dry = command("merge", sdxl, lora.file, "-o", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(dry.stdout)["plan"]
    assert {file["name"] for file in plan["files"]} == {p.relative_to(sdxl).as_posix() for p in sdxl.glob("*/*.saf*")}
    assert "model_index.json" in {file["name"] for file in plan["side_files"]}
    assert not (tmp_path / "out").exists()
    done = command("merge", sdxl, lora.file, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "in 7 folders" in done.stdout
    shown = command("inspect", tmp_path / "out")
    assert shown.stdout.count("component ") == 4 and "UNet2DConditionModel" in shown.stdout


# --- what is refused, and failures --------------------------------------------------------------------------


def refused(code: str, *arguments: Any, **options: Any) -> lm.LoramergeError:
    with pytest.raises(lm.LoramergeError) as caught:
        lm.merge(*arguments, **options)
    assert caught.value.code == code, caught.value.message
    assert caught.value.fix
    return caught.value


def test_a_pipeline_becomes_no_single_file(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    assert refused("usage.pipeline", sdxl, lora.file, tmp_path / "out.safetensors").exit_code == 2


def test_an_output_that_exists_or_lies_in_the_pipeline_is_refused(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused("output.exists", sdxl, lora.file, tmp_path / "out")
    refused("output.is-input", sdxl, lora.file, sdxl / "unet" / "merged")
    lm.merge(sdxl, lora.file, tmp_path / "out", force=True)
    assert lm.verify(tmp_path / "out")["ok"]


def test_an_output_around_the_files_that_a_component_links_to_is_refused(
    sdxl: Path, lora: Trained, tmp_path: Path
) -> None:
    base, blobs = tmp_path / "base", tmp_path / "blobs"
    shutil.copytree(sdxl, base)
    blobs.mkdir()
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(blobs / "model.safetensors")
    file.symlink_to(blobs / "model.safetensors")
    refused("output.is-input", base, lora.file, blobs, force=True)
    lm.merge(base, lora.file, tmp_path / "out")
    assert not (tmp_path / "out" / "vae" / file.name).is_symlink()


def test_no_adapter_brings_its_tokenizer_into_a_pipeline(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(lora.file, adapter)
    (adapter / "tokenizer.json").write_text("{}")
    refused("adapter.tokenizer", sdxl, adapter, tmp_path / "out", tokenizer="adapter")
    lm.merge(sdxl, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_would_change_the_shape_of_a_component_is_refused(sdxl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "text_encoder_2.text_model.embeddings.token_embedding"
    wider = torch.ones(9, 16)
    save_file({f"base_model.model.{name}.weight": wider}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "modules_to_save": ["token_embedding", "classifier"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lm.LoramergeError) as caught:
        lm.merge(sdxl, folder, tmp_path / "out")
    assert caught.value.code in ("pipeline.shape", "base.replaced-shape")
    save_file({"base_model.model.text_encoder.classifier.weight": wider}, folder / "adapter_model.safetensors")
    refused("pipeline.shape", sdxl, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_late_leaves_nothing(
    sdxl: Path, lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more")

    before = hashes(sdxl)
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    monkeypatch.setattr(run, "_write_side_files", fail)
    with pytest.raises(OSError, match="no more"):
        lm.merge(sdxl, lora.file, out)
    assert list(out.parent.iterdir()) == []
    assert hashes(sdxl) == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_merge_leaves_no_output_and_the_next_one_clears_up(sdxl: Path, lora: Trained, tmp_path: Path) -> None:
    before = hashes(sdxl)
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    script = (
        "import os, signal, sys\nimport loramerge as lm\nfrom loramerge.merging import run\n"
        "run._write_side_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "lm.merge(sys.argv[1], sys.argv[2], sys.argv[3])"
    )
    killed = subprocess.run([sys.executable, "-c", script, sdxl, lora.file, out], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    assert ".partial-" in left.name and (left / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert hashes(sdxl) == before
    lm.merge(sdxl, lora.file, out)
    assert list(out.parent.iterdir()) == [out]
    assert lm.verify(out, base=sdxl)["ok"]
