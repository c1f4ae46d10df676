"""Adapters of image and video models in every naming, merged into both layouts of their base.

The truth: the formula on the tensors as the adapter names them, carried to the names of diffusers by diffusers' own
converters.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from image_zoo import NETWORKS, State, flux1, randomised, sdxl_pipeline, single_file, unet15
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loramerge as lm
from loramerge.errors import MismatchError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

torch.set_num_threads(1)

Write = Callable[[str, Tensor, Tensor, float], State]
"""(module, A, B, alpha) -> the keys of one module in some dialect."""


class Model:
    """A tiny network, its tensors in both layouts (float64), and the way from the single file's to diffusers'."""

    def __init__(self, name: str) -> None:
        self.table, self.folder, make, self._convert = NETWORKS[name]
        self._model = make()
        self.hf = {key: tensor.double() for key, tensor in randomised(self._model).items()}
        self.ldm = single_file(self.hf, {self.folder: ""})

    def converted(self, ldm: Mapping[str, Tensor]) -> State:
        return self._convert({key: tensor.clone() for key, tensor in ldm.items()}, self._model)

    def modules(self, side: str) -> list[str]:
        """Every module with a weight that low-rank factors can change."""
        state = self.hf if side == "hf" else self.ldm
        return [key.removesuffix(".weight") for key, t in state.items() if key.endswith(".weight") and t.dim() > 1]

    def bases(self) -> dict[str, tuple[State, Callable[[Mapping[str, Tensor]], State]]]:
        """Every way of storing it, each with the way back to the bare names of diffusers."""

        def without(head: str) -> Callable[[Mapping[str, Tensor]], State]:
            return lambda state: {key.removeprefix(head): tensor for key, tensor in state.items()}

        return {
            "bare folder": (self.hf, dict),
            "pipeline": ({f"{self.folder}/{k}": t for k, t in self.hf.items()}, without(f"{self.folder}/")),
            "bare single file": (self.ldm, self.converted),
            "single file": (
                {f"model.diffusion_model.{k}": t for k, t in self.ldm.items()},
                lambda state: self.converted(without("model.diffusion_model.")(state)),
            ),
        }


def pair(weight: Tensor, rank: int, *, conv: bool = True) -> tuple[Tensor, Tensor]:
    """A and B of a linear or a convolution."""
    kernel = weight.shape[2:] if conv else ()
    A = torch.randn(rank, weight.shape[1], *kernel, dtype=torch.float64)
    return A, torch.randn(weight.shape[0], rank, *(1 for _ in kernel), dtype=torch.float64)


def product(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    return (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)


def kohya(prefix: str) -> Write:
    return lambda module, A, B, alpha: {
        f"{prefix}{module.replace('.', '_')}.lora_down.weight": A,
        f"{prefix}{module.replace('.', '_')}.lora_up.weight": B,
        f"{prefix}{module.replace('.', '_')}.alpha": torch.tensor(alpha),
    }


def dotted(prefix: str, *, alpha_key: bool = False) -> Write:
    def write(module: str, A: Tensor, B: Tensor, alpha: float) -> State:
        keys = {f"{prefix}{module}.lora_A.weight": A, f"{prefix}{module}.lora_B.weight": B}
        return {**keys, f"{prefix}{module}.alpha": torch.tensor(alpha)} if alpha_key else keys

    return write


NAMINGS: list[tuple[str, str, Write, bool]] = [
    ("kohya, original names", "ldm", kohya("lora_unet_"), True),
    ("kohya, names of diffusers", "hf", kohya("lora_unet_"), True),
    ("lycoris", "hf", kohya("lycoris_"), True),
    ("diffusers", "hf", dotted("{folder}."), False),
    ("diffusers, wrapped twice", "hf", dotted("{folder}.base_model.model."), False),
    ("comfyui", "ldm", dotted("diffusion_model.", alpha_key=True), True),
    ("aitoolkit", "hf", dotted("diffusion_model."), False),
]


def check(model: Model, keys: State, want: State, path: Path, tolerance: float = 1e-12) -> None:
    """Merges one file into every base; all must give `want` (names of diffusers), and only where it changes."""
    save_file({key: tensor.contiguous() for key, tensor in keys.items()}, path)
    for where, (base, back) in model.bases().items():
        merged = back(lm.merge_tensors(base, path, compute_dtype="float64"))
        assert merged.keys() == want.keys()
        for key, tensor in want.items():
            scale = float(tensor.abs().max()) if tensor.numel() else 0
            assert float((merged[key] - tensor).abs().max()) <= tolerance * scale, (where, key)
            if torch.equal(tensor, model.hf[key]):
                assert torch.equal(merged[key], tensor), (where, key)


@pytest.mark.parametrize(("naming", "side", "write", "scaled"), NAMINGS, ids=[n[0] for n in NAMINGS])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_pairs_on_every_layer_land_in_both_layouts(
    name: str, naming: str, side: str, write: Write, scaled: bool, tmp_path: Path
) -> None:
    model = Model(name)
    torch.manual_seed(1)
    keys: State = {}
    changed = dict(model.hf if side == "hf" else model.ldm)
    for i, module in enumerate(model.modules(side)):
        weight, rank = changed[f"{module}.weight"], 1 + i % 3
        A, B = pair(weight, rank)
        alpha = 0.5 + i % 4
        keys |= {key.replace("{folder}", model.folder): t for key, t in write(module, A, B, alpha).items()}
        changed[f"{module}.weight"] = weight + (alpha / rank if scaled else 1.0) * product(A, B, weight)
    check(model, keys, changed if side == "hf" else model.converted(changed), tmp_path / "adapter.safetensors")


def test_an_xlabs_file(tmp_path: Path) -> None:
    model = Model("flux1")
    torch.manual_seed(2)
    keys, changed = {}, dict(model.ldm)
    rows = {f"single_blocks.{i}.processor.qkv_lora": (f"single_blocks.{i}.linear1", 48) for i in range(3)}
    rows |= {f"single_blocks.{i}.processor.proj_lora": (f"single_blocks.{i}.linear2", 16) for i in range(3)}
    for i in range(2):
        for n, stream in ((1, "img"), (2, "txt")):
            rows[f"double_blocks.{i}.processor.qkv_lora{n}"] = (f"double_blocks.{i}.{stream}_attn.qkv", 48)
            rows[f"double_blocks.{i}.processor.proj_lora{n}"] = (f"double_blocks.{i}.{stream}_attn.proj", 16)
    for processor, (module, height) in rows.items():
        weight = changed[f"{module}.weight"].clone()
        A, B = pair(weight[:height], 2)
        weight[:height] += B @ A
        changed[f"{module}.weight"] = weight
        keys |= {f"{processor}.down.weight": A, f"{processor}.up.weight": B}
    check(model, keys, model.converted(changed), tmp_path / "xlabs.safetensors")


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_a_file_of_old_attention_processors(prefix: str, tmp_path: Path) -> None:
    model = Model("sd15")
    torch.manual_seed(3)
    keys, want = {}, dict(model.hf)
    for module in model.modules("hf"):
        head, _, attention = module.partition(".attn")
        number, _, what = attention.partition(".")
        if what not in ("to_q", "to_k", "to_v", "to_out.0"):
            continue
        weight = want[f"{module}.weight"]
        A, B = pair(weight, 2)
        want[f"{module}.weight"] = weight + B @ A
        processor = f"{prefix}{head}.attn{number}.processor.{what.removesuffix('.0')}_lora"
        keys |= {f"{processor}.down.weight": A, f"{processor}.up.weight": B}
    assert len(keys) == 2 * 4 * 2 * 16
    check(model, keys, want, tmp_path / "processors.safetensors")


def test_a_control_lora_with_biases_and_norms(tmp_path: Path) -> None:
    """Black Forest Labs' naming: pairs, `lora_B.bias`, replaced norms, all on the original layout."""
    model = Model("flux1")
    torch.manual_seed(4)
    keys: State = {}
    changed = dict(model.ldm)
    for module in model.modules("ldm"):
        weight, bias = changed[f"{module}.weight"], changed[f"{module}.bias"]
        A, B = pair(weight, 2)
        b = torch.randn_like(bias)
        changed |= {f"{module}.weight": weight + B @ A, f"{module}.bias": bias + b}
        keys |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B, f"{module}.lora_B.bias": b}
    for key in [k for k in changed if k.endswith("_norm.scale")]:
        keys[key] = changed[key] = torch.randn_like(changed[key])
    check(model, keys, model.converted(changed), tmp_path / "control.safetensors")


