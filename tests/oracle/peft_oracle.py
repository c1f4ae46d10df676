"""The truth for PEFT adapters: PEFT's own layers in float64, read back under the names of the files.

transformers writes the published (old) names on ``save_pretrained``, so merging in memory in float64 and
saving gives the expected value of every tensor by its name on disk. A tied base is untied first where the
adapter changes one side only. Where PEFT's merge is not the function that was trained (several DoRA adapters,
replicated layers, tying ensured) the tests compute the formula. :func:`trained_outputs` gives the outputs of
the unmerged model, which every truth is held against.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import outputs, read_tensors

MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
LOWEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}


# --- adapters -------------------------------------------------------------------------------------


def train_like(model: nn.Module, config: LoraConfig, *, seed: int = 0, size: float = 0.1) -> PeftModel:
    """Wraps ``model`` and moves every trainable tensor as if trained: nothing stays zero or at its start."""
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            else:
                parameter.add_(size * noise)
    return peft_model.eval()


def save_adapter(peft_model: PeftModel, folder: Path, **options: Any) -> Path:
    peft_model.save_pretrained(folder, **options)
    return folder


def copy_adapter(source: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """The same adapter with its keys renamed; no two keys may fall together."""
    target.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    renamed = {rename(key): value for key, value in tensors.items()}
    assert len(renamed) == len(tensors)
    save_file(renamed, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return target


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A PEFT adapter written by hand, for layouts that the installed versions do not write any more."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    full = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(full, indent=2, sort_keys=True), encoding="utf-8")
    return folder


# --- models ---------------------------------------------------------------------------------------


def load_model(
    folder: Path, cls: str, dtype: torch.dtype = torch.float64, *, untie: bool = False, **changes: Any
) -> nn.Module:
    """A model in eval mode with plain attention and experts (the fused ones know no float64)."""
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": dtype, **changes}
    if getattr(transformers.AutoConfig.from_pretrained(folder), "num_experts_per_tok", None):
        options["experts_implementation"] = "eager"
    model = getattr(transformers, cls).from_pretrained(folder, **options).to(dtype).eval()
    if untie:
        tied_head = model.get_output_embeddings()
        assert tied_head.weight is model.get_input_embeddings().weight
        tied_head.weight = nn.Parameter(tied_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = None
        model.all_tied_weights_keys = {}
    return model


def with_adapter(model: nn.Module, folder: Path, weight: float = 1.0) -> PeftModel:
    """The adapter on ``model`` in float64, every tensor of its file proven to have arrived."""
    peft_model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).to(torch.float64)
    held = [parameter.detach() for _, parameter in peft_model.named_parameters()]
    held += [buffer for _, buffer in peft_model.named_buffers()]
    if (folder / "adapter_model.safetensors").exists():
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            wanted = value.double()
            arrived = (t.shape == wanted.shape and torch.equal(t.double(), wanted) for t in held)
            assert any(arrived), f"PEFT did not load {key}"
    if weight != 1.0:
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: scale * weight for name, scale in module.scaling.items()}
    return peft_model.eval()


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What ``save_pretrained`` would write, floating tensors in float64."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = read_tensors(Path(folder))
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def expected(
    base: Path, adapters: Mapping[Path, float], cls: str, *, untie: bool = False, **changes: Any
) -> dict[str, Tensor]:
    """Every tensor of the merged checkpoint by its name on disk, in float64.

    One adapter: PEFT's merge with the weight multiplied into the scale (so it acts on DoRA as in training).
    Several: the sum of the changes, which is right for the additive kinds only.
    """
    start = saved_tensors(load_model(base, cls, untie=untie, **changes))
    total = {key: value.clone() for key, value in start.items()}
    for adapter, weight in adapters.items():
        model = with_adapter(load_model(base, cls, untie=untie, **changes), adapter, weight)
        merged = saved_tensors(model.merge_and_unload(safe_merge=False))
        if len(adapters) == 1:
            return merged
        assert merged.keys() == total.keys()
        for key, value in merged.items():
            if value.is_floating_point():
                total[key] += value - start[key]
    return total


def trained_outputs(base: Path, adapter: Path, cls: str, inputs: dict[str, Tensor], **changes: Any) -> Tensor:
    """Outputs of the unmerged model in float64: the function that was trained."""
    return outputs(with_adapter(load_model(base, cls, **changes), adapter), inputs)


def lora_formula(base: Path, adapter: Path, module_to_disk: Callable[[str], str]) -> dict[str, Tensor]:
    """``W + alpha/r * B A`` in float64 straight from the two files, for plain linear layers only."""
    tensors = {key: value.double() for key, value in read_tensors(base).items()}
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = factors[key].double(), factors[key.replace("lora_A", "lora_B")].double()
        scale = config["lora_alpha"] / (math.sqrt(a.shape[0]) if config["use_rslora"] else a.shape[0])
        name = module_to_disk(module) + ".weight"
        tensors[name] = tensors[name] + scale * (b @ a)
    return tensors


# --- comparing ------------------------------------------------------------------------------------


def unit_in_last_place(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours in ``dtype`` around each float64 value."""
    _, exponent = torch.frexp(value)
    exponent = (exponent - 1).clamp(min=LOWEST_EXPONENT[dtype])
    return torch.ldexp(torch.ones_like(value), exponent - MANTISSA[dtype])


