"""ONNX models as files: what is written where, external data, the ways back, and models that mean harm."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import graphs as g
import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper
from test_sites import close, refused

import loramerge as lm
from loramerge.errors import LoramergeError

W, U = g.numbers(1, 6, 5), g.numbers(2, 3, 6)
PAIRS = {"fc": g.factors(3, 6, 5, 2), "head": g.factors(5, 3, 6, 1)}
X = g.numbers(9, 4, 5)


def want(weight: float = 1.0) -> g.Array:
    new = W + weight * g.delta(PAIRS["fc"])
    return X.astype(float) @ new.T @ (U + weight * g.delta(PAIRS["head"])).T


def two_layers() -> onnx.ModelProto:
    nodes = [g.linear("/fc/MatMul", "x", "w", "h"), g.linear("/head/MatMul", "h", "head.weight_t", "y")]
    return g.model(nodes, [g.tensor("w", W.T), g.tensor("head.weight_t", U.T)], {"x": [4, 5]})


def external(path: Path, files: dict[str, str], align: int = 1) -> Path:
    """The model with weights in these files, each at a multiple of `align`, with other bytes between them."""
    made = two_layers()
    path.parent.mkdir(parents=True, exist_ok=True)
    for tensor in made.graph.initializer:
        raw, location = tensor.raw_data, files[tensor.name]
        at = path.parent / location
        at.parent.mkdir(parents=True, exist_ok=True)
        offset = -(-(at.stat().st_size if at.exists() else 0) // align) * align + (7 if align == 1 else 0)
        with open(at, "ab") as out:
            out.write(b"\xee" * (offset - out.tell()) + raw)
        external_data_helper.set_external_data(tensor, location, offset, len(raw))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    path.write_bytes(made.SerializeToString())
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return g.lora(tmp_path / "lora", PAIRS)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "inline": lambda p: g.save(two_layers(), p),
    "one file": lambda p: external(p, {"w": "m.onnx_data", "head.weight_t": "m.onnx_data"}, 4096),
    "odd offsets": lambda p: external(p, {"w": "weights", "head.weight_t": "weights"}),
    "a file each": lambda p: external(p, {"w": "onnx__MatMul_1", "head.weight_t": "b.bin"}, 64),
    "one inside": lambda p: external_one(p),
}


def external_one(path: Path) -> Path:
    made = two_layers()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = made.graph.initializer[0]
    (path.parent / "only.data").write_bytes(tensor.raw_data)
    external_data_helper.set_external_data(tensor, "only.data")  # neither offset nor length
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_bytes_of_weights_change_and_all_ways_lead_back(tmp_path: Path, adapter: Path, layout: str) -> None:
    base = LAYOUTS[layout](tmp_path / "base" / "m.onnx")
    before = {p.name: p.read_bytes() for p in base.parent.iterdir()}
    out = tmp_path / "out" / "n.onnx"
    out.parent.mkdir()
    lm.merge(base, adapter, out, reversible=True)
    names = {"n.onnx", *(n for n in before if n != "m.onnx")}
    assert {p.name for p in out.parent.iterdir()} == names | {"n.onnx.loramerge.json", "n.onnx.loramerge.undo"}
    close(g.run(out, {"x": X}), want())
    for name, raw in before.items():
        assert (base.parent / name).read_bytes() == raw
        after = (out.parent / name.replace("m.onnx", "n.onnx") if name == "m.onnx" else out.parent / name).read_bytes()
        assert len(after) == len(raw)
        changed = sum(a != b for a, b in zip(after, raw, strict=True))
        assert changed <= 4 * (W.size + U.size), "more changed than the weights"
    assert lm.verify(out, undo=True)["ok"] and lm.verify(out, base=base)["replayed"]
    for kwargs in ({}, {"base": base}):
        back = tmp_path / f"back{len(kwargs)}" / "m.onnx"
        back.parent.mkdir()
        lm.unmerge(out, back, **kwargs)
        assert {p.name: p.read_bytes() for p in back.parent.iterdir() if "loramerge" not in p.name} == before
    switched = tmp_path / "switched" / "n.onnx"
    switched.parent.mkdir()
    lm.switch(out, {adapter: 0.5}, switched)
    close(g.run(switched, {"x": X}), want(0.5))


def test_in_place_there_and_back(tmp_path: Path, adapter: Path) -> None:
    base = external(tmp_path / "m.onnx", {"w": "m.onnx_data", "head.weight_t": "m.onnx_data"}, 64)
    before = (base.read_bytes(), (tmp_path / "m.onnx_data").read_bytes())
    lm.merge(base, adapter, None, in_place=True, reversible=True)
    close(g.run(base, {"x": X}), want())
    assert base.read_bytes() == before[0]
    assert lm.verify(base, undo=True)["ok"]
    lm.switch(base, {adapter: -1.0}, None, in_place=True)
    close(g.run(base, {"x": X}), want(-1.0))
    lm.unmerge(base, None, in_place=True)
    assert (base.read_bytes(), (tmp_path / "m.onnx_data").read_bytes()) == before


def test_a_directory_with_its_files(tmp_path: Path, adapter: Path) -> None:
    folder = tmp_path / "base"
    base = external(folder / "onnx" / "model.onnx", {"w": "model.onnx_data", "head.weight_t": "model.onnx_data"})
    (folder / "config.json").write_text('{"model_type": "own"}')
    (folder / "tokenizer.json").write_text("{}")
    lm.merge(folder, adapter, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    expected = {"config.json", "tokenizer.json", "onnx/model.onnx", "onnx/model.onnx_data", "loramerge.json"}
    assert found == expected
    close(g.run(tmp_path / "out" / "onnx" / "model.onnx", {"x": X}), want())
    assert lm.verify(tmp_path / "out")["ok"]
    lm.merge(base, adapter, tmp_path / "alone")
    assert (tmp_path / "alone" / "model.onnx_data").is_file()


def test_damage_is_found(tmp_path: Path, adapter: Path) -> None:
    base = external(tmp_path / "base" / "m.onnx", {"w": "d", "head.weight_t": "d"}, 64)
    lm.merge(base, adapter, tmp_path / "out")
    data = tmp_path / "out" / "d"
    raw = bytearray(data.read_bytes())
    for at in (0, 62 * 2, len(raw) - 1):  # a weight, the bytes between the weights, the other weight
        data.write_bytes(bytes(raw[:at]) + bytes([raw[at] ^ 1]) + bytes(raw[at + 1 :]))
        assert not lm.verify(tmp_path / "out")["ok"], at
    data.write_bytes(raw)
    assert lm.verify(tmp_path / "out")["ok"]
    graph = tmp_path / "out" / "m.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"/fc/MatMul", b"/fd/MatMul"))
    assert not lm.verify(tmp_path / "out")["ok"]


def test_two_names_for_the_same_bytes_are_one_weight(tmp_path: Path, adapter: Path) -> None:
    made = two_layers()
    made.graph.node.append(g.linear("/other/MatMul", "x", "w2", "z"))
    made.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["a", "b"]))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "d").write_bytes(W.T.tobytes())
    made.graph.initializer.append(g.tensor("w2", W.T))
    for tensor in (made.graph.initializer[0], made.graph.initializer[2]):
        external_data_helper.set_external_data(tensor, "d", 0, W.nbytes)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    base = tmp_path / "base" / "m.onnx"
    base.write_bytes(made.SerializeToString())
    error = refused("onnx.shared", lm.merge, base, adapter, out=tmp_path / "out.onnx")
    assert "other" in error.message


# ------------------------------------------------------------------------------------------- what is asked


def test_outputs_that_make_no_sense(tmp_path: Path, adapter: Path) -> None:
    base = external(tmp_path / "base" / "m.onnx", {"w": "d", "head.weight_t": "d"}, 64)
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"fc.weight": W, "head.weight": U})
    out = tmp_path / "out.onnx"
    refused("usage.dtype", lm.merge, base, adapter, out=out, dtype="float16")
    refused("usage.value", lm.merge, base, adapter, out=out, shard_size=1000)
    refused("usage.output", lm.merge, base, adapter, out=tmp_path / "out.safetensors")
    refused("usage.output", lm.merge, checkpoint, adapter, out=out)
    refused("usage.value", lm.merge, checkpoint, adapter, out=tmp_path / "out", checkpoint=checkpoint)
    refused("output.is-input", lm.merge, base, adapter, out=base, force=True)
    refused("output.exists", lm.merge, base, adapter, out=tmp_path / "base" / "n.onnx", force=True)  # the base's data
    nested = external(tmp_path / "n" / "m.onnx", {"w": "sub/d", "head.weight_t": "sub/d"}, 64)
    refused("usage.output", lm.merge, nested, adapter, out=out)
    lm.merge(nested, adapter, tmp_path / "dir")
    close(g.run(tmp_path / "dir" / "m.onnx", {"x": X}), want())


def test_a_dry_run_writes_nothing_and_its_plan_is_data(tmp_path: Path, adapter: Path) -> None:
    base = g.save(two_layers(), tmp_path / "base" / "m.onnx")
    plan = lm.plan_merge(base, adapter, tmp_path / "out.onnx")
    data = json.loads(json.dumps(plan.to_data()))
    assert data["tensors_changed"] == 2 and not (tmp_path / "out.onnx").exists()
    assert lm.inspect(base)["kind"] == "checkpoint"
    lm.merge(base, adapter, tmp_path / "out.onnx")
    difference = lm.diff(base, tmp_path / "out.onnx")
    assert {row["name"] for row in difference["changed"]} == {"w", "head.weight_t"}


# ----------------------------------------------------------------------------------------- hostile models


def edited(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        external(path, {"w": "d", "head.weight_t": "d"}, 64)
        made = onnx.load(str(path), load_external_data=False)
        change(made)
        path.write_bytes(made.SerializeToString())

    return make


def entry(made: onnx.ModelProto, key: str, value: str, which: int = 0) -> None:
    tensor = made.graph.initializer[which]
    for pair in tensor.external_data:
        if pair.key == key:
            pair.value = value
            return
    pair = tensor.external_data.add()
    pair.key, pair.value = key, value


def location(value: str) -> Callable[[Path], None]:
    return edited(lambda m: entry(m, "location", value))


def linked(path: Path) -> None:
    external(path, {"w": "d", "head.weight_t": "d"}, 64)
    shutil.move(path.parent / "d", path.parent.parent / "elsewhere")
    os.symlink(path.parent.parent / "elsewhere", path.parent / "d")


def linked_folder(path: Path) -> None:
    external(path, {"w": "s/d", "head.weight_t": "s/d"}, 64)
    shutil.move(path.parent / "s", path.parent.parent / "s")
    os.symlink(path.parent.parent / "s", path.parent / "s")


def truncated(path: Path) -> None:
    external(path, {"w": "d", "head.weight_t": "d"}, 64)
    (path.parent / "d").write_bytes((path.parent / "d").read_bytes()[:-1])


def missing(path: Path) -> None:
    external(path, {"w": "d", "head.weight_t": "d"}, 64)
    (path.parent / "d").unlink()


def cut(at: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        g.save(two_layers(), path)
        path.write_bytes(path.read_bytes()[:at])

    return make


def twice(path: Path) -> None:
    made = two_layers()
    made.graph.initializer.append(made.graph.initializer[0])
    g.save(made, path)


def message(field: int, raw: bytes) -> bytes:
    """A field of protobuf that holds bytes."""
    size, length = len(raw), b""
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + raw


def deep(path: Path) -> None:
    """Graphs within graphs, more than protobuf itself would read."""
    graph = b""
    for _ in range(300):
        graph = message(1, message(5, message(1, b"then_branch") + message(6, graph)))
    path.write_bytes(b"\x08\x0a" + message(7, graph))


def endless(path: Path) -> None:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    call = [helper.make_node("F", ["x", "w"], ["o"], domain="own") for _ in range(2)]
    function = helper.make_function("own", "F", ["x", "w"], ["o"], call, imports)
    nodes = [helper.make_node("F", ["x", "w"], ["y"], domain="own")]
    made = g.model(nodes, [g.tensor("w", W.T)], {"x": [4, 5]}, functions=[function])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.SerializeToString())


def giant_count(path: Path) -> None:
    external(path, {"w": "d", "head.weight_t": "d"}, 64)
    raw = path.read_bytes()
    path.write_bytes(raw + b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")  # another graph of 2**63 bytes


def dims(*values: int) -> Callable[[Path], None]:
    def change(made: onnx.ModelProto) -> None:
        del made.graph.initializer[0].dims[:]
        made.graph.initializer[0].dims.extend(values)

    return edited(change)


def dtype(value: int) -> Callable[[Path], None]:
    return edited(lambda m: setattr(m.graph.initializer[0], "data_type", value))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "absolute": (location("/etc/passwd"), "onnx.location"),
    "parent": (location("../d"), "onnx.location"),
    "inner parent": (location("a/../../d"), "onnx.location"),
    "windows": (location("C:\\x"), "onnx.location"),
    "backslash": (location("..\\d"), "onnx.location"),
    "dot": (location("./d"), "onnx.location"),
    "nul": (location("d\0"), "onnx.location"),
    "link": (linked, "onnx.location"),
    "linked folder": (linked_folder, "onnx.location"),
    "itself": (location("m.onnx"), "onnx.overlap"),
    "directory": (location("folder"), "input.directory"),
    "no location": (location(""), "onnx.damaged"),
    "missing": (missing, "onnx.missing-data"),
    "truncated data": (truncated, "onnx.truncated"),
    "offset beyond": (edited(lambda m: entry(m, "offset", "999999")), "onnx.truncated"),
    "offset of 2**70": (edited(lambda m: entry(m, "offset", str(2**70))), "onnx.damaged"),
    "offset of letters": (edited(lambda m: entry(m, "offset", "0x10")), "onnx.damaged"),
    "negative offset": (edited(lambda m: entry(m, "offset", "-8")), "onnx.damaged"),
    "length": (edited(lambda m: entry(m, "length", "8")), "onnx.size"),
    "overlap": (edited(lambda m: entry(m, "offset", "64")), "onnx.overlap"),
    "checksum": (edited(lambda m: entry(m, "checksum", "0" * 40)), "onnx.checksum"),
    "negative shape": (dims(-5, -6), "onnx.size"),
    "huge shape": (dims(2**62, 2**62, 0), "onnx.size"),
    "wrong shape": (dims(5, 7), "onnx.size"),
    "many axes": (dims(*[1] * 65), "onnx.limit"),
    "unknown dtype": (dtype(99), "onnx.dtype"),
    "no dtype": (dtype(0), "onnx.dtype"),
    "two of a name": (twice, "onnx.duplicate"),
    "half a file": (cut(100), "onnx.damaged"),
    "a few bytes": (cut(9), "onnx.damaged"),
    "deep": (deep, "onnx.limit"),
    "endless functions": (endless, "onnx.limit"),
    "giant count": (giant_count, "onnx.damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_and_nothing_is_written(tmp_path: Path, adapter: Path, name: str) -> None:
    make, code = HOSTILE[name]
    path = tmp_path / "base" / "m.onnx"
    (tmp_path / "base" / "folder").mkdir(parents=True)
    make(path)
    gc.collect()  # what earlier tests left open is closed when it is collected
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    error = refused(code, lm.merge, path, adapter, out=tmp_path / "out.onnx")
    assert error.exit_code == 3
    gc.collect()
    assert not opened or len(os.listdir("/proc/self/fd")) <= opened + 2  # the adapter that was opened first


def test_any_byte_may_be_wrong(tmp_path: Path, adapter: Path) -> None:
    """Every byte of a small model changed: an error of ours or a model of other weights, never anything else."""
    path = g.save(two_layers(), tmp_path / "base" / "m.onnx")
    raw = path.read_bytes()
    refusals = 0
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        try:
            lm.plan_merge(path, adapter, tmp_path / "out.onnx")
        except LoramergeError:
            refusals += 1
    assert refusals > len(raw) // 4
    assert not (tmp_path / "out.onnx").exists()


def test_the_links_of_a_download_cache_are_followed(tmp_path: Path, adapter: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    base = external(blobs / "m.onnx", {"w": "d", "head.weight_t": "d"}, 64)
    snapshot.mkdir(parents=True)
    os.symlink(base, snapshot / "m.onnx")
    os.symlink(blobs / "d", snapshot / "d")
    lm.merge(snapshot / "m.onnx", adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "d").is_symlink()
    close(g.run(tmp_path / "out" / "m.onnx", {"x": X}), want())


def test_a_long_run_of_other_bytes_is_carried_and_checked(tmp_path: Path, adapter: Path) -> None:
    base = external(tmp_path / "base" / "m.onnx", {"w": "d", "head.weight_t": "d"}, 64)
    with open(tmp_path / "base" / "d", "ab") as out:
        out.write(np.random.default_rng(1).bytes(9_000_000))
    lm.merge(base, adapter, tmp_path / "out")
    old, new = (tmp_path / "base" / "d").read_bytes(), (tmp_path / "out" / "d").read_bytes()
    assert old[-9_000_000:] == new[-9_000_000:] and len(old) == len(new)
    assert lm.verify(tmp_path / "out")["ok"]


def test_the_command_line(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loramerge.cli.main import run as shell

    base = external(tmp_path / "base" / "m.onnx", {"w": "d", "head.weight_t": "d"}, 64)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "m.onnx"

    def called(*arguments: object) -> tuple[int, str, str]:
        code = shell([str(a) for a in arguments])
        text = capsys.readouterr()
        return code, text.out, text.err

    code, text, _ = called("merge", base, adapter, "-o", out, "--reversible", "--json")
    assert code == 0 and json.loads(text)["tensors_changed"] == 2
    close(g.run(out, {"x": X}), want())
    assert called("verify", out)[0] == 0
    assert called("diff", base, out)[0] == 1
    code, text, _ = called("inspect", out, "--json")
    assert code == 0 and json.loads(text)["receipt"]["adapters"]
    code, _, err = called("merge", base, adapter, "-o", tmp_path / "o.onnx", "--dtype", "float16")
    assert code == 2 and err.count("\n") == 2 and "fix:" in err
    stranger = g.lora(tmp_path / "stranger", {"other.gate": g.factors(3, 6, 5, 2)})
    code, _, err = called("merge", base, stranger, "-o", tmp_path / "o.onnx")
    assert code == 3 and "--base" in err
    assert not (tmp_path / "o.onnx").exists()


def test_commands_that_need_modules_refuse_a_graph(tmp_path: Path, adapter: Path) -> None:
    base = g.save(two_layers(), tmp_path / "base" / "m.onnx")
    for call in (
        lambda: lm.convert(adapter, tmp_path / "out.safetensors", "kohya", base=base),
        lambda: lm.extract(base, base, tmp_path / "out", rank=1),
        lambda: lm.merge(g.checkpoint(tmp_path / "ckpt", {"fc.weight": W}), base, tmp_path / "out"),
    ):
        with pytest.raises(LoramergeError) as caught:
            call()
        assert caught.value.code == "base.onnx" and caught.value.exit_code == 3
