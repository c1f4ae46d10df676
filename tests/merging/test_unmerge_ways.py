"""The ways back from a merge: the undo file, the base, subtraction; what each refuses, and what it proves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import InputError, LoramergeError, MismatchError, OutputError, UnsupportedError
from loramerge.merging.candidates import ambiguity
from loramerge.tensors.source import FileSource

ROWS, COLS, RANK = 24, 16, 4
PROJECTIONS = ("q_proj", "v_proj")


def weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    own = {
        f"model.layers.{i}.self_attn.{n}.weight": torch.randn(ROWS, COLS)
        for i in range(2)
        for n in (*PROJECTIONS, "k_proj")
    }
    own |= {"model.embed_tokens.weight": torch.randn(11, COLS), "model.norm.weight": torch.ones(COLS)}
    own["lm_head.weight"] = torch.randn(11, COLS)
    return {name: tensor.to(dtype) for name, tensor in own.items()}


def factors(seed: int = 1, size: float = 0.05, names: tuple[str, ...] = PROJECTIONS) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {}
    for i in range(2):
        for name in names:
            at = f"base_model.model.model.layers.{i}.self_attn.{name}"
            made[f"{at}.lora_A.weight"] = torch.randn(RANK, COLS)
            made[f"{at}.lora_B.weight"] = torch.randn(ROWS, RANK) * size
    return made


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = config if "peft_type" in config else {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_base(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    cuts = [names[i::shards] for i in range(shards)]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": cut for i, cut in enumerate(cuts)}
    for file, cut in files.items():
        save_file({n: tensors[n] for n in cut}, folder / file, metadata={"format": "pt"})
    weight_map = {n: file for file, cut in files.items() for n in cut}
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def all_files(folder: Path) -> dict[str, bytes]:
    own = {"loramerge.json", "loramerge.undo"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


def read(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def flip(file: Path, name: str, bit: int = 0) -> None:
    """Flips a bit of the first byte of a tensor."""
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    raw[8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]] ^= 1 << bit
    file.write_bytes(raw)


def receipt_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "loramerge.json").read_text()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", weights())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora", factors())


# --------------------------------------------------------------------------------------------- with the base


class Reads:
    """Counts what is read from files below a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int]] = []
        original = FileSource.read_into

        def read_into(source: FileSource, offset: int, buffer: memoryview) -> None:
            if folder in source.path.parents and source.path.suffix == ".safetensors":
                self.ranges.append((offset, offset + len(buffer)))
            original(source, offset, buffer)

        monkeypatch.setattr(FileSource, "read_into", read_into)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_base_comes_back_file_by_file(tmp_path: Path, lora: Path, shards: int) -> None:
    base = write_base(tmp_path / "base", weights(), shards)
    lm.merge(base, lora, tmp_path / "m")
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)
    assert (receipt.data["way"], receipt.data["proved"], receipt.data["unproved"]) == ("base", 4, [])
    assert receipt.data["removed"] == [{"source": str(lora), "weight": 1.0}] and receipt.data["adapters"] == []
    assert lm.verify(tmp_path / "u")["ok"]
    # Nothing is merged into it any more, so nothing keeps the adapter out.
    lm.merge(tmp_path / "u", lora, tmp_path / "again")
    assert all_files(tmp_path / "again") == all_files(tmp_path / "m")


