"""Models of transformers as torch exports them: merged into the graph they equal the model with its adapter."""

from __future__ import annotations

from pathlib import Path

import exported as e
import numpy as np
import pytest

import loramerge as lm

# One exporter for each model here; tests/benchmarks/onnx_matrix.py has all of them.
CASES = [
    ("llama-tied", ("ts", "opt")),
    ("gpt2", ("raw", "ts")),
    ("bert", ("ts",)),
    ("vit", ("ts",)),
    ("t5", ("ts",)),
    ("deberta", ("ts",)),
]


@pytest.mark.parametrize(("name", "exporters"), CASES, ids=[name for name, _ in CASES])
def test_the_merged_graph_computes_what_was_trained(tmp_path: Path, name: str, exporters: tuple[str, ...]) -> None:
    model = e.base(name, tmp_path / "base")
    graphs = {how: e.export(model, name, how, tmp_path / how / "model.onnx") for how in exporters}
    without = {how: e.anonymised(path, tmp_path / f"{how}-anonymous" / "model.onnx") for how, path in graphs.items()}
    before = e.run(graphs[exporters[0]], name)
    want = e.adapted(model, name, tmp_path / "lora")
    assert np.abs(before - want).max() > 1e-3, "the adapter does nothing"
    for kind, paths in (("named", graphs), ("anonymous", without)):
        for how, path in paths.items():
            out = tmp_path / f"out-{kind}-{how}"
            checkpoint = tmp_path / "base" if kind == "anonymous" else None
            lm.merge(path, tmp_path / "lora", out, checkpoint=checkpoint, reversible=True)
            error = np.abs(e.run(out / "model.onnx", name) - want).max()
            assert error <= 1e-5 * max(1.0, float(np.abs(want).max())), (kind, how, error)
            assert lm.verify(out, undo=True)["ok"]
