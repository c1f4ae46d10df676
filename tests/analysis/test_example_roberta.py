"""The example on the paper authors' own adapter, where that file is there."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT.parent / "shared" / "data" / "roberta_base_lora_mnli.bin"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs the adapter of the paper's authors")


def test_the_findings_of_the_paper_have_the_same_shape_here(capsys: Any) -> None:
    found = runpy.run_path(str(ROOT / "examples" / "analyze_roberta.py"))["main"](str(FILE))
    assert "figure 4" in capsys.readouterr().out
    trained, noise = found["spectra"]["query"], found["spectra"]["random"]
    assert len(trained) == len(noise) == 12
    # Low rank: in the last layers one direction does it all, where noise of the same shape needs nearly all of its 8.
    assert [k for k, _ in trained[-2:]] == [1, 1] and trained[-1][1] > 0.98
    assert all(k >= 7 and share < 0.2 for k, share in noise)
    # Subspaces: noise meets by chance, what was trained on one task several times as often.
    assert all(phi == pytest.approx(chance, rel=0.35) for _, phi, chance in found["similarity"]["random"])
    assert all(phi > 4 * chance for _, phi, chance in found["similarity"]["value"])
