"""A sharded base and an adapter, large enough for a stream of several pieces, and the command line against a Hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub.server import Hub

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
DIM, LAYERS, RANK, ALPHA, VOCABULARY = 384, 4, 4, 8, 640


def base_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A Llama-like state dict in bfloat16, square and other weights, an odd one among them."""
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, DIM)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{m}.weight": (DIM, DIM) for m in ("q_proj", "k_proj", "v_proj", "o_proj")}
        shapes |= {f"{at}.mlp.up_proj.weight": (3 * DIM, DIM), f"{at}.input_layernorm.weight": (DIM,)}
    shapes |= {"model.norm.weight": (DIM,), "lm_head.weight": (VOCABULARY, DIM)}
    return {n: (torch.randn(s, generator=g) * 0.05).to(torch.bfloat16) for n, s in shapes.items()}


def write_base(folder: Path, shards: int = 2, seed: int = 0) -> Path:
    """The base as files: one, or `shards` with an index, the last with nothing that the adapter changes."""
    folder.mkdir(parents=True)
    tensors = base_tensors(seed)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        cut: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
        for name, tensor in tensors.items():
            layer = name.split(".")[2] if ".layers." in name else ""
            cut[int(layer) % (shards - 1) if layer else shards - 1][name] = tensor
        where = {}
        for number, part in enumerate(cut, 1):
            file = f"model-{number:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(part, file)
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("a licence\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    return folder


def write_adapter(folder: Path, seed: int = 1) -> Path:
    """A PEFT adapter of q_proj and up_proj in all layers; no factor is zero."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, rows in (("self_attn.q_proj", DIM), ("mlp.up_proj", 3 * DIM)):
            at = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, DIM, generator=g) * 0.1
            tensors[f"{at}.lora_B.weight"] = torch.randn(rows, RANK, generator=g) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_dora(folder: Path, base: Path) -> Path:
    """A DoRA adapter of all q_proj and up_proj: its updates look at the whole weight first."""
    write_adapter(folder, seed=5)
    weights: dict[str, torch.Tensor] = {}
    for file in base.glob("*.safetensors"):
        weights |= load_file(file)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [n for n in tensors if n.endswith("lora_B.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        norms = weights[f"{module}.weight"].float().norm(dim=1)
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = norms * 1.07
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return folder


def content(folder: Path, *, receipt: bool = False) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path; without the receipt, which names the inputs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (receipt or path.name != "loramerge.json"):
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """A folder's files, as `Hub.add` takes them."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.out)
        return data


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Path]:
    """`base` (three shards), `one` (one file), `lora`, and `merged`: the base with the adapter, merged from disk."""
    folder = tmp_path_factory.mktemp("made")
    made = {"base": write_base(folder / "base", 3), "one": write_base(folder / "one", 1)}
    made["lora"] = write_adapter(folder / "lora")
    for name in ("base", "one"):
        arguments = ("merge", made[name], made["lora"], "-o", folder / f"{name}-merged", "-q")
        done = zygote.run(arguments, folder, os.environ, folder)
        assert done.code == 0, done.err
        made[f"{name}-merged"] = folder / f"{name}-merged"
    return made


@pytest.fixture
def hub(tmp_path: Path, made: dict[str, Path]) -> Iterator[Hub]:
    """A Hub with `me/base`, `me/one` and `me/lora`."""
    with Hub(tmp_path / "hub") as server:
        for name in ("base", "one", "lora"):
            server.add(f"me/{name}", files_of(made[name]))
        yield server


class Zygote:
    """Runs commands as `zygote.py` says: each in a process of its own, with an environment of its own."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def run(
        self,
        arguments: Sequence[object],
        cwd: Path,
        env: Mapping[str, str],
        scratch: Path,
        patched: Mapping[str, Any] | None = None,
    ) -> Ran:
        """Runs a command; `patched`: attributes of modules to set first, by their dotted names."""
        out, err = scratch / "stdout", scratch / "stderr"
        asked = {
            "args": [str(a) for a in arguments],
            "cwd": str(cwd),
            "env": dict(env),
            "out": str(out),
            "err": str(err),
            "set": {"loramerge.hub.client.FIRST_PAUSE": 0.01, **(patched or {})},
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ran(code, out.read_text(), err.read_text())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def run(hub: Hub, zygote: Zygote, tmp_path: Path) -> Run:
    """Runs the command line in a process of its own, as a client of the Hub, in a folder of its own."""
    work = tmp_path / "work"
    work.mkdir()

    def runner(
        *arguments: object,
        token: str | None = None,
        code: int | None = 0,
        patched: Mapping[str, Any] | None = None,
        **variables: str,
    ) -> Ran:
        env = hub.env(tmp_path / "home", token, PYTHONPATH=PYTHONPATH, **variables)
        ran = zygote.run(arguments, work, env, tmp_path, patched or {})
        assert code is None or ran.code == code, (ran.code, ran.out, ran.err)
        assert "hf_test" not in ran.out + ran.err, "a token is shown"
        return ran

    return runner
