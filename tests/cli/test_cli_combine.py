"""`loramerge combine` and `loramerge resize` at a shell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from loramerge.cli.main import run


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process, in the temporary directory: torch is loaded once."""
    monkeypatch.chdir(tmp_path)

    def start(*args: str) -> Done:
        code = run(args)
        return Done(code, *capsys.readouterr())

    return start


@pytest.fixture
def two(make: SimpleNamespace, tmp_path: Path) -> None:
    make.adapter(tmp_path / "a")
    make.adapter(tmp_path / "b", make.adapter_tensors(seed=2))


def products(folder: Path, scale: float) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        k.removesuffix(".lora_A.weight"): scale * tensors[k.replace("_A", "_B")].astype(np.float64) @ tensors[k]
        for k in tensors
        if "lora_A" in k
    }


def test_adapters_become_one(here: Any, two: None, tmp_path: Path) -> None:
    done = here("combine", "a=0.7", "b=-0.5", "-o", "both")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "adapter   a   PEFT   weight 0.7   4 modules",
        "adapter   b   PEFT   weight -0.5   4 modules",
        "method    linear",
    ]
    assert lines[3].startswith("combined  4 modules   rank 4   error ") and lines[4].startswith("wrote     both   PEFT")
    got, a, b = products(tmp_path / "both", 1), products(tmp_path / "a", 2), products(tmp_path / "b", 2)
    assert got.keys() == a.keys() and all(np.allclose(got[k], 0.7 * a[k] - 0.5 * b[k], atol=1e-5) for k in got)
    assert here("combine", "a", "b", "-o", "quiet", "-q").stdout == "quiet\n"


def test_the_result_merges_like_both(here: Any, two: None, base: Path, tmp_path: Path) -> None:
    assert here("combine", "a=0.5", "b", "-o", "both").returncode == 0
    assert here("merge", "base", "a=0.5", "b", "-o", "m1").returncode == 0
    assert here("merge", "base", "both", "-o", "m2").returncode == 0
    one, other = (load_file(tmp_path / m / "model.safetensors") for m in ("m1", "m2"))
    assert all(np.allclose(one[k], other[k], atol=2e-5) for k in one)


def test_json_tells_everything(here: Any, two: None) -> None:
    done = here("combine", "a", "b", "-o", "o", "--method", "ties", "--density", "0.5", "--rank", "2", "--json", "-v")
    data = json.loads(done.stdout)
    assert data["method"] == {"name": "ties", "options": {"density": 0.5, "trim": "tensor", "space": "full"}}
    assert (data["modules"], data["ranks"], data["asked"]) == (4, {"least": 2, "most": 2}, {"rank": 2})
    assert len(data["rows"]) == 4 and 0 < data["error"] < 1
    assert "rows" not in json.loads(here("combine", "a", "b", "-o", "p", "--json").stdout)


def test_methods_on_factors_tell_how_far_they_are(here: Any, two: None) -> None:
    done = here("combine", "a", "b", "-o", "o", "--method", "peft-linear")
    assert done.returncode == 0 and "away from the weighted sum" in done.stdout


def test_threads_and_order_change_no_byte(cli: Any, two: None, tmp_path: Path) -> None:
    flags = ("--method", "dare_ties", "--p", "0.3", "--seed", "5", "--rank", "3")
    cli("combine", "a", "b", "-o", "x", *flags, "--jobs", "1", env={"OMP_NUM_THREADS": "1"})
    cli("combine", "b", "a", "-o", "y", *flags, "--jobs", "3", env={"OMP_NUM_THREADS": "2"})
    x, y = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "xy")
    assert hashlib.sha256(x).digest() == hashlib.sha256(y).digest()


def test_a_dry_run_writes_nothing(here: Any, two: None, tmp_path: Path) -> None:
    done = here("combine", "a", "b", "-o", "out", "--dry-run")
    assert done.returncode == 0 and "would be  out" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("a", "a=-1"), 3, "nothing is left"),
        (("a", "b", "--method", "ties"), 3, "--space knots or core"),
        (("a", "b", "--method", "ties", "--density", "0", "--rank", "1"), 2, "above 0, at most 1"),
        (("a", "b", "--method", "linaer"), 2, "did you mean linear?"),
        (("a", "b", "--t", "0.5"), 2, "--t belongs to slerp"),
        (("a", "b", "--rank", "1", "--energy", "0.5"), 2, "give one of them"),
        (("a", "b", "--budget", "300"), 3, "give a larger --budget"),
        (("a", "missing"), 3, "missing"),
        (("a", "b", "--to", "kohya"), 2, ".safetensors"),
    ],
)
def test_what_cannot_be_done_says_what_can(
    here: Any, two: None, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = here("combine", *arguments, "-o", "out")
    assert done.returncode == code and says in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists() and "Traceback" not in done.stderr


def test_an_input_is_never_the_output(here: Any, two: None, tmp_path: Path) -> None:
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert here("combine", "a", "b", "-o", "a", "--force").returncode == 4
    assert here("resize", "a", "-o", "a", "--rank", "1", "--force").returncode == 4
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def test_resizing_tells_ranks_and_errors(here: Any, two: None, tmp_path: Path) -> None:
    done = here("resize", "a", "-o", "small", "--rank", "1", "-v")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("resized   4 modules   rank 1   error ") and len(lines) == 3 + 1 + 4
    for key, wanted in products(tmp_path / "a", 2).items():
        s = np.linalg.svd(wanted, compute_uv=False)
        got = products(tmp_path / "small", 1)[key]
        assert np.linalg.norm(got - wanted) == pytest.approx(np.linalg.norm(s[1:]), rel=1e-5)
    done = here("resize", "a", "-o", "none")
    assert done.returncode == 2 and "--rank" in done.stderr
