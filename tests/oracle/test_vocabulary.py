"""Adapters that bring another vocabulary, and bases in PyTorch's own format: plain transformers is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import loramerge as lm

ROWS, MORE = 97, 101


def model(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": ROWS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def adapter(base: Any, folder: Path, **options: Any) -> Any:
    trained = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trained.save_pretrained(folder)
    return trained


def assert_same_function(out: Path, trained: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
        assert torch.allclose(merged, trained(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["saved", "embedding", "both"],
)
def test_vocabulary_grows_with_the_adapter(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = model(tied)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(MORE)
    trained = adapter(base, tmp_path / "lora", **options)
    one_side = options["target_modules"][-1] == "embed_tokens"
    if one_side and not tied:
        # The head's new rows are in no file.
        with pytest.raises(lm.LoramergeError) as caught:
            lm.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
        assert (caught.value.code, caught.value.exit_code) == ("adapter.vocabulary", 3)
        assert not (tmp_path / "out").exists()
        return
    lm.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == MORE
    assert_same_function(tmp_path / "out", trained, torch.arange(MORE - 10, MORE)[None])


def test_sharded_pytorch_base_becomes_safetensors(tmp_path: Path) -> None:
    base = model(False)
    folder = tmp_path / "base"
    folder.mkdir()
    base.config.save_pretrained(folder)
    state = base.state_dict()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    shard = {name: names["layers.0" in name] for name in state}
    for file in names:
        torch.save({n: t for n, t in state.items() if shard[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard}))
    trained = adapter(base, tmp_path / "lora", target_modules="all-linear")
    with pytest.raises(lm.LoramergeError) as caught:
        lm.merge(folder, tmp_path / "lora", tmp_path / "out")
    assert caught.value.code == "pickle.refused"
    lm.merge(folder, tmp_path / "lora", tmp_path / "out", allow_pickle=True)
    weights = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert weights == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert_same_function(tmp_path / "out", trained, torch.arange(10)[None])
    assert lm.verify(tmp_path / "out", base=folder, allow_pickle=True)["ok"]
