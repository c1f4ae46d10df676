"""loralib files (no config, bare ``lora_A``/``lora_B``): truth is loralib's own merged weight in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import transformers
from peft_oracle import check, round_to, same_bits
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from zoo import read_json, read_tensors

import loramerge as lm

ALPHA = 11


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """float32 values everywhere, none of them zero, held in a float64 module in training mode (unmerged)."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double().train()


def write(model: nn.Module, folder: Path, bias: str = "none") -> tuple[Path, Path]:
    """The base tensors as one safetensors file and loralib's adapter file beside it, both float32."""
    start = {key: value.float().contiguous() for key, value in model.state_dict().items() if "lora_" not in key}
    save_file(start, folder / "base.safetensors", {"format": "pt"})
    factors = {key: value.float() for key, value in loralib.lora_state_dict(model, bias=bias).items()}
    torch.save(factors, folder / "lora.bin")
    return folder / "base.safetensors", folder / "lora.bin"


def merged(model: nn.Module) -> dict[str, Tensor]:
    """loralib merges on ``eval()``."""
    model.eval()
    return {key: value.detach().clone() for key, value in model.state_dict().items() if "lora_" not in key}


class Net(nn.Module):
    """One of each layer kind that needs no further word, next to plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(6, 5)
        self.tall = loralib.Linear(6, 10, r=4, lora_alpha=ALPHA)
        self.wide = loralib.Linear(12, 6, r=3, lora_alpha=ALPHA)
        self.square = loralib.Linear(8, 8, r=1, lora_alpha=ALPHA)
        self.words = loralib.Embedding(23, 6, r=2, lora_alpha=ALPHA)


def test_linear_and_embedding(tmp_path: Path) -> None:
    model = trained(Net())
    base, adapter = write(model, tmp_path)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    truth = merged(model)
    for name, rank in (("tall", 4), ("wide", 3), ("square", 1), ("words", 2)):
        delta = start[f"{name}.lora_B"] @ start[f"{name}.lora_A"] * ALPHA / rank
        wanted = start[f"{name}.weight"] + (delta.T if name == "words" else delta)
        assert torch.allclose(truth[f"{name}.weight"], wanted, rtol=0, atol=1e-14), name
    lm.merge(base, adapter, tmp_path / "out.safetensors", alpha=ALPHA, allow_pickle=True)
    check(tmp_path / "out.safetensors", truth, base)


def test_weight_multiplies_the_scale(tmp_path: Path) -> None:
    model = trained(Net())
    base, adapter = write(model, tmp_path)
    truth = {key: value.double() for key, value in read_tensors(base).items()}
    for key, value in merged(model).items():
        if not torch.allclose(value, truth[key]):
            truth[key] -= 0.4 * (value - truth[key])
    lm.merge(base, {adapter: -0.4}, tmp_path / "out.safetensors", alpha=ALPHA, allow_pickle=True)
    check(tmp_path / "out.safetensors", truth, base)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_adapter_replace_the_bases(bias: str, tmp_path: Path) -> None:
    model = trained(Net())
    base, _ = write(model, tmp_path)
    moved = trained(Net(), seed=1)
    frozen = {key: value for key, value in model.state_dict().items() if key.endswith("weight")}
    moved.load_state_dict(frozen, strict=False)
    torch.save({k: v.float() for k, v in loralib.lora_state_dict(moved, bias=bias).items()}, tmp_path / "l.bin")
    truth = merged(moved)
    if bias == "lora_only":
        truth["plain.bias"] = model.state_dict()["plain.bias"]
    lm.merge(base, tmp_path / "l.bin", tmp_path / "out.safetensors", alpha=ALPHA, allow_pickle=True)
    check(tmp_path / "out.safetensors", truth, base)


PATTERNS = [
    pattern for slots in (2, 3, 4) for pattern in itertools.product((True, False), repeat=slots) if any(pattern)
]


def slots(pattern: tuple[bool, ...]) -> str:
    return "".join("T" if enabled else "F" for enabled in pattern)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=slots)
def test_merged_linear(pattern: tuple[bool, ...], conv1d: bool, tmp_path: Path) -> None:
    """``conv1d``: the weight is stored (in, out), as the layers of GPT-2 are."""
    rank, rows, width = 2, 5, 9
    net = nn.Module()
    path = nn.Module()
    path.c_attn = loralib.MergedLinear(
        width,
        rows * len(pattern),
        r=rank,
        lora_alpha=ALPHA,
        enable_lora=list(pattern),
        fan_in_fan_out=conv1d,
    )
    net.attn = path
    model = trained(net)
    base, adapter = write(model, tmp_path)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    truth = merged(model)
    wanted = start["attn.c_attn.weight"].T.clone() if conv1d else start["attn.c_attn.weight"].clone()
    a, b = start["attn.c_attn.lora_A"], start["attn.c_attn.lora_B"]
    enabled = [slot for slot, on in enumerate(pattern) if on]
    for j, slot in enumerate(enabled):
        delta = b[j * rows : (j + 1) * rows] @ a[j * rank : (j + 1) * rank]
        wanted[slot * rows : (slot + 1) * rows] += ALPHA / rank * delta
    wanted = wanted.T if conv1d else wanted
    assert torch.allclose(truth["attn.c_attn.weight"], wanted, rtol=0, atol=1e-14)
    out = tmp_path / "out.safetensors"
    lm.merge(base, adapter, out, alpha=ALPHA, allow_pickle=True, enable_lora=list(pattern))
    check(out, truth, base)


@pytest.mark.parametrize("inner", [True, False], ids=["loralib-names", "plain-names"])
@pytest.mark.parametrize(
    ("channels", "kernel", "groups"), [((6, 8), 3, 1), ((4, 4), 1, 1), ((4, 10), 5, 1), ((6, 8), 3, 2)]
)
def test_convolution(channels: tuple[int, int], kernel: int, groups: int, inner: bool, tmp_path: Path) -> None:
    """loralib keeps the convolution as ``X.conv``; the checkpoint before loralib calls it ``X``."""
    net = nn.Module()
    net.down = loralib.Conv2d(*channels, kernel, r=2, lora_alpha=ALPHA, groups=groups)
    model = trained(net)
    base, adapter = write(model, tmp_path)
    factors = torch.load(adapter, weights_only=True)
    assert set(factors) == {"down.lora_A", "down.lora_B"}
    delta = factors["down.lora_B"].double() @ factors["down.lora_A"].double()
    start = model.state_dict()["down.conv.weight"].clone()
    truth = merged(model)
    wanted = start + ALPHA / 2 * delta.view(start.shape)
    assert torch.allclose(truth["down.conv.weight"], wanted, rtol=0, atol=1e-14)
    if not inner:
        truth = {key.replace(".conv.", "."): value for key, value in truth.items()}
        start_file = {key.replace(".conv.", "."): value for key, value in read_tensors(base).items()}
        save_file(start_file, base, {"format": "pt"})
    lm.merge(base, adapter, tmp_path / "out.safetensors", alpha=ALPHA, allow_pickle=True)
    check(tmp_path / "out.safetensors", truth, base)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_gpt2_names_with_and_without_prefix(prefix: str, tmp_path: Path) -> None:
    """The released GPT-2 adapters say ``[module.]transformer.h.N``, the original GPT-2 file ``h.N``."""
    net = nn.Module()
    net.c_attn = loralib.MergedLinear(
        8, 24, r=2, lora_alpha=ALPHA, enable_lora=[True, False, True], fan_in_fan_out=True
    )
    model = trained(net)
    factors = {key: value.float() for key, value in loralib.lora_state_dict(model).items()}
    torch.save(
        {f"{prefix}transformer.h.0.attn.{key}": value for key, value in factors.items()},
        tmp_path / "lora.bin",
    )
    start = {key: value.float() for key, value in model.state_dict().items() if "lora_" not in key}
    file = {f"h.0.attn.{key}": value.contiguous() for key, value in start.items()}
    save_file({**file, "wte.weight": torch.ones(7, 8)}, tmp_path / "base.safetensors", {"format": "pt"})
    truth = {f"h.0.attn.{key}": value for key, value in merged(model).items()}
    truth["wte.weight"] = torch.ones(7, 8).double()
    lm.merge(
        tmp_path / "base.safetensors",
        tmp_path / "lora.bin",
        tmp_path / "out.safetensors",
        alpha=ALPHA,
        allow_pickle=True,
        enable_lora=[True, False, True],
    )
    check(tmp_path / "out.safetensors", truth, tmp_path / "base.safetensors")


# --- what must not pass ---------------------------------------------------------------------------


def test_alpha_must_be_given(tmp_path: Path) -> None:
    base, adapter = write(trained(Net()), tmp_path)
    with pytest.raises(lm.errors.LoramergeError) as caught:
        lm.merge(base, adapter, tmp_path / "out.safetensors", allow_pickle=True)
    assert caught.value.exit_code in (2, 3)
    assert "alpha" in f"{caught.value.message} {caught.value.fix}"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pickle_needs_permission(tmp_path: Path) -> None:
    base, adapter = write(trained(Net()), tmp_path)
    with pytest.raises(lm.errors.UnsafeError):
        lm.merge(base, adapter, tmp_path / "out.safetensors", alpha=ALPHA)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_whole_model_saved_in_eval_mode_is_refused(tmp_path: Path) -> None:
    """Its weights hold the update already; merging would count it twice."""
    model = trained(Net())
    base, _ = write(model, tmp_path)
    model.eval()
    torch.save({key: value.float() for key, value in model.state_dict().items()}, tmp_path / "all.bin")
    with pytest.raises(lm.errors.LoramergeError) as caught:
        lm.merge(base, tmp_path / "all.bin", tmp_path / "out.safetensors", alpha=ALPHA, allow_pickle=True)
    assert caught.value.exit_code == 3


# --- the authors' own adapter ---------------------------------------------------------------------

MNLI = Path(__file__).resolve().parents[3] / "shared" / "data" / "roberta_base_lora_mnli.bin"


def save_roberta(cls: str, folder: Path, dtype: torch.dtype, **head: Any) -> Path:
    """RoBERTa-base in shape (12 layers of 768) with a small random vocabulary."""
    config = transformers.RobertaConfig(
        vocab_size=1000, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, dtype=dtype, **head
    )
    with no_init_weights():
        model = getattr(transformers, cls)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not MNLI.exists(), reason="the shared data folder is not beside this checkout")
@pytest.mark.parametrize(
    ("cls", "head", "dtype"),
    [
        ("RobertaForMaskedLM", {}, torch.bfloat16),
        ("RobertaForSequenceClassification", {"num_labels": 3}, torch.float32),
    ],
    ids=["base-without-head", "base-with-head"],
)
def test_released_mnli_adapter(cls: str, head: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base, out = save_roberta(cls, tmp_path / "base", dtype, **head), tmp_path / "out"
    factors = torch.load(MNLI, weights_only=True, map_location="cpu")
    heads = {key: value for key, value in factors.items() if key.startswith("classifier.")}
    modules = [key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")]
    assert len(modules) == 24 and len(heads) == 4 and len(factors) == 2 * 24 + 4
    lm.merge(base, MNLI, out, alpha=16, allow_pickle=True)
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(out / "model.safetensors", "pt") as after,
    ):
        assert set(after.keys()) == set(before.keys()) | heads.keys()
        wrong, elements = 0, 0
        for name in sorted(after.keys()):
            got = after.get_tensor(name)
            module = name.removesuffix(".weight")
            if module in modules:
                a, b = (factors[f"{module}.lora_{side}"].double() for side in "AB")
                start = before.get_tensor(name)
                truth = start.double() + 16 / 8 * (b @ a)
                assert got.dtype == dtype and got.shape == start.shape
                assert not torch.equal(got, start), name
                if dtype == torch.float32:
                    assert (got.double() - truth).abs().max() <= 1e-6 * truth.abs().max(), name
                else:
                    wrong += int((got.double() != round_to(truth, dtype)).sum())
                    elements += got.numel()
            elif name in heads:
                assert got.shape == heads[name].shape
                assert got.dtype == torch.float32 and torch.equal(got, heads[name]), name
            else:
                assert same_bits(got, before.get_tensor(name)), name
    assert wrong <= 1e-4 * elements
    assert len(read_json(out).get("id2label", {0: "", 1: ""})) == 3
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    assert type(model).__name__ == "RobertaForSequenceClassification"
    state = model.state_dict()
    for key, value in heads.items():
        assert torch.equal(state[key], value), key
