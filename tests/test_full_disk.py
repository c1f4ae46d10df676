"""Outputs that do not fit: a full disk, a limit on file sizes, a read-only file system. Exit 4, and nothing is left."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.errors import OutputError
from loramerge.merging.run import SPACE_MARGIN

ROOT = Path(__file__).resolve().parents[1]
LAYERS, ROWS, COLS, RANK = 6, 512, 1024, 4
WEIGHTS_BYTES = LAYERS * ROWS * COLS * 4
"""About 12.6 MB, in two shards."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("full")
    base, adapter = directory / "base", directory / "adapter"
    base.mkdir()
    adapter.mkdir()
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    factors: dict[str, Any] = {}
    for shard in (1, 2):
        file = f"model-0000{shard}-of-00002.safetensors"
        tensors = {}
        for layer in range((shard - 1) * LAYERS // 2, shard * LAYERS // 2):
            name = f"layers.{layer}.up_proj"
            tensors[f"{name}.weight"] = random.standard_normal((ROWS, COLS), dtype=np.float32)
            factors[f"base_model.model.{name}.lora_A.weight"] = random.standard_normal((RANK, COLS), dtype=np.float32)
            factors[f"base_model.model.{name}.lora_B.weight"] = random.standard_normal((ROWS, RANK), dtype=np.float32)
        save_file(tensors, base / file)
        weight_map |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8}))
    return base, adapter


def mounted(directory: Path, nbytes: int) -> bool:
    """Mounts a tmpfs of this size; False where that is not allowed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of as many bytes as the test says, 4 MB by default."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if not mounted(directory, getattr(request, "param", 4 << 20)):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def command(base: Path, adapter: Path, out: Path, *flags: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "loramerge", "merge", str(base), str(adapter), "-o", str(out), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **popen,
    )


def refused(inputs: tuple[Path, Path], out: Path, **options: Any) -> OutputError:
    with pytest.raises(OutputError) as caught:
        lm.merge(str(inputs[0]), str(inputs[1]), str(out), **options)
    assert caught.value.exit_code == 4
    return caught.value


def fill(directory: Path, leave: int) -> None:
    """Takes the disk's space but for so many bytes."""
    found = os.statvfs(directory)
    with (directory / "filler").open("wb") as file:
        file.write(b"\0" * max(0, found.f_bavail * found.f_frsize - leave))


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    inputs: tuple[Path, Path], small_disk: Path
) -> None:
    error = refused(inputs, small_disk / "out")
    assert error.code == "output.no-space"
    assert "needs" in error.message and "free" in error.message
    assert list(small_disk.iterdir()) == []
    with pytest.raises(OutputError):
        lm.plan_merge(str(inputs[0]), str(inputs[1]), str(small_disk / "out"))


def test_the_command_says_so_and_ends_with_4(inputs: tuple[Path, Path], small_disk: Path) -> None:
    done = command(*inputs, small_disk / "out")
    assert done.returncode == 4
    assert "error:" in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []


def test_a_dry_run_says_so_too(inputs: tuple[Path, Path], small_disk: Path) -> None:
    assert command(*inputs, small_disk / "out", "--dry-run").returncode == 4
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("small_disk", [WEIGHTS_BYTES + SPACE_MARGIN + (4 << 20)], indirect=True)
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(0, id="nothing"),
        pytest.param(100_000, id="not-one-tensor"),
        pytest.param(WEIGHTS_BYTES * 3 // 4, id="one-shard"),
        pytest.param(None, id="all-but-the-receipt"),
    ],
)
@pytest.mark.parametrize("form", ["directory", "file"])
def test_space_that_goes_after_the_plan_leaves_nothing(
    inputs: tuple[Path, Path], small_disk: Path, leave: int | None, form: str
) -> None:
    if leave is None:
        leave = WEIGHTS_BYTES + 4096 * (2 if form == "directory" else 1)  # the weights and their headers
    out = small_disk / ("out" if form == "directory" else "out.safetensors")
    error = refused(inputs, out, on_plan=lambda plan: fill(small_disk, leave))
    assert error.code == "output.no-space"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    lm.merge(str(inputs[0]), str(inputs[1]), str(out))
    assert lm.verify(str(out))["ok"]


@pytest.mark.parametrize("small_disk", [2 * WEIGHTS_BYTES + SPACE_MARGIN + (4 << 20)], indirect=True)
def test_an_old_output_survives_a_disk_that_fills_up(inputs: tuple[Path, Path], small_disk: Path) -> None:
    out = small_disk / "out"
    lm.merge(str(inputs[0]), str(inputs[1]), str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    weight = {str(inputs[1]): 0.5}
    with pytest.raises(OutputError) as caught:
        lm.merge(
            str(inputs[0]), weight, str(out), force=True, on_plan=lambda plan: fill(small_disk, WEIGHTS_BYTES // 2)
        )
    assert caught.value.code == "output.no-space"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert lm.verify(str(out))["ok"]
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "out"]


@pytest.mark.parametrize("small_disk", [WEIGHTS_BYTES + SPACE_MARGIN + (4 << 20)], indirect=True)
def test_a_read_only_disk_is_refused(inputs: tuple[Path, Path], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    error = refused(inputs, small_disk / "out")
    assert error.code == "output.permission"
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 100_000, WEIGHTS_BYTES // 2 - 100])
def test_a_limit_on_file_sizes_leaves_nothing(inputs: tuple[Path, Path], tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE: writes come back short, then fail with EFBIG. Python ignores the signal that goes with it."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = command(*inputs, tmp_path / "out", "--json", preexec_fn=restrict)
    assert done.returncode == 4, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "output.too-large"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