def test_differences_of_weights_biases_and_norms(tmp_path: Path) -> None:
    model = Model("flux1")
    torch.manual_seed(5)
    keys: State = {}
    changed = dict(model.ldm)
    for module in ("single_blocks.0.linear1", "double_blocks.1.txt_attn.qkv", "final_layer.adaLN_modulation.1"):
        for leaf, suffix in (("weight", "diff"), ("bias", "diff_b")):
            diff = torch.randn_like(changed[f"{module}.{leaf}"])
            keys[f"diffusion_model.{module}.{suffix}"] = diff
            changed[f"{module}.{leaf}"] = changed[f"{module}.{leaf}"] + diff
    check(model, keys, model.converted(changed), tmp_path / "diff.safetensors")


def locon(*args: Any, **config: Any) -> nn.Module:
    return LoConModule(*args, weight_decompose=True, **config)


def loha(*args: Any, **config: Any) -> nn.Module:
    return LohaModule(*args, **config)


def lokr(*args: Any, **config: Any) -> nn.Module:
    return LokrModule(*args, factor=4, **config)


def oft(*args: Any, **config: Any) -> nn.Module:
    return DiagOFTModule(*args, **config)


def input_dora(*args: Any, **config: Any) -> nn.Module:
    return LoConModule(*args, weight_decompose=True, wd_on_out=False, **config)


