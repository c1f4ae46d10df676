"""Every sort of update on weights that lie turned, packed or split: the same as on a checkpoint, number for number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs as g
import numpy as np
import peft
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_sites import close, refused

import loramerge as lm

Q, K = g.numbers(1, 8, 8), g.numbers(2, 8, 8)
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q", "k"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q", "k"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q", "k"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q", "k"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q", "k"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "k"], feedforward_modules=["k"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q", "k"], save_projection=True),
}
STORED = {
    "turned": [("a", Q.T), ("b", K.T)],
    "packed": [("a", np.concatenate([Q, K]).T)],
    "split": [("a", Q[:3].T), ("b", Q[3:].T), ("c", K.T)],
}


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        self.q.weight.data, self.k.weight.data = torch.from_numpy(Q.copy()), torch.from_numpy(K.copy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x)], dim=-1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_update(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(Both(), CONFIGS[kind]()).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "vera_lambda" in name:
            parameter.data = torch.randn_like(parameter) * 0.2 + (1.0 if kind in ("ia3", "dora") else 0.0)
    model.save_pretrained(tmp_path / "lora")
    x = g.numbers(9, 4, 8)
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()  # the adapter beside the weights, as it was trained
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"q.weight": Q, "k.weight": K})
    for way, stored in STORED.items():
        nodes = [g.linear("", "x", name, f"y_{name}") for name, _ in stored]
        nodes.append(helper.make_node("Concat", [f"y_{name}" for name, _ in stored], ["y"], axis=1))
        made = g.model(nodes, [g.tensor(n, v) for n, v in stored], {"x": [4, 8]})
        base = g.save(made, tmp_path / way / "m.onnx")
        lm.merge(base, tmp_path / "lora", tmp_path / f"{way}.onnx", checkpoint=checkpoint, reversible=True)
        close(g.run(tmp_path / f"{way}.onnx", {"x": x}), want.astype(float), 1e-5)
        (tmp_path / f"{way}-back").mkdir()
        lm.unmerge(tmp_path / f"{way}.onnx", tmp_path / f"{way}-back" / "m.onnx")
        assert (tmp_path / f"{way}-back" / "m.onnx").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("method", ["linear", "ties", "iso_c"])
def test_several_adapters_by_a_method(tmp_path: Path, method: str) -> None:
    """The result is that of the checkpoint, whichever way round the graph has the weights."""
    one = g.lora(tmp_path / "one", {"q": g.factors(3, 8, 8, 2), "k": g.factors(5, 8, 8, 1)})
    two = g.lora(tmp_path / "two", {"q": g.factors(7, 8, 8, 3), "k": g.factors(9, 8, 8, 2)})
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"q.weight": Q, "k.weight": K})
    nodes = [g.linear("/q/MatMul", "x", "a", "h"), g.linear("/k/MatMul", "h", "b", "y")]
    base = g.save(g.model(nodes, [g.tensor("a", Q.T), g.tensor("b", K.T)], {"x": [4, 8]}), tmp_path / "b" / "m.onnx")
    adapters = {str(one): 0.7, str(two): 0.6}
    lm.merge(base, adapters, tmp_path / "out.onnx", method=method)
    lm.merge(checkpoint, adapters, tmp_path / "out", method=method)
    with_names = lm.open_checkpoint(tmp_path / "out")
    for key, name in (("a", "q"), ("b", "k")):
        info = with_names.tensors[f"{name}.weight"]
        raw = info.file.source.read(info.info.begin, info.info.nbytes)
        close(g.weight(tmp_path / "out.onnx", key).T, np.frombuffer(raw, dtype="float32").reshape(8, 8).astype(float))
    with_names.close()


def test_bfloat16_weights(tmp_path: Path) -> None:
    W = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensor = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[5, 9])
    tensor.raw_data = W.T.contiguous().view(torch.int16).numpy().tobytes()
    made = g.model([g.linear("/fc/MatMul", "x", "w", "y")], [tensor], {"x": [4, 5]}, dtype=TensorProto.BFLOAT16)
    base = g.save(made, tmp_path / "base" / "m.onnx")
    pair = g.factors(3, 9, 5, 2)
    lm.merge(base, g.lora(tmp_path / "lora", {"fc": pair}), tmp_path / "out.onnx", reversible=True)
    exact = torch.from_numpy(W.double().numpy() + g.delta(pair)).bfloat16()
    got = g.weight(tmp_path / "out.onnx", "w")
    assert np.array_equal(got.astype("float32").T, exact.float().numpy())
    assert numpy_helper.to_array(tensor).shape == got.shape
    assert lm.verify(tmp_path / "out.onnx", undo=True)["ok"]


def test_a_method_does_not_change_copies_of_a_weight(tmp_path: Path) -> None:
    one, two = (g.lora(tmp_path / n, {"q": g.factors(i, 8, 8, 2)}) for n, i in (("one", 3), ("two", 5)))
    nodes = [g.linear("/q/MatMul", "x", "a", "h"), g.linear("/q/MatMul_1", "h", "b", "y")]
    base = g.save(g.model(nodes, [g.tensor("a", Q.T), g.tensor("b", Q.T)], {"x": [4, 8]}), tmp_path / "b" / "m.onnx")
    refused("onnx.copies", lm.merge, base, [one, two], out=tmp_path / "out.onnx", method="ties")
    lm.merge(base, [one, two], tmp_path / "out.onnx")
    assert np.array_equal(g.weight(tmp_path / "out.onnx", "a"), g.weight(tmp_path / "out.onnx", "b"))