def round_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once, to nearest even, to the numbers of ``dtype``; the result is float64.

    ``Tensor.to`` goes through float32 and so rounds twice.
    """
    unit = unit_in_last_place(value, dtype)
    return torch.round(value / unit) * unit


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(
    out: Path,
    truth: Mapping[str, Tensor],
    base: Path,
    *,
    exact: bool = False,
) -> None:
    """Every tensor of ``out`` against ``truth``: names, shapes, dtypes and values.

    Tensors that the truth leaves alone must be the base's bytes. float32: within 1e-6 of the tensor's largest
    value. 16 bit: 99.99 % of all elements equal the float64 truth rounded once, the others are one unit away
    (plus what cancellation leaves of a float32 sum). ``exact``: all equal the truth rounded once.
    """
    got, before = read_tensors(out), read_tensors(base)
    assert got.keys() == truth.keys(), (
        f"missing: {sorted(truth.keys() - got.keys())}, unexpected: {sorted(got.keys() - truth.keys())}"
    )
    changed, differing, elements = 0, 0, 0
    for name, tensor in got.items():
        old = before.get(name)
        wanted = truth[name]
        assert tensor.shape == wanted.shape, f"{name}: {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
        if old is not None:
            assert tensor.dtype == old.dtype, f"{name}: {tensor.dtype}, not {old.dtype}"
            if old.shape == wanted.shape and torch.equal(old.to(wanted.dtype), wanted):
                assert same_bits(tensor, old), f"{name} was to stay as it is"
                continue
        changed += 1
        _assert_close(name, tensor, wanted, exact)
        if tensor.dtype in (torch.bfloat16, torch.float16):
            elements += tensor.numel()
            differing += int((tensor.double() != round_to(wanted, tensor.dtype)).sum())
    assert changed, "this truth changes nothing: the test would prove nothing"
    assert differing <= 1e-4 * elements, f"{differing} of {elements} elements are not the correctly rounded ones"


def _assert_close(name: str, tensor: Tensor, wanted: Tensor, exact: bool) -> None:
    assert tensor.is_floating_point(), name
    got, largest = tensor.double(), wanted.abs().max().item()
    if tensor.dtype == torch.float64:
        limit = torch.full_like(wanted, 1e-13 * largest)
    elif exact:
        limit = torch.zeros_like(wanted)
        wanted = round_to(wanted, tensor.dtype)
    elif tensor.dtype == torch.float32:
        limit = torch.full_like(wanted, 1e-6 * largest)
    else:
        # cancellation: the float32 sum is off by its own rounding, however small the result is
        limit = unit_in_last_place(wanted, tensor.dtype) + 1e-6 * largest
        wanted = round_to(wanted, tensor.dtype)
    worst = (got - wanted).abs() - limit
    assert bool((worst <= 0).all()), (
        f"{name}: {int((worst > 0).sum())} of {worst.numel()} elements are off, "
        f"by up to {(got - wanted).abs().max().item():.3g} (largest value {largest:.3g})"
    )


def renamed(tensors: Mapping[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(key): value for key, value in tensors.items()}