def trained(make: Callable[..., nn.Module], weight: Tensor, name: str) -> tuple[State, Tensor]:
    """What LyCORIS saves for a linear with this weight after training, and the weight that its forward computes."""
    dtype = torch.float32 if make is oft else torch.float64  # its forward pass knows no other
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(dtype)
    linear.weight.data.copy_(weight)
    module: Any = make("x", linear, lora_dim=4, alpha=2.0).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter is not linear.weight:
                parameter.add_(0.3 * torch.randn_like(parameter))
        seen = module.forward(torch.eye(weight.shape[1], dtype=dtype)).T.double()
    saved = {f"{name}.{key}": t.detach().clone() for key, t in module.state_dict().items()}
    return saved, seen.detach()


NON_LINEAR = [locon, input_dora, loha, lokr, oft]
FUSED = {
    "flux1": [
        "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.qkv", "single_blocks.1.linear1",
        "single_blocks.1.linear2", "final_layer.adaLN_modulation.1",
    ],
    "sd3": ["joint_blocks.0.x_block.attn2.qkv", "joint_blocks.2.context_block.adaLN_modulation.1"],
    "hunyuan_video": ["single_blocks.0.linear1", "txt_in.individual_token_refiner.blocks.1.self_attn_qkv"],
    "z_image": ["layers.1.attention.qkv", "context_refiner.0.attention.out"],
}  # fmt: skip
SPLIT = {
    "flux1": [
        "transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.add_v_proj", "norm_out.linear",
        "single_transformer_blocks.1.attn.to_v", "single_transformer_blocks.1.proj_mlp",
    ],
    "sd3": ["transformer_blocks.1.attn2.to_q", "transformer_blocks.2.norm1_context.linear"],
    "hunyuan_video": ["single_transformer_blocks.1.proj_mlp", "transformer_blocks.1.attn.to_q"],
    "z_image": ["layers.0.attention.to_k", "layers.0.attention.to_v"],
}  # fmt: skip


