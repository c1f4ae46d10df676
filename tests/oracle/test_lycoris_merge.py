"""Files that LyCORIS writes, merged and held against the unmerged network: its training forward is the truth."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import loramerge as lm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lycoris = pytest.importorskip("lycoris")

ALGORITHMS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"use_tucker": True}),
    ("lora", {"dora_wd": True}),
    ("lora", {"dora_wd": True, "wd_on_out": False}),
    ("lora", {"rs_lora": True}),
    ("lora", {"use_scalar": True}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("loha", {"dora_wd": True}),
    ("lokr", {}),
    ("lokr", {"factor": 4}),
    ("lokr", {"factor": 2, "decompose_both": True}),
    ("lokr", {"factor": 4, "full_matrix": True}),
    ("lokr", {"factor": 4, "use_tucker": True}),
    ("lokr", {"dora_wd": True, "wd_on_out": False}),
    ("diag-oft", {}),
    ("diag-oft", {"rescaled": True}),
    ("diag-oft", {"constraint": 1e-3}),
    ("boft", {}),
    ("boft", {"rescaled": True}),
    ("glora", {}),
    ("ia3", {}),
    ("full", {}),
]


class Net(nn.Module):
    """One module of every sort that LyCORIS adapts; `square` tells nothing of its orientation by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "linear": nn.Linear(12, 32),
                "square": nn.Linear(16, 16),
                "down": nn.Linear(20, 8),
                "conv": nn.Conv2d(8, 16, 3),
                "pointwise": nn.Conv2d(8, 16, 1),
            }
        )


def trained(algorithm: str, options: dict[str, Any]) -> tuple[nn.Module, Net, dict[str, Tensor]]:
    """(adapted network, the bare one, what was saved), every trainable tensor moved off its start."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.manual_seed(3)
    bare = Net()
    adapted = Net()
    adapted.load_state_dict(bare.state_dict())
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    network = lycoris.create_lycoris(
        adapted, 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=4, conv_alpha=1.0, algo=algorithm, **options
    )
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    saved = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    return adapted, bare, saved


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS, ids=str)
def test_merged_weights_compute_what_was_trained(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    adapted, bare, saved = trained(algorithm, options)
    save_file(saved, tmp_path / "adapter.safetensors")
    merged = lm.merge_tensors(bare.state_dict(), tmp_path / "adapter.safetensors")
    before = bare.state_dict()
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert {name.removesuffix(".weight") for name in changed if name.endswith(".weight")} == {
        f"body.{name}" for name in bare.body
    }
    bare.load_state_dict(merged)
    for name, module in bare.body.items():
        wide = isinstance(module, nn.Conv2d)
        x = torch.randn((2, module.in_channels, 7, 7) if wide else (5, module.in_features))
        with torch.no_grad():
            wanted, got = adapted.get_submodule(f"body.{name}")(x), module(x)
        assert float((got - wanted).norm() / wanted.norm()) < 2e-6, name
