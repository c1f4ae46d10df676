"""`loramerge demo` and `loramerge doctor`: what they make, what they find, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loramerge import demo, doctor
from loramerge.errors import InputError, LoramergeError, OutputError

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("demo") / "here"
    return place, demo.run(place)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


# ----------------------------------------------------------------------------------------------------- demo


def test_the_demo_is_right(made: tuple[Path, dict[str, Any]]) -> None:
    place, data = made
    assert data["ok"] and data["verified"] and data["replayed"]
    assert sorted(os.listdir(place)) == ["base", "merged", "style", "tone"]
    assert 15e6 < data["bytes"] < 25e6
    assert (data["tensors_changed"], data["tensors_copied"]) == (40, 35)
    assert all(row["exact"] >= 0.9999 and row["worst"] <= 0.501 for row in data["checked"])


def test_every_weight_of_the_demo_is_the_formula(made: tuple[Path, dict[str, Any]]) -> None:
    place, _ = made
    base, merged = tensors(place / "base"), tensors(place / "merged")
    wanted = {name: weight.double() for name, weight in base.items()}
    for name, strength in (("style", 0.7), ("tone", 0.3)):
        factors, config = tensors(place / name), json.loads((place / name / "adapter_config.json").read_text())
        for key in factors:
            if ".lora_A." not in key:
                continue
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = 12 if name == "tone" and module.endswith("down_proj") else config["lora_alpha"]
            rank = config["r"]
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            product = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
            wanted[f"{module}.weight"] += strength * scale * product
    assert merged.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(merged[name].double(), expected, rtol=2**-8, atol=1e-6)
        assert (merged[name] == expected.bfloat16()).double().mean() >= 0.9999


def test_the_demo_makes_the_same_bytes_again(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    demo.run(tmp_path / "again")
    for name in ("base", "style", "tone"):
        for path in (made[0] / name).iterdir():
            assert (tmp_path / "again" / name / path.name).read_bytes() == path.read_bytes()


def test_an_existing_place_is_refused_without_force(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "loramerge-demo").mkdir()
    (tmp_path / "loramerge-demo" / "mine.txt").write_text("mine")
    done = cli("demo")
    assert (done.returncode, done.stdout) == (4, "")
    assert "--force" in done.stderr
    done = cli("demo", "--force", "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, data["schema"], data["ok"]) == (0, 1, True)
    assert (tmp_path / "loramerge-demo" / "mine.txt").read_text() == "mine"
    assert cli("demo", "--force", "-q").stdout == "loramerge-demo/merged\n"


def test_force_deletes_nothing_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "tone").mkdir()
    (tmp_path / "tone" / "song.txt").write_text("la")
    with pytest.raises(OutputError) as caught:
        demo.run(tmp_path, force=True)
    assert caught.value.code == "output.not-a-model"
    assert os.listdir(tmp_path) == ["tone"]


def test_a_demo_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "demo", progress=fail)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_exit_4(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("no/such/place", "file", "file/demo"):
        done = cli("demo", "-o", place)
        assert (done.returncode, done.stdout) == (4, "")
    assert os.listdir(tmp_path) == ["file"]


def test_the_commands_that_the_demo_prints_work(cli: Run, tmp_path: Path) -> None:
    done = cli("demo", "-o", "my demo")
    assert done.returncode == 0
    head, _, tail = done.stdout.partition("next, for example:\n")
    assert "% exact, worst error 0.5" in head and "bit for bit the same" in head
    commands = [shlex.split(line) for line in tail.splitlines()]
    assert [command[1] for command in commands] == ["inspect", "inspect", "diff", "merge", "verify"]
    for command in commands:
        ran = cli(*command[1:])
        assert ran.returncode == (1 if command[1] == "diff" else 0), ran.stderr
        assert ran.stdout
    assert (tmp_path / "my demo" / "stronger" / "loramerge.json").is_file()


def test_a_check_that_fails_is_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from loramerge.cli.main import run

    wrong = {"name": "w", "exact": 0.5, "worst": 3.0}
    monkeypatch.setattr(demo, "_check", lambda *arguments: wrong)
    assert run(["demo", "-o", str(tmp_path / "demo")]) == 1
    assert "50.0000% exact, worst error 3.000 units" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- doctor


def passes(scratch: Path) -> Mapping[str, Any]:
    (scratch / "something").write_text("")
    return {"ok": True}


def test_the_doctor_finds_this_machine(tmp_path: Path) -> None:
    data = doctor.examine(tmp_path, self_test=passes)
    json.dumps(data, allow_nan=False)
    assert data["ok"] is True and data["self_test"]["ok"] is True
    assert data["packages"]["torch"] == {"version": torch.__version__, "problem": None}
    assert data["devices"]["threads"] == torch.get_num_threads()
    assert data["processor"]["usable"] >= 1
    place = data["directory"]
    assert place["writable"] and place["hard_links"] and place["free"] > 0
    assert place["fsync_per_second"] > 0
    assert all(isinstance(place[name], bool) for name in ("direct_io", "fallocate", "reflink", "exchange"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        ({"ok": False}, "not right"),
        (LoramergeError("x", "the reason"), "the reason"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_a_self_test_that_fails_is_told(tmp_path: Path, failure: Any, word: str) -> None:
    def test(scratch: Path) -> Mapping[str, Any]:
        if isinstance(failure, Exception):
            raise failure
        return dict(failure)

    data = doctor.examine(tmp_path, self_test=test)
    assert data["ok"] is False
    assert word in data["self_test"]["why"]


def test_a_missing_package_is_told_and_nothing_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    data = doctor.examine(tmp_path, self_test=lambda scratch: pytest.fail("called"))
    assert data["ok"] is False
    assert data["packages"]["no-such-package"] == {"version": None, "problem": "is not installed"}


def test_a_torch_that_does_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = doctor.importlib.import_module

    def broken(name: str) -> Any:
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open")
        return load(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    data = doctor.examine(tmp_path, self_test=lambda scratch: pytest.fail("called"))
    assert data["ok"] is False
    assert "libtorch_cpu.so" in data["packages"]["torch"]["problem"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    data = doctor.examine(tmp_path, self_test=passes)
    assert data["ok"] and data["directory"]["writable"] is False and data["directory"]["why"]


def test_no_directory_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, code in (("nowhere", "input.missing"), ("file", "input.not-directory")):
        with pytest.raises(InputError) as caught:
            doctor.examine(tmp_path / name)
        assert caught.value.code == code


def test_the_doctor_at_the_shell(cli: Run, tmp_path: Path) -> None:
    home = tmp_path / "hub"
    home.mkdir()
    (home / "token").write_text("hf_abcdefghijklmnop")
    variables = {"HF_HOME": str(home), "HF_ENDPOINT": "https://me:password@hub.example", "HF_HUB_OFFLINE": "1"}
    done = cli("doctor", env=variables)
    assert done.returncode == 0, done.stderr
    lines = {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}
    assert lines["self test"].startswith("ok")
    assert lines["hub"] == "https://hub.example   logged in   offline"
    assert "hard links: yes" in lines["file system"]
    for secret in ("abcdefghijklmnop", "password"):
        assert secret not in done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == ["hub"]


def test_the_doctor_in_json_and_in_a_word(cli: Run, tmp_path: Path) -> None:
    data = json.loads(cli("doctor", "--json", "--directory", str(tmp_path)).stdout)
    assert (data["schema"], data["ok"], data["directory"]["path"]) == (1, True, str(tmp_path))
    assert cli("doctor", "-q").stdout == "ok\n"
    assert cli("doctor", "--directory", "nowhere").returncode == 3