@pytest.mark.parametrize("make", NON_LINEAR, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", list(FUSED))
@pytest.mark.parametrize("side", ["ldm", "hf"])
def test_kinds_that_need_the_whole_weight_get_it(
    name: str, side: str, make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Fused adapters on split bases and split adapters on fused ones: rotations, norms and products of one module."""
    model = Model(name)
    torch.manual_seed(6)
    keys: State = {}
    changed = dict(model.hf if side == "hf" else model.ldm)
    for module in (SPLIT if side == "hf" else FUSED)[name]:
        flat = f"lora_unet_{module.replace('.', '_')}"
        saved, weight = trained(make, changed[f"{module}.weight"], flat)
        assert float((weight - changed[f"{module}.weight"]).abs().max()) > 1e-3
        keys |= saved
        changed[f"{module}.weight"] = weight
    want = changed if side == "hf" else model.converted(changed)
    check(model, keys, want, tmp_path / "adapter.safetensors", 4e-6)  # LyCORIS rounds its scales to float32


def test_text_encoders_of_a_kohya_file_land_in_both_layouts(tmp_path: Path) -> None:
    folders, single = sdxl_pipeline(True)
    torch.manual_seed(7)
    keys: State = {}
    want = dict(folders)
    for name, weight in folders.items():
        folder, _, path = name.partition("/")
        if not folder.startswith("text_encoder") or ".layers." not in path or weight.dim() != 2:
            continue
        A, B = (t.float() for t in pair(weight, 2))
        prefix = "lora_te1_" if folder == "text_encoder" else "lora_te2_"
        keys |= kohya(prefix)(path.removesuffix(".weight"), A, B, 1.0)
        want[name] = (weight.double() + 0.5 * product(A.double(), B.double(), weight)).float()
    save_file({key: t.contiguous() for key, t in keys.items()}, tmp_path / "te.safetensors")
    merged = lm.merge_tensors(folders, tmp_path / "te.safetensors", compute_dtype="float64")
    assert all(torch.equal(merged[name], tensor) for name, tensor in want.items())
    one = lm.merge_tensors(single, tmp_path / "te.safetensors", compute_dtype="float64")
    head = "conditioner.embedders.1.model.transformer.resblocks.2."
    own = "text_encoder_2/text_model.encoder.layers.2."
    fused = torch.cat([want[f"{own}self_attn.{p}.weight"] for p in ("q_proj", "k_proj", "v_proj")])
    assert torch.equal(one[f"{head}attn.in_proj_weight"], fused)
    assert torch.equal(one[f"{head}mlp.c_fc.weight"], want[f"{own}mlp.fc1.weight"])
    plain = "text_model.encoder.layers.1.self_attn.v_proj.weight"
    assert torch.equal(one[f"conditioner.embedders.0.transformer.{plain}"], want[f"text_encoder/{plain}"])
    changed = {name for name, tensor in single.items() if not torch.equal(tensor, one[name])}
    # q, k and v of the second text encoder lie in one tensor: 6 modules in 4 tensors a layer
    assert len(changed) == 2 * 6 + 3 * 4


def test_several_adapters_in_different_namings_add_up(tmp_path: Path) -> None:
    model = Model("flux1")
    torch.manual_seed(8)
    fused, split = "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_k"
    A, B = pair(model.ldm[f"{fused}.weight"], 2)
    C, D = pair(model.hf[f"{split}.weight"], 3)
    save_file(kohya("lora_unet_")(fused, A, B, 2.0), tmp_path / "one.safetensors")
    save_file(dotted("transformer.")(split, C, D, 0), tmp_path / "two.safetensors")
    want = model.converted({**model.ldm, f"{fused}.weight": model.ldm[f"{fused}.weight"] + 0.7 * B @ A})
    want[f"{split}.weight"] = want[f"{split}.weight"] - 0.3 * D @ C
    for base, back in model.bases().values():
        adapters = {tmp_path / "one.safetensors": 0.7, tmp_path / "two.safetensors": -0.3}
        merged = back(lm.merge_tensors(base, adapters, compute_dtype="float64"))
        torch.testing.assert_close(merged, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [locon, lokr, oft], ids=lambda make: make.__name__)
def test_a_fused_adapter_streams_into_a_split_base_of_several_files(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = Model("flux1")
    torch.manual_seed(9)
    module = "single_blocks.1.linear1"
    keys, weight = trained(make, model.ldm[f"{module}.weight"], f"lora_unet_{module.replace('.', '_')}")
    save_file({key: t.contiguous() for key, t in keys.items()}, tmp_path / "adapter.safetensors")
    base = tmp_path / "transformer"
    base.mkdir()
    names = sorted(model.hf, key=lambda name: name.rpartition(".")[0][::-1])  # q, k, v and mlp in different files
    shards = {f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in shards.items():
        save_file({name: model.hf[name] for name in held}, base / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (base / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    lm.merge(base, tmp_path / "adapter.safetensors", tmp_path / "out", compute_dtype="float64")
    want = model.converted({**model.ldm, f"{module}.weight": weight})
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    touched = {f"single_transformer_blocks.1.{part}.weight" for part in parts}
    assert len({index["weight_map"][name] for name in touched}) > 1
    for file in shards:
        for name, tensor in load_file(tmp_path / "out" / file).items():
            assert torch.equal(tensor, model.hf[name]) == (name not in touched)
            assert float((tensor - want[name]).abs().max()) <= 4e-6 * float(want[name].abs().max()), name


def test_a_file_for_another_family_matches_nothing(tmp_path: Path) -> None:
    unet = randomised(unet15())
    A, B = pair(torch.zeros(48, 16), 2)
    save_file(kohya("lora_unet_")("double_blocks.0.img_attn.qkv", A, B, 2.0), tmp_path / "flux.safetensors")
    with pytest.raises(MismatchError) as caught:
        lm.merge_tensors(unet, tmp_path / "flux.safetensors")
    assert caught.value.code == "adapter.no-match"


def test_factors_that_do_not_fit_their_rows_are_an_error(tmp_path: Path) -> None:
    state = randomised(flux1())
    A, B = pair(torch.zeros(47, 16), 2)
    save_file(dotted("diffusion_model.")("double_blocks.0.img_attn.qkv", A, B, 2.0), tmp_path / "bad.safetensors")
    with pytest.raises(MismatchError) as caught:
        lm.merge_tensors(state, tmp_path / "bad.safetensors")
    assert caught.value.code == "adapter.shape"
