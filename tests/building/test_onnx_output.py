"""An ONNX export as an output of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

import loramerge as lm

RECIPE = """\
base = "base"
adapters = [{ source = "lora", weight = 0.5 }]

[[output]]
path = "dist/onnx"
base = "dist/merged"
to = "onnx"
onnx = { task = "feature-extraction", verify = false }

[[output]]
path = "dist/merged"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**size, vocab_size=32, max_position_embeddings=16)
    BertModel(config).eval().save_pretrained(tmp_path / "base")
    options = LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"], init_lora_weights=False)
    get_peft_model(BertModel.from_pretrained(tmp_path / "base"), options).save_pretrained(tmp_path / "lora")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def test_an_export_of_a_merged_output_computes_what_peft_does_and_is_locked(recipe: Path) -> None:
    data = lm.build(recipe)
    assert [(o["path"], o["status"]) for o in data["outputs"]] == [("dist/merged", "built"), ("dist/onnx", "built")]
    assert {"onnx", "onnxscript", "transformers"} <= data["numerics"].keys()
    here = recipe.parent
    model = PeftModel.from_pretrained(BertModel.from_pretrained(here / "base"), here / "lora").eval()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 0.5 * scale for name, scale in module.scaling.items()}
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy()
    session = onnxruntime.InferenceSession(here / "dist/onnx/model.onnx", providers=["CPUExecutionProvider"])
    given = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    given |= {i.name: np.zeros_like(ids.numpy()) for i in session.get_inputs() if i.name not in given}
    assert np.abs(session.run(None, given)[0] - expected).max() < 2e-5

    # Weights lie in the order of the graph, and not in one that a set happens to have in this process.
    graph = onnx.load(str(here / "dist/onnx/model.onnx"), load_external_data=False).graph
    weights = json.loads((here / "dist/onnx/loramerge.json").read_text())["weights"]
    stored = [t for t in graph.initializer if t.name in weights]
    offsets = [int(next(e.value for e in t.external_data if e.key == "offset")) for t in stored]
    assert len(offsets) > 8 and [t.name for t in stored] == list(weights)

    assert lm.build(recipe, locked=True)["built"] == 0