def test_only_the_changed_tensors_are_read_from_the_base(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.merge(base, lora, tmp_path / "m")
    size = int.from_bytes((base / "model.safetensors").read_bytes()[:8], "little")
    reads = Reads(base, monkeypatch)
    lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    tensors = [(lo, hi) for lo, hi in reads.ranges if hi > 8 + size]
    assert sum(hi - lo for lo, hi in tensors) == 4 * ROWS * COLS * 2  # q and v of two layers
    assert all_files(tmp_path / "u") == all_files(base)


def test_the_base_is_preferred_to_a_damaged_undo_file(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    undo = tmp_path / "m" / "loramerge.undo"
    undo.write_bytes(undo.read_bytes()[:-100])
    with pytest.raises(InputError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u")
    assert caught.value.code == "undo.damaged" and "--base" in caught.value.fix
    lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_merge_into_another_dtype_comes_back_from_the_base(
    tmp_path: Path, base: Path, lora: Path, dtype: str
) -> None:
    lm.merge(base, lora, tmp_path / "m", dtype=dtype)
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)
    # Only digests of the converted tensors are known, so that the files' names and sizes have to do.
    assert receipt.data["proved"] == 0 and len(receipt.data["unproved"]) == len(weights())
    other = write_base(tmp_path / "other", {**weights(), "model.extra.weight": torch.ones(3)})
    with pytest.raises(MismatchError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "v", base=other)
    assert caught.value.code == "unmerge.base" and not (tmp_path / "v").exists()


def grown_vocabulary() -> dict[str, Tensor]:
    saved = {"base_model.model.model.embed_tokens.weight": torch.randn(13, COLS)}
    saved["base_model.model.lm_head.weight"] = torch.randn(13, COLS)
    return factors() | saved


def test_replaced_and_resized_tensors_come_back_from_the_base(tmp_path: Path, base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false, "vocab_size": 11}')
    lora = write_adapter(tmp_path / "lora", grown_vocabulary())
    lm.merge(base, lora, tmp_path / "m")
    assert read(tmp_path / "m")["lm_head.weight"].shape == (13, COLS)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == 13
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)
    assert set(receipt.data["unproved"]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_added_tensors_go_with_the_base(tmp_path: Path, base: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = weights()
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    head = {"base_model.model.lm_head.lora_A.weight": torch.randn(RANK, COLS)}
    head["base_model.model.lm_head.lora_B.weight"] = torch.randn(11, RANK)
    lora = write_adapter(tmp_path / "lora", factors() | head)
    lm.merge(base, lora, tmp_path / "m")
    assert "lm_head.weight" in read(tmp_path / "m")
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base) and receipt.data["unproved"] == []
    with pytest.raises(UnsupportedError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "v", inexact=True)
    assert (caught.value.code, caught.value.tensors) == ("unmerge.not-additive", ("lm_head.weight",))


def test_a_pickled_base(tmp_path: Path, lora: Path) -> None:
    base = write_base(tmp_path / "base", weights())
    (base / "model.safetensors").unlink()
    torch.save(weights(), base / "pytorch_model.bin")
    lm.merge(base, lora, tmp_path / "m", allow_pickle=True)
    with pytest.raises(LoramergeError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert caught.value.code == "pickle.refused"
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", base=base, allow_pickle=True)
    back, own = read(tmp_path / "u"), weights()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[k].view(torch.int16), own[k].view(torch.int16)) for k in own)
    assert receipt.data["unproved"] == []


def test_a_single_file(tmp_path: Path, lora: Path) -> None:
    save_file(weights(), tmp_path / "sd.safetensors", metadata={"modelspec.title": "mine"})
    lm.merge(tmp_path / "sd.safetensors", lora, tmp_path / "m.safetensors")
    lm.unmerge(tmp_path / "m.safetensors", tmp_path / "u.safetensors", base=tmp_path / "sd.safetensors")
    assert (tmp_path / "u.safetensors").read_bytes() == (tmp_path / "sd.safetensors").read_bytes()
    assert lm.verify(tmp_path / "u.safetensors")["ok"]


def test_a_directory_merged_into_one_file_comes_back_as_either(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m.safetensors")
    lm.unmerge(tmp_path / "m.safetensors", tmp_path / "u.safetensors", base=base)
    assert (tmp_path / "u.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    lm.unmerge(tmp_path / "m.safetensors", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)


def test_a_switched_model_comes_back_from_the_base(tmp_path: Path, base: Path, lora: Path) -> None:
    other = write_adapter(tmp_path / "other", factors(2, names=("q_proj",)))
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    lm.switch(tmp_path / "m", other, tmp_path / "s")
    (tmp_path / "s" / "loramerge.undo").unlink()
    receipt = lm.unmerge(tmp_path / "s", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)
    assert receipt.data["proved"] == 2  # v_proj was brought back by the switch
    lm.unmerge(tmp_path / "s", tmp_path / "i", inexact=True)
    exact, back = weights(), read(tmp_path / "i")
    for name, tensor in exact.items():
        torch.testing.assert_close(back[name].float(), tensor.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_another_base_is_refused_by_the_tensor_that_differs(tmp_path: Path, base: Path, lora: Path, name: str) -> None:
    lm.merge(base, lora, tmp_path / "m")
    flip(base / "model.safetensors", name)
    with pytest.raises(MismatchError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert (caught.value.code, caught.value.tensors) == ("unmerge.base", (name,))
    assert not (tmp_path / "u").exists() and not list(tmp_path.glob("u.*"))


def test_a_base_of_other_tensors_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m")
    tensors = weights()
    tensors["model.norm.weight"] = torch.ones(COLS + 1, dtype=torch.bfloat16)
    del tensors["lm_head.weight"]
    other = write_base(tmp_path / "other", tensors)
    with pytest.raises(MismatchError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u", base=other)
    assert caught.value.code == "unmerge.base"
    assert set(caught.value.tensors) == {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("way", ["undo", "base", "subtraction"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_an_edited_model_is_refused_by_every_way_that_reads_the_edit(
    tmp_path: Path, base: Path, lora: Path, way: str, name: str
) -> None:
    lm.merge(base, lora, tmp_path / "m", reversible=way == "undo")
    flip(tmp_path / "m" / "model.safetensors", name)
    options: dict[str, Any] = {"base": {"base": base}, "subtraction": {"inexact": True}}.get(way, {})
    if way == "base" and "q_proj" in name:  # of that tensor the merged model is not asked
        lm.unmerge(tmp_path / "m", tmp_path / "u", **options)
        assert all_files(tmp_path / "u") == all_files(base)
        return
    with pytest.raises(LoramergeError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u", **options)
    assert caught.value.exit_code == 3 and caught.value.tensors == (name,)
    assert caught.value.code == ("undo.edited" if way == "undo" and "q_proj" in name else "unmerge.edited")
    assert not (tmp_path / "u").exists()


def test_a_switch_of_an_edited_model_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    other = write_adapter(tmp_path / "other", factors(2, names=("k_proj",)))
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    name = "model.layers.0.self_attn.k_proj.weight"  # not changed by the merge, but by the switch
    flip(tmp_path / "m" / "model.safetensors", name)
    with pytest.raises(MismatchError) as caught:
        lm.switch(tmp_path / "m", other, tmp_path / "s")
    assert (caught.value.code, caught.value.tensors) == ("unmerge.edited", (name,))
    assert not (tmp_path / "s").exists()


def test_an_output_that_is_an_input_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    before = all_files(base), all_files(tmp_path / "m")
    for options in ({"base": base}, {}):
        for out in (base, tmp_path / "m", tmp_path / "m" / "inside"):
            if out != base or options:
                with pytest.raises(OutputError):
                    lm.unmerge(tmp_path / "m", out, force=True, **options)  # type: ignore[arg-type]
    assert (all_files(base), all_files(tmp_path / "m")) == before


# --------------------------------------------------------------------------------------------- by subtraction


@pytest.mark.parametrize("reason", ["dtype", "replaced", "resized", "dora", "mixed"])
def test_what_was_not_only_added_to_cannot_be_subtracted(tmp_path: Path, base: Path, reason: str) -> None:
    options = {"dtype": "float32"} if reason == "dtype" else {}
    tensors, config, names = factors(), {}, set()
    if reason == "replaced":
        tensors["base_model.model.lm_head.weight"] = torch.randn(11, COLS)
        names = {"lm_head.weight"}
    if reason == "resized":
        tensors = grown_vocabulary()
        names = {"model.embed_tokens.weight", "lm_head.weight"}
    if reason in ("dora", "mixed"):
        config["use_dora"] = True
        dora = factors(names=("q_proj",))
        for i in range(2):
            at = f"base_model.model.model.layers.{i}.self_attn.q_proj"
            dora[f"{at}.lora_magnitude_vector.weight"] = torch.rand(ROWS) + 1
        tensors = dora
        names = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    adapters = [write_adapter(tmp_path / "lora", tensors, **config)]
    if reason == "mixed":
        adapters.append(write_adapter(tmp_path / "plain", factors()))
    lm.merge(base, adapters, tmp_path / "m", **options)
    with pytest.raises(UnsupportedError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    assert caught.value.code == "unmerge.not-additive" and set(caught.value.tensors) == names
    assert "--base" in caught.value.fix and not (tmp_path / "u").exists()


def test_without_a_way_back_it_is_refused_and_both_ways_are_named(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m")
    with pytest.raises(MismatchError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u")
    assert (caught.value.code, caught.value.exit_code) == ("unmerge.no-undo", 3)
    assert "--base" in caught.value.fix and "--inexact" in caught.value.fix
    with pytest.raises(MismatchError) as caught:
        lm.switch(tmp_path / "m", lora, tmp_path / "u")
    assert caught.value.code == "unmerge.no-undo" and "--inexact" not in caught.value.fix
    with pytest.raises(MismatchError) as caught:
        lm.unmerge(base, tmp_path / "u")
    assert caught.value.code == "unmerge.no-receipt"


@pytest.mark.parametrize("size", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_share_that_is_told_is_the_share_that_is_wrong(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(3)
    name = "model.layers.0.self_attn.q_proj.weight"
    W = (torch.randn(512, 256) * torch.randn(512, 1).exp()).to(dtype)
    base = write_base(tmp_path / "base", {name: W, "model.norm.weight": torch.ones(4, dtype=dtype)})
    at = f"base_model.model.{name.removesuffix('.weight')}"
    A, B = torch.randn(RANK, 256), torch.randn(512, RANK) * size
    lora = write_adapter(tmp_path / "lora", {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B})
    lm.merge(base, {lora: 0.7}, tmp_path / "m", compute_dtype="float64")
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    back = read(tmp_path / "u")
    told = receipt.data["inexact"]
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    wrong = float((back[name].view(integers) != W.view(integers)).double().mean())
    assert told["elements"] == W.numel() and 0 < told["share"] <= told["may_differ"]
    n = W.numel()
    room = 5 * (told["share"] / n) ** 0.5 + 5 / n  # of what is counted at random
    # float32 merges may be off in float32's own last place, which the measure makes room for.
    assert wrong <= told["share"] + room
    if dtype != torch.float32:
        assert wrong >= told["share"] - room
    assert wrong <= told["may_differ"]
    # Not only few are wrong, they are as near as the grid allows.
    D = 0.7 * 2 * (B.double() @ A.double())
    M = read(tmp_path / "m")[name]
    assert torch.equal(back[name], (M.double() - D).float().to(dtype)) or dtype != torch.float32
    assert receipt.data["way"] == "subtraction" and receipt.data["unproved"] == [name]
    assert torch.equal(back["model.norm.weight"], torch.ones(4, dtype=dtype))


def test_what_subtraction_gives_back_exactly_is_proved(tmp_path: Path) -> None:
    # Powers of two: W + d and M - d are exact.
    name = "model.layers.0.self_attn.q_proj.weight"
    base = write_base(tmp_path / "base", {name: torch.ones(8, 8)})
    at = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = {f"{at}.lora_A.weight": torch.ones(4, 8), f"{at}.lora_B.weight": torch.ones(8, 4) / 8}
    lora = write_adapter(tmp_path / "lora", tensors)
    lm.merge(base, lora, tmp_path / "m")
    assert read(tmp_path / "m")[name][0, 0] == 2
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    assert (receipt.data["proved"], receipt.data["unproved"]) == (1, [])
    assert torch.equal(read(tmp_path / "u")[name], torch.ones(8, 8))


def test_several_adapters_and_kinds_are_subtracted_as_one_sum(tmp_path: Path, base: Path, lora: Path) -> None:
    hada = {}
    for i in range(2):
        at = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        for x in ("w1", "w2"):
            hada[f"{at}.hada_{x}_a"] = torch.randn(ROWS, RANK) * 0.2
            hada[f"{at}.hada_{x}_b"] = torch.randn(RANK, COLS) * 0.2
    loha = write_adapter(tmp_path / "loha", hada, peft_type="LOHA", r=RANK, alpha=RANK)
    lm.merge(base, {lora: 0.5, loha: -0.8}, tmp_path / "m")
    merged, exact = read(tmp_path / "m"), weights()
    changed = [k for k in exact if not torch.equal(exact[k], merged[k])]
    assert len(changed) == 4
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    back = read(tmp_path / "u")
    for name in exact:
        off = (back[name].view(torch.int16).int() - exact[name].view(torch.int16).int()).abs()
        small = exact[name].float().abs() < 2**-4  # there the merged weight's grid is the coarser one
        assert int(off[~small].max()) <= 2 and float((off == 0).double().mean()) > 0.8
        torch.testing.assert_close(back[name].float(), exact[name].float(), rtol=0, atol=0.01)
    assert [row["weight"] for row in receipt.data["removed"]] == [0.5, -0.8]


def test_a_zero_update_is_no_subtraction(tmp_path: Path, base: Path) -> None:
    tensors = factors()
    for key in tensors:
        if "q_proj.lora_B" in key:
            tensors[key].zero_()
    lora = write_adapter(tmp_path / "lora", tensors)
    lm.merge(base, lora, tmp_path / "m")
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    assert receipt.data["inexact"]["elements"] == 2 * ROWS * COLS
    back, exact = read(tmp_path / "u"), weights()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(back[name].view(torch.int16), exact[name].view(torch.int16))


def test_adapters_that_have_moved_are_named(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, {lora: 0.5}, tmp_path / "m")
    lora.rename(tmp_path / "moved")
    with pytest.raises(MismatchError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    assert caught.value.code == "unmerge.adapter-missing" and str(lora) in str(caught.value)
    lm.unmerge(tmp_path / "m", tmp_path / "u", tmp_path / "moved", inexact=True)
    for name, tensor in weights().items():
        torch.testing.assert_close(read(tmp_path / "u")[name].float(), tensor.float(), rtol=0.02, atol=0.02)


def test_an_adapter_that_was_changed_since_is_not_subtracted(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m")
    save_file(factors(9), lora / "adapter_model.safetensors")
    for given in ((), lora):
        with pytest.raises(MismatchError) as caught:
            lm.unmerge(tmp_path / "m", tmp_path / "u", given, inexact=True)
        assert caught.value.code == "unmerge.adapter"


def test_a_merge_that_left_modules_out_is_subtracted_with_them_left_out(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m", exclude=["*v_proj"])
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    assert receipt.data["inexact"]["elements"] == 2 * ROWS * COLS
    assert receipt.counts["changed"] == 2


# ------------------------------------------------------------------------------------------ adapters, given


def test_adapters_are_checked_against_the_receipt_whatever_the_way(tmp_path: Path, base: Path, lora: Path) -> None:
    tone = write_adapter(tmp_path / "tone", factors(2))
    other = write_adapter(tmp_path / "other", factors(3))
    lm.merge(base, {lora: 0.5, tone: 2.0}, tmp_path / "m", reversible=True)
    good: list[Any] = [[lora, tone], [tone, lora], {lora: 0.5, tone: 2.0}]
    for number, given in enumerate(good):
        lm.unmerge(tmp_path / "m", tmp_path / f"u{number}", given)
    bad: list[tuple[Any, str]] = [
        (lora, "2 adapters are merged"),
        ([lora, other], "is not what was merged"),
        ({lora: 0.4, tone: 2.0}, "with weight 0.5, not 0.4"),
        ([lora, lora], "is not what was merged"),
    ]
    for options in ({}, {"base": base}, {"inexact": True}):
        for given, says in bad:
            with pytest.raises(MismatchError, match=says) as caught:
                lm.unmerge(tmp_path / "m", tmp_path / "u", given, **options)  # type: ignore[arg-type]
            assert caught.value.code == "unmerge.adapter" and not (tmp_path / "u").exists()


def test_one_adapter_merged_twice_is_told_apart_by_its_weights(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, [(lora, 0.5), (lora, 0.25)], tmp_path / "m")
    lm.unmerge(tmp_path / "m", tmp_path / "u", [(lora, 0.25), (lora, 0.5)], inexact=True)
    for name, tensor in weights().items():
        torch.testing.assert_close(read(tmp_path / "u")[name].float(), tensor.float(), rtol=0.02, atol=0.02)


def test_a_loralib_merge_needs_no_alpha_again(tmp_path: Path) -> None:
    path = "roberta.encoder.layer.0.attention.self.query"
    base = write_base(tmp_path / "base", {f"{path}.weight": torch.randn(8, 8)})
    lora = {f"{path}.lora_A": torch.randn(2, 8), f"{path}.lora_B": torch.randn(8, 2)}
    torch.save(lora, tmp_path / "lora.bin")
    lm.merge(base, tmp_path / "lora.bin", tmp_path / "m", alpha=16, allow_pickle=True, reversible=True)
    lm.unmerge(tmp_path / "m", tmp_path / "u", tmp_path / "lora.bin", allow_pickle=True)
    assert all_files(tmp_path / "u") == all_files(base)


# ---------------------------------------------------------------------------------------------------- verify


def test_verify_checks_the_undo_file(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    report = lm.verify(tmp_path / "m", undo=True)
    assert report["ok"] and report["undo"] == {"ok": True, "why": "", "tensors": [], "back": 4}
    assert {row["name"]: row["ok"] for row in report["files"]}["loramerge.undo"]
    undo = tmp_path / "m" / "loramerge.undo"
    raw = undo.read_bytes()
    undo.write_bytes(raw[:40] + bytes([raw[40] ^ 1]) + raw[41:])
    report = lm.verify(tmp_path / "m")
    assert not report["ok"] and report["differ"] == [] and report["undo"] is None
    assert [row["name"] for row in report["files"] if not row["ok"]] == ["loramerge.undo"]
    report = lm.verify(tmp_path / "m", undo=True)
    assert not report["ok"] and not report["undo"]["ok"] and report["undo"]["tensors"]
    undo.unlink()
    assert not lm.verify(tmp_path / "m")["ok"]
    with pytest.raises(MismatchError) as caught:
        lm.verify(tmp_path / "m", undo=True)
    assert caught.value.code == "unmerge.no-undo"


def test_verify_tries_the_way_back_of_whole_originals(tmp_path: Path, base: Path) -> None:
    lora = write_adapter(tmp_path / "lora", grown_vocabulary())
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    assert lm.verify(tmp_path / "m", undo=True)["undo"]["back"] == 6
    undo = tmp_path / "m" / "loramerge.undo"
    raw = bytearray(undo.read_bytes())
    original = weights()["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    raw[raw.index(original) + 3] ^= 4
    undo.write_bytes(raw)
    report = lm.verify(tmp_path / "m", undo=True)
    assert not report["undo"]["ok"] and report["undo"]["tensors"] == ["lm_head.weight"]
    with pytest.raises(InputError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "u")
    assert caught.value.tensors == ("lm_head.weight",) and not (tmp_path / "u").exists()


@pytest.mark.parametrize("single", [False, True])
def test_verify_of_an_unmerge_and_of_a_switch(tmp_path: Path, base: Path, lora: Path, single: bool) -> None:
    end = ".safetensors" if single else ""
    if single:
        shutil.copy(base / "model.safetensors", tmp_path / "one.safetensors")
        base = tmp_path / "one.safetensors"
    m, s, u = (tmp_path / f"{name}{end}" for name in "msu")
    other = write_adapter(tmp_path / "other", factors(2))
    lm.merge(base, lora, m, reversible=True)
    lm.switch(m, other, s)
    lm.unmerge(s, u)
    for out, command in ((m, "merge"), (s, "switch"), (u, "unmerge")):
        report = lm.verify(out, base=base)
        assert report["ok"] and report["replayed"] and report["command"] == command, report
        if out != u:
            assert lm.verify(out, undo=True)["ok"]
    file = u if single else u / "model.safetensors"
    flip(file, "model.norm.weight")
    for report in (lm.verify(u), lm.verify(u, base=base)):
        assert not report["ok"] and report["differ"] == ["model.norm.weight"]


def test_verify_of_a_subtraction_tells_what_is_not_the_base(tmp_path: Path, base: Path) -> None:
    lora = write_adapter(tmp_path / "lora", factors(size=3.0))
    lm.merge(base, lora, tmp_path / "m")
    lm.unmerge(tmp_path / "m", tmp_path / "u", inexact=True)
    assert lm.verify(tmp_path / "u")["ok"]
    report = lm.verify(tmp_path / "u", base=base)
    exact, back = weights(), read(tmp_path / "u")
    assert report["differ"] == sorted(k for k in exact if not torch.equal(exact[k], back[k])) != []


# ----------------------------------------------------------------------------------------------- the measure


def test_ambiguity_counts_the_numbers_that_round_alike() -> None:
    # W near 1/4 has a unit of 2**-9 in bfloat16, M near 1 of 2**-7: four numbers round to one, five at a tie.
    W = torch.arange(0.25, 0.5, 2**-9, dtype=torch.float64)
    d = torch.full_like(W, 1.0)
    M = (W + d).to(torch.bfloat16)
    brute = [int((((W + 1.0) - m).abs() <= 2**-8).sum()) for m in M.double()]
    ambiguous, wrong = ambiguity(M, d)
    inside = [n for n, m in zip(brute, M.double(), strict=True) if 1.26 < m < 1.49]
    assert ambiguous == len(W) and set(inside) == {5}
    assert wrong == pytest.approx(len(W) * (1 - 1 / 5), rel=0.02)
    assert ambiguity(torch.ones(5), torch.zeros(5, dtype=torch.float64), slack=0) == (0, 0.0)
    assert ambiguity(torch.ones(0), torch.zeros(0, dtype=torch.float64)) == (0, 0.0)


def test_a_plan_is_made_without_writing(tmp_path: Path, base: Path, lora: Path) -> None:
    lm.merge(base, lora, tmp_path / "m", reversible=True)
    lm.merge(base, lora, tmp_path / "n")
    ways = {
        "undo file": lm.plan_unmerge(tmp_path / "m", tmp_path / "u"),
        "base": lm.plan_unmerge(tmp_path / "m", tmp_path / "u", base=base),
        "subtraction": lm.plan_unmerge(tmp_path / "n", tmp_path / "u", inexact=True),
    }
    for way, plan in ways.items():
        data = json.loads(json.dumps(plan.to_data()))
        assert data["way"] == way == plan.way and data["tensors_changed"] == 4
    switched = lm.plan_switch(tmp_path / "m", lora, tmp_path / "s").to_data()
    assert json.loads(json.dumps(switched))["tensors_changed"] == 4
    assert not (tmp_path / "u").exists() and not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------ other forms of models


def test_a_padded_layer_comes_back_from_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"img_in.weight": torch.randn(6, 4), "img_in.bias": torch.randn(6)}
    own["double_blocks.0.img_mod.lin.weight"] = torch.randn(6, 6)
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    own[norm] = torch.ones(4)
    save_file(own, tmp_path / "base.safetensors")
    wide = {"img_in.lora_A.weight": torch.randn(2, 8), "img_in.lora_B.weight": torch.randn(6, 2)}
    wide["img_in.lora_B.bias"] = torch.randn(6)
    wide |= {f"double_blocks.0.img_mod.lin.lora_{x}.weight": torch.randn(s) for x, s in (("A", (2, 6)), ("B", (6, 2)))}
    save_file(wide | {norm: torch.randn(4)}, tmp_path / "control.safetensors")  # the norm is replaced
    m, u = tmp_path / "m.safetensors", tmp_path / "u.safetensors"
    lm.merge(tmp_path / "base.safetensors", tmp_path / "control.safetensors", m)
    assert load_file(m)["img_in.weight"].shape == (6, 8)
    with pytest.raises(UnsupportedError) as caught:
        lm.unmerge(m, u, inexact=True)
    assert (caught.value.code, set(caught.value.tensors)) == ("unmerge.not-additive", {"img_in.weight", norm})
    receipt = lm.unmerge(m, u, base=tmp_path / "base.safetensors")
    assert u.read_bytes() == (tmp_path / "base.safetensors").read_bytes()
    assert set(receipt.data["unproved"]) == {"img_in.weight", norm} and receipt.data["proved"] == 2


def test_replicated_layers_go_with_the_base(tmp_path: Path, base: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = factors()
    for name in PROJECTIONS:
        at = f"base_model.model.model.layers.2.self_attn.{name}"
        tensors |= {f"{at}.lora_A.weight": torch.randn(RANK, COLS), f"{at}.lora_B.weight": torch.randn(ROWS, RANK)}
    lora = write_adapter(tmp_path / "lora", tensors, layer_replication=[[0, 1], [0, 2]])
    lm.merge(base, lora, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 3
    lm.unmerge(tmp_path / "m", tmp_path / "u", base=base)
    assert all_files(tmp_path / "u") == all_files(base)
    with pytest.raises(UnsupportedError) as caught:
        lm.unmerge(tmp_path / "m", tmp_path / "v", inexact=True)
    assert caught.value.code == "unmerge.not-additive"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Two components, one of which an adapter changes."""
    root = tmp_path / "pipeline"
    projection = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    for file, tensors in (
        ("unet/diffusion_pytorch_model.safetensors", {projection: torch.randn(8, 8)}),
        ("text_encoder/model.safetensors", {"text_model.final_layer_norm.weight": torch.ones(8)}),
    ):
        (root / file).parent.mkdir(parents=True)
        save_file(tensors, root / file)
        (root / file).with_name("config.json").write_text("{}")
    (root / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": ["transformers", "CLIPTextModel"],
            }
        )
    )
    return root


@pytest.mark.parametrize("way", ["undo file", "base", "subtraction"])
def test_a_pipeline(tmp_path: Path, pipeline: Path, way: str) -> None:
    at = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{at}.lora_A.weight": torch.randn(2, 8), f"{at}.lora_B.weight": torch.randn(8, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    lm.merge(pipeline, tmp_path / "lora.safetensors", tmp_path / "m", reversible=way == "undo file")
    options: dict[str, Any] = {"base": {"base": pipeline}, "subtraction": {"inexact": True}}.get(way, {})
    receipt = lm.unmerge(tmp_path / "m", tmp_path / "u", **options)
    assert receipt.data["way"] == way and lm.verify(tmp_path / "u")["ok"]
    if way == "subtraction":
        assert all_files(tmp_path / "u").keys() == all_files(pipeline).keys()
        return
    assert all_files(tmp_path / "u") == all_files(pipeline)
    if way == "base":
        (tmp_path / "pipeline" / "model_index.json").rename(tmp_path / "elsewhere.json")
        with pytest.raises(LoramergeError):
            lm.unmerge(tmp_path / "m", tmp_path / "v", base=pipeline)
