"""Exports to ONNX: what onnxruntime computes is what torch computes with the unmerged adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft_oracle import save_adapter, train_like
from safetensors.torch import load_file
from zoo import VOCAB, ZOO, build, read_tensors, save

import loramerge as lm
from loramerge.cli import main
from loramerge.errors import InputError, LoramergeError, OutputError, UnsupportedError, UsageError
from loramerge.exporting import names, parity, tasks, tracing, truncated
from loramerge.exporting import weights as placing

torch.set_num_threads(1)


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def adapter(name: str, base: Path, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A LoRA as if trained, on all linears of a model of the zoo, or on those of `targets`."""
    arch = ZOO[name]
    targets = list(arch.targets) if isinstance(arch.targets, tuple) else arch.targets
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, "init_lora_weights": False, **options})
    model = getattr(transformers, arch.model).from_pretrained(base)
    return save_adapter(train_like(model, config, seed=seed), folder)


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of an export as its graph's own reader has it, (out, in) where the receipt says transposed."""
    model = onnx.load(str(folder / "model.onnx"))
    turned = json.loads((folder / "loramerge.json").read_text())["weights"]
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in turned}
    return {name: array.T if turned[name].get("transposed") else array for name, array in held.items()}


# ------------------------------------------------------------------------------------------- a decoder, merged


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied bfloat16 decoder in several shards, two adapters, and its export from the command line."""
    place = tmp_path_factory.mktemp("decoder")
    model = build("llama_tied")
    save(model, place / "base", dtype=torch.bfloat16, shard="10KB")
    assert len(list((place / "base").glob("*.safetensors"))) > 2
    (place / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    adapter("llama_tied", place / "base", place / "one", seed=1)
    adapter("llama_tied", place / "base", place / "two", seed=2, r=1, target_modules=["q_proj", "down_proj"])
    arguments = ["export", str(place / "base"), "-o", str(place / "out"), "--json", "--no-progress"]
    arguments += ["--adapter", str(place / "one"), "--adapter", f"{place / 'two'}=-0.5"]
    assert main.run(arguments) == 0
    return place


def test_weights_of_an_export_are_those_of_a_merge(decoder: Path) -> None:
    lm.merge(decoder / "base", {decoder / "one": 1.0, decoder / "two": -0.5}, decoder / "merged", dtype="float32")
    merged = read_tensors(decoder / "merged")
    held = stored(decoder / "out")
    assert held.keys() == merged.keys()  # tied: one tensor, by the checkpoint's name
    for name, tensor in merged.items():
        assert np.array_equal(held[name].view(np.uint32), tensor.numpy().view(np.uint32)), name


def unmerged(place: Path) -> Any:
    base = transformers.LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, place / "one", adapter_name="one")
    model.load_adapter(place / "two", "two")
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict) and "two" in module.scaling:
            module.scaling["two"] *= -0.5
    model.base_model.set_adapter(["one", "two"])
    return model.base_model.model.eval()


def test_a_decoder_gives_the_logits_of_the_unmerged_adapters(decoder: Path) -> None:
    run = session(decoder / "out" / "model.onnx")
    model = unmerged(decoder)
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    past = {
        i.name: np.zeros((3, i.shape[1], 0, i.shape[3]), np.float32)
        for i in run.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    assert len(past) == 4
    cache = None
    for first, last in ((0, 5), (5, 6), (6, 9)):  # a prompt, a token, three at once
        here = mask[:, :last]
        feeds = {
            "input_ids": ids[:, first:last],
            "attention_mask": here,
            "position_ids": (here.cumsum(1) - 1).clamp(min=0)[:, first:],
        }
        named = [o.name for o in run.get_outputs()]
        got = dict(zip(named, run.run(named, {k: v.numpy() for k, v in feeds.items()} | past), strict=True))
        with torch.inference_mode():
            want = model(**feeds, past_key_values=cache, use_cache=True)
        cache = want.past_key_values
        keep = mask[:, first:last].bool().numpy()
        assert np.abs(got["logits"] - want.logits.numpy())[keep].max() <= 1e-5
        past = {k.replace("present.", "past_key_values."): v for k, v in got.items() if k.startswith("present.")}


def test_side_files_are_byte_for_byte_and_the_receipt_holds(decoder: Path) -> None:
    out = decoder / "out"
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (decoder / "base" / name).read_bytes()
    receipt = json.loads((out / "loramerge.json").read_text())
    assert receipt["command"] == "export" and receipt["parity"]["ok"] and receipt["parity"]["largest"] < 1e-4
    properties = {p.key: p.value for p in onnx.load(out / "model.onnx", load_external_data=False).metadata_props}
    assert properties["loramerge.identity"] == receipt["identity"]
    assert [a["weight"] for a in json.loads(properties["loramerge.adapters"])] == [1.0, -0.5]
    assert lm.verify(out)["ok"]
    with open(out / "model.onnx_data", "r+b") as file:
        file.seek(receipt["weights"]["model.norm.weight"]["offset"])
        kept = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([kept[0] ^ 1]))
    assert not lm.verify(out)["ok"]
    with open(out / "model.onnx_data", "r+b") as file:
        file.seek(receipt["weights"]["model.norm.weight"]["offset"])
        file.write(kept)


def test_the_graph_keeps_module_names_and_nothing_that_is_stale(decoder: Path) -> None:
    model = onnx.load(decoder / "out" / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(decoder / "out" / "model.onnx"), full_check=True)
    assert not model.graph.value_info
    scopes = [p.value for n in model.graph.node for p in n.metadata_props if p.key.endswith("name_scopes")]
    assert any("model.layers.1.mlp.down_proj" in scope for scope in scopes)
    assert [i.name for i in model.graph.input][:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    axes = [d.dim_param or d.dim_value for d in model.graph.input[3].type.tensor_type.shape.dim]
    assert axes == ["batch_size", 2, "past_sequence_length", 8]


# ------------------------------------------------------------------------------------------- checks that must fail


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoder")
    save(build("bert"), place / "base")
    return place


def test_a_wrong_weight_is_found_and_nothing_appears(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = placing.WeightSink.write
    spoilt = "bert.encoder.layer.1.output.dense.weight"

    def wrong(self: Any, file: Any, offset: int, view: memoryview) -> None:
        info = next(i for s, i in zip(file.steps, file.layout()[1], strict=True) if s.tensor == spoilt)
        if offset <= info.begin < offset + len(view):
            copy = bytearray(view)
            copy[info.begin - offset + 3] ^= 0xC0
            view = memoryview(copy)
        right(self, file, offset, view)

    monkeypatch.setattr(placing.WeightSink, "write", wrong)
    with pytest.raises(LoramergeError) as error:
        lm.export(encoder / "base", encoder / "out")
    assert error.value.code == "export.differs" and error.value.exit_code == 1
    assert not (encoder / "out").exists() and [p.name for p in encoder.iterdir()] == ["base"]


def test_a_model_too_large_to_run_is_checked_on_some_layers_and_by_digest(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "_room", lambda options: 150_000)
    monkeypatch.setattr(truncated, "DEPTH", 1)
    digests = truncated.compare_digests

    def spoilt(plan: Any, directory: Path, results: Any) -> int:
        target = plan.targets["bert.encoder.layer.1.output.dense.weight"]
        count = digests(plan, directory, results)
        with open(directory / target.file, "r+b") as file:
            file.seek(target.offset + 7)
            byte = file.read(1)
            file.seek(target.offset + 7)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            with pytest.raises(LoramergeError, match="is not in the data file as it was made"):
                digests(plan, directory, results)
            file.seek(target.offset + 7)
            file.write(byte)
        return count

    monkeypatch.setattr(truncated, "compare_digests", spoilt)
    data = lm.export(encoder / "base", encoder / "large", dtype="float16", layout="transformersjs")
    assert not data["parity"]["whole"] and "1 layer ran" in data["parity"]["note"]
    assert data["parity"]["hashed"] == len(data["weights"])
    config = json.loads((encoder / "large" / "config.json").read_text())
    assert config.pop("transformers.js_config") == {"use_external_data_format": {"model_fp16.onnx": True}}
    assert config == json.loads((encoder / "base" / "config.json").read_text())
    run = session(encoder / "large" / "onnx" / "model_fp16.onnx")
    assert {o.type for o in run.get_outputs()} == {"tensor(float16)"}
    assert sorted(p.name for p in (encoder / "large" / "onnx").iterdir()) == ["model_fp16.onnx", "model_fp16.onnx_data"]


# ------------------------------------------------------------------------------------------- adapters at run time


def test_an_adapter_ready_graph_switches_adapters(tmp_path: Path) -> None:
    save(build("gpt2"), tmp_path / "base")
    adapter("gpt2", tmp_path / "base", tmp_path / "one", seed=1)
    adapter("gpt2", tmp_path / "base", tmp_path / "two", seed=2, r=1, target_modules=["c_attn"])
    lm.export(tmp_path / "base", tmp_path / "out", adapter_ready=True)
    for name in ("one", "two"):
        file = tmp_path / f"{name}.onnx_adapter"
        data = lm.convert(tmp_path / name, file, "onnx-adapter", base=tmp_path / "out")
        assert data["modules"] == (8 if name == "one" else 2) and file.stat().st_size == data["bytes"]
    run = session(tmp_path / "out" / "model.onnx")
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 6), np.int64)}
    feeds |= {"position_ids": np.arange(6)[None].repeat(2, 0)}
    feeds |= {
        i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32)
        for i in run.get_inputs()
        if i.name.startswith("past")
    }
    logits = []
    for name in ("", "one", "two", "one", ""):  # back and forth: nothing of an adapter stays
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
        options = ort.RunOptions()
        if name:
            held = ort.LoraAdapter()
            held.Load(str(tmp_path / f"{name}.onnx_adapter"))
            options.add_active_adapter(held)
            model = PeftModel.from_pretrained(model, tmp_path / name).eval()
        with torch.inference_mode():
            want = model(ids).logits.numpy()
        got = run.run(["logits"], feeds, options)[0]
        assert np.abs(got - want).max() <= 1e-5, name
        logits.append(got)
    assert np.array_equal(logits[0], logits[4]) and np.abs(logits[0] - logits[1]).max() > 0.1
    with pytest.raises(LoramergeError, match="where the graph takes no adapter"):
        adapter("gpt2", tmp_path / "base", tmp_path / "head", target_modules=["wte"])
        lm.convert(tmp_path / "head", tmp_path / "head.onnx_adapter", "onnx-adapter", base=tmp_path / "out")


def test_linked_weights_are_the_checkpoint_s_own_file(tmp_path: Path) -> None:
    base = save(build("llama", num_hidden_layers=1), tmp_path / "base")
    data = lm.export(base, tmp_path / "out", link_weights=True, layout="genai")
    assert data["parity"]["ok"] and data["bytes_written"] == 0
    assert (tmp_path / "out" / "model.safetensors").samefile(base / "model.safetensors")
    assert not list((tmp_path / "out").glob("*data*"))
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    decoder = settings["decoder"]
    assert settings["type"] == "llama" and decoder["num_hidden_layers"] == 1 and decoder["head_size"] == 8
    names = {value.name for value in session(tmp_path / "out" / "model.onnx").get_inputs()}
    own = {decoder["inputs"][key] for key in ("input_ids", "attention_mask", "position_ids")}
    assert names == own | {decoder["inputs"][f"past_{side}_names"] % 0 for side in ("key", "value")}
    assert lm.verify(tmp_path / "out", base=base)["ok"]


# ------------------------------------------------------------------------------------------- without tracing


@pytest.mark.parametrize("name", ["vit", "qwen3_moe", "mixtral", "bert_model", "t5", "phi3", "llama_tied", "whisper"])
def test_every_parameter_is_found_in_the_checkpoint(name: str, tmp_path: Path) -> None:
    """Put together from pieces of stored tensors, parameters are what the library loads."""
    save(build(name), tmp_path / "base")
    held = read_tensors(tmp_path / "base")
    config = tracing.load_config(tmp_path / "base")
    cls = tasks.model_class(config, None)
    model = tracing.build(cls, config, torch.float32)
    found = names.origins(model, {key: tuple(t.shape) for key, t in held.items()})
    loaded = cls.from_pretrained(tmp_path / "base")
    same = names.canonical(model, found)
    assert {same[k] for k, _ in loaded.named_parameters()} <= set(found)
    for key, parameter in loaded.named_parameters():
        origin = found[same[key]]
        made = torch.full(tuple(origin.shape), float("nan"))
        for piece in origin.pieces:
            part = held[piece.key][tuple(slice(a, a + n) for a, n in piece.box)]
            order = sorted(range(len(piece.axes)), key=lambda i: piece.axes[i])
            place = tuple(slice(s, s + n) for s, n in zip(piece.starts, piece.extents(), strict=True))
            made[place] = part.permute(order).reshape(piece.extents())
        assert torch.equal(made, parameter.detach()), key


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shapes", [((7, 5),), ((3, 4), (5, 4)), ((2, 3, 4),), ((9,),), ((4, 4), (4, 4))])
def test_blocks_land_where_the_pieces_say(shapes: tuple[tuple[int, ...], ...], turned: bool, tmp_path: Path) -> None:
    """Blocks of whole rows, in any order, of tensors that are joined, stacked and transposed: against numpy."""
    random = np.random.default_rng(len(shapes) + turned)
    parts = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    origins = [names.Origin.of(f"t{i}", shape) for i, shape in enumerate(shapes)]
    equal = len(shapes) == 2 and shapes[0] == shapes[1]
    origin = names._stack(origins) if equal else names._cat(origins)
    truth = np.stack(parts) if equal else np.concatenate(parts)
    turn = turned and truth.ndim == 2
    held = {"w": (origin, "F32")}
    targets = placing.arrange(held, {"w"} if turn else set(), "data")
    sink = placing.WeightSink(tmp_path / "data", targets, held)
    begin, infos = 100, []
    for i, part in enumerate(parts):
        infos.append(placing.TensorInfo(f"t{i}", "F32", part.shape, begin, begin + part.nbytes))
        begin += part.nbytes
    rows = [(f"t{i}", info) for i, info in enumerate(infos)]
    sink._infos["f"] = ([info.begin for _, info in rows], rows)

    class File:
        name = "f"

    blocks = []
    for info, part in zip(infos, parts, strict=True):
        row = part.nbytes // part.shape[0]
        raw = part.tobytes()
        blocks += [(info.begin + at, raw[at : at + 2 * row]) for at in range(0, len(raw), 2 * row)]
    for at in random.permutation(len(blocks)):
        sink.write(File(), blocks[at][0], memoryview(bytearray(blocks[at][1])))  # type: ignore[arg-type]
    sink.finish()
    got = np.fromfile(tmp_path / "data", np.float32)[: truth.size]
    assert np.array_equal(got, (truth.T if turn else truth).ravel())


# ------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save(build("llama"), tmp_path / "base")
    out = tmp_path / "out"

    def refused(kind: type[LoramergeError], code: str, **options: Any) -> LoramergeError:
        with pytest.raises(kind) as error:
            lm.export(base, out, **options)
        assert error.value.code == code and error.value.fix and not out.exists()
        return error.value

    refused(UsageError, "usage.task", task="poetry")
    refused(UsageError, "usage.layout", layout="tf")
    refused(UsageError, "usage.dtype", dtype="bfloat16")
    refused(UsageError, "usage.target", to="tflite")
    refused(UnsupportedError, "export.architecture", task="image-classification")
    config = json.loads((base / "config.json").read_text())

    def edit(**changes: Any) -> None:
        (base / "config.json").write_text(json.dumps({**config, **changes}))

    edit(architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "modeling_my.MyModel"})
    assert "never run" in refused(UnsupportedError, "export.architecture").message
    edit(model_type="mine", auto_map={"AutoConfig": "configuration_my.MyConfig"})
    refused(UnsupportedError, "export.architecture")
    edit(quantization_config={"quant_method": "awq"})
    refused(UnsupportedError, "export.quantised")
    edit(hidden_size=64)
    assert "the config says" in refused(InputError, "export.shape", verify=False).message
    edit()
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError):
        lm.export(base, tmp_path / "there")
    with pytest.raises(OutputError):
        lm.export(base, base / "onnx")


def test_a_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramerge.exporting import packages

    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError) as error:
        lm.export(tmp_path, tmp_path / "out")
    assert "loramerge[onnx]" in error.value.fix


def test_a_copy_to_safetensors_in_another_dtype(tmp_path: Path) -> None:
    save(build("bert_model", num_hidden_layers=1), tmp_path / "base")
    arguments = ["export", str(tmp_path / "base"), "-o", str(tmp_path / "out"), "--to", "safetensors"]
    assert main.run([*arguments, "--dtype", "bfloat16", "-q"]) == 0
    before, after = read_tensors(tmp_path / "base"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v.bfloat16() if v.is_floating_point() else v) for k, v in before.items())
