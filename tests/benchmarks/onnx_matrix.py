"""Merging into ONNX over families of models and exporters: the largest difference of logits to the unmerged adapter.

    python tests/benchmarks/onnx_matrix.py [--models llama,bert] [--exporters ts,opt,raw,own]

Every model is tiny and random. `ts`, `opt`, `raw`: torch's exporters (see tests/onnx_merging/exported.py); `own`: that
of `loramerge export`, where it can. Each graph is merged as it is, and once more without names, with the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "onnx_merging")]

import exported as e  # noqa: E402
import numpy as np  # noqa: E402

import loramerge as lm  # noqa: E402


def cell(folder: Path, path: Path, name: str, want: np.ndarray, checkpoint: Path | None) -> str:
    out = folder / "out"
    try:
        receipt = lm.merge(path, folder / "lora", out, checkpoint=checkpoint, jobs=2)
    except lm.LoramergeError as error:
        return f"refused: {error.code}"
    finally:
        (folder / "last").write_text(str(path))
    error = float(np.abs(e.run(out / path.name, name) - want).max())
    for file in sorted(out.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    out.rmdir()
    return f"{error:.0e}{' (note)' if receipt.notes else ''}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(e.MODELS))
    parser.add_argument("--exporters", default="ts,opt,raw")
    asked = parser.parse_args()
    exporters = asked.exporters.split(",")
    columns = [f"{how}{kind}" for how in exporters for kind in ("", ", by value")]
    print("| model | change | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for name in asked.models.split(","):
        with tempfile.TemporaryDirectory() as held:
            folder = Path(held)
            model = e.base(name, folder / "base")
            graphs = {}
            for how in exporters:
                try:
                    graphs[how] = e.export(model, name, how, folder / how / "model.onnx")
                except Exception as error:  # whatever an exporter raises is its answer
                    graphs[how] = type(error).__name__
            before = next((e.run(p, name) for p in graphs.values() if isinstance(p, Path)), None)
            want = e.adapted(model, name, folder / "lora")
            row = []
            for how, path in graphs.items():
                if not isinstance(path, Path):
                    row += [f"no export: {path}", ""]
                    continue
                row.append(cell(folder, path, name, want, None))
                other = e.anonymised(path, folder / f"{how}-anonymous" / "model.onnx")
                row.append(cell(folder, other, name, want, folder / "base"))
            change = "" if before is None else f"{float(np.abs(before - want).max()):.0e}"
            print(f"| {name} | {change} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
