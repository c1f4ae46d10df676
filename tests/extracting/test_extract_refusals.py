"""Extraction of what cannot be extracted: an error that names it and the way out, and never a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tuned import dense, load, low_rank, make, tensors_of, tune, with_peft

import loramerge as lm
from loramerge.errors import LoramergeError

Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return make("llama", folder / "base"), tune(make("llama", folder / "again"), folder / "tuned")


def edited(folder: Path, out: Path, edit: Edit, **config: Any) -> Path:
    """A copy of a checkpoint with other tensors."""
    out.mkdir()
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    known = json.loads((folder / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(known))
    return out


def refused(base: Path, tuned: Path, out: Path, **options: Any) -> LoramergeError:
    """The error, after which nothing is there."""
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(LoramergeError) as caught:
        lm.extract(base, tuned, out, **({"rank": 4} | options))
    assert sorted(p.name for p in out.parent.iterdir()) == before
    assert caught.value.fix
    return caught.value


def drop(*names: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return edit


def put(name: str, value: Tensor) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value

    return edit


K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def test_no_difference_is_no_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    error = refused(base, edited(base, tmp_path / "same", lambda tensors: None), tmp_path / "lora")
    assert error.code == "extract.equal" and error.exit_code == 3


def test_other_bytes_of_the_same_numbers_are_no_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[K_PROJ] = tensors[K_PROJ].double()

    error = refused(base, edited(base, tmp_path / "wide", widen), tmp_path / "lora")
    assert error.code == "extract.empty" and error.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", [K_PROJ, "model.norm.weight"])
def test_values_that_are_no_numbers_are_told_with_their_file(
    value: float, side: str, name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].flatten()[5] = value

    folders = {"base": pair[0], "tuned": pair[1]}
    folders[side] = edited(folders[side], tmp_path / side, spoil)
    error = refused(folders["base"], folders["tuned"], tmp_path / "lora")
    assert error.code == "extract.non-finite" and error.tensors == (name,)
    assert error.file == str(folders[side]) and "1 value" in error.message
    data = lm.extract(folders["base"], folders["tuned"], tmp_path / "lora", rank=4, exclude=[name])
    assert data["tensors"]["excluded"] == 1


def test_missing_and_further_tensors_are_named_and_can_be_left_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    less = edited(tuned, tmp_path / "less", drop(K_PROJ))
    error = refused(base, less, tmp_path / "lora")
    assert error.code == "extract.missing" and error.tensors == (K_PROJ,) and K_PROJ in error.fix
    more = edited(tuned, tmp_path / "more", put("value_head.weight", torch.randn(1, 32)))
    error = refused(base, more, tmp_path / "lora")
    assert error.code == "extract.extra" and error.tensors == ("value_head.weight",)
    for folder, glob in ((less, K_PROJ), (more, "value_head")):
        data = lm.extract(base, folder, tmp_path / "lora", rank=4, exclude=[glob], force=True)
        assert data["modules"] >= 13


def test_other_shapes_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    wider = edited(tuned, tmp_path / "wider", put(K_PROJ, torch.randn(24, 32)))
    error = refused(base, wider, tmp_path / "lora")
    assert error.code == "extract.shape" and error.tensors == (K_PROJ,)
    assert "(16, 32)" in error.message and "(24, 32)" in error.message


def test_another_architecture_is_told_as_such(pair: tuple[Path, Path], tmp_path: Path) -> None:
    error = refused(pair[0], make("gpt2", tmp_path / "gpt2"), tmp_path / "lora")
    assert error.code == "extract.architecture" and "not one architecture" in error.message


def test_what_a_name_may_mean_is_asked_of_the_config(tmp_path: Path) -> None:
    base = make("gpt2", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    files = (base / "model.safetensors", tuned / "model.safetensors")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for file, folder in zip(files, ("a", "b"), strict=True):
        (tmp_path / folder / "weights.safetensors").write_bytes(file.read_bytes())
    error = refused(tmp_path / "a" / "weights.safetensors", tmp_path / "b" / "weights.safetensors", tmp_path / "lora")
    assert error.code == "extract.config" and "config.json" in error.fix


def test_a_module_goes_whole_with_what_was_excluded_of_it(tmp_path: Path) -> None:
    """PEFT wants every parameter of a module that its config lists."""
    base = make("bert", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    data = lm.extract(base, tuned, tmp_path / "lora", rank=4, exclude=["*LayerNorm.bias"])
    same = {row["name"] for row in data["whole"] if row["how"] == "unchanged"}
    assert same == {name for name in tensors_of(base) if name.endswith("LayerNorm.bias")}
    with_peft(base, tmp_path / "lora")


def test_what_a_model_makes_for_itself_may_be_missing(tmp_path: Path) -> None:
    """The files of older releases hold the positions, 0 to n - 1."""
    made = make("bert", tmp_path / "made")
    base = edited(made, tmp_path / "base", put("embeddings.position_ids", torch.arange(24)[None]))
    data = lm.extract(base, tune(made, tmp_path / "tuned"), tmp_path / "lora", rank=4)
    assert any("position_ids" in note for note in data["notes"])
    with_peft(base, tmp_path / "lora")


def test_an_adapter_is_no_fine_tune(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    lm.extract(base, tuned, tmp_path / "lora", rank=2)
    assert refused(base, tmp_path / "lora", tmp_path / "again").code == "base.is-adapter"


def test_a_head_that_only_the_fine_tune_has_of_its_own(tmp_path: Path) -> None:
    base = make("tied", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")

    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1

    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    untied = edited(tuned, tmp_path / "untied", untie, tie_word_embeddings=False)
    error = refused(base, untied, tmp_path / "lora")
    assert error.code == "extract.tied" and "lm_head.weight" in error.fix
    data = lm.extract(base, edited(tuned, tmp_path / "twice", twice), tmp_path / "lora", rank=64)
    assert data["model_error"] < 1e-6 and any("stored twice" in note for note in data["notes"])


def test_integers_that_changed_are_no_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    codes = [torch.randint(0, 99, (16, 32), dtype=torch.uint8) for _ in range(2)]
    a = edited(base, tmp_path / "a", put(K_PROJ, codes[0]))
    b = edited(tuned, tmp_path / "b", put(K_PROJ, codes[1]))
    error = refused(a, b, tmp_path / "lora")
    assert error.code == "extract.dtype" and error.tensors == (K_PROJ,)


def test_a_budget_that_holds_nothing_says_what_would(pair: tuple[Path, Path], tmp_path: Path) -> None:
    error = refused(*pair, tmp_path / "lora", budget=5000)
    assert error.code == "usage.budget" and error.exit_code == 2
    least = int(error.fix.split("at least ")[1].split(" ")[0])
    data = lm.extract(*pair, tmp_path / "lora", budget=least)
    assert data["modules"] == 1 and data["files"]["adapter_model.safetensors"] <= least


@pytest.mark.parametrize("budget", [30_000, 60_000, 200_000])
def test_a_budget_is_kept_and_spent_where_it_counts(budget: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    data = lm.extract(base, tuned, tmp_path / "lora", budget=budget)
    assert data["files"]["adapter_model.safetensors"] <= budget
    # What was not taken is worth no more for its bytes than what was.
    before, after = tensors_of(base), tensors_of(tuned)
    taken, left = [], []
    for row in data["rows"]:
        key = f"{row['module']}.weight"
        values = torch.linalg.svdvals(after[key].double() - before[key].double()).square() / sum(row["shape"])
        taken += values[: row["rank"]].tolist()
        left += values[row["rank"] :].tolist()
    if budget < 200_000:
        assert left and taken and max(left) < 1.5 * min(taken)
    else:
        assert data["model_error"] < 1e-6


def test_nothing_said_about_size_is_a_usage_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for options in ({"rank": None}, {"rank": 0}, {"rank": -3}, {"energy": 0.0}, {"energy": 1.5}, {"jobs": 0}):
        assert refused(*pair, tmp_path / "lora", **options).exit_code == 2
    assert refused(*pair, tmp_path / "lora", device="cuda:77").exit_code == 2


def test_an_output_that_is_there_stays(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    assert refused(*pair, tmp_path / "lora").exit_code == 4
    assert refused(*pair, pair[0], force=True).exit_code == 4
    assert load_file(pair[0] / "model.safetensors")


def test_changes_that_are_the_rounding_of_bf16_are_left_out(tmp_path: Path) -> None:
    """Training changed q_proj by rank 2; saving in bf16 changed every weight."""
    base = make("llama", tmp_path / "base")
    trained = tensors_of(tune(base, tmp_path / "trained", low_rank(2), only=lambda n: "q_proj" in n))

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name, value in trained.items():
            tensors[name] = value.bfloat16()

    tuned = edited(base, tmp_path / "tuned", narrow)
    options = {"rank": 16, "only_linear": True}
    data = lm.extract(base, tuned, tmp_path / "lora", **options)
    ranks = {row["module"]: row["rank"] for row in data["rows"]}
    others = [rank for module, rank in ranks.items() if "q_proj" not in module]
    # The largest singular value of the noise of so small a matrix varies: a little of it may pass.
    assert {rank for module, rank in ranks.items() if "q_proj" in module} <= {2, 3}
    assert len(others) == 12 and max(others) <= 1 and others.count(0) >= 9
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(data["rank_zero"]).isdisjoint(config["target_modules"]) and len(data["rank_zero"]) == others.count(0)
    assert any("rounding" in note for note in data["notes"])
    data = lm.extract(base, tuned, tmp_path / "all", noise_floor=False, **options)
    assert {row["rank"] for row in data["rows"]} == {16}
    none = {"include": [sorted(data["rank_zero"] or [m for m, rank in ranks.items() if not rank])[0]], **options}
    error = refused(base, tuned, tmp_path / "none", **none)
    assert error.code == "extract.empty" and "--no-noise-floor" in error.fix


def test_bytes_do_not_depend_on_the_workers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = []
    for jobs in (1, 2, 5):
        lm.extract(*pair, tmp_path / f"lora{jobs}", budget=60_000, jobs=jobs)
        files.append({p.name: p.read_bytes() for p in (tmp_path / f"lora{jobs}").iterdir()})
    assert files[0] == files[1] == files[2]
    assert set(files[0]) == {"adapter_model.safetensors", "adapter_config.json"}


def test_a_dry_run_decides_all_and_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    planned = lm.extract(*pair, tmp_path / "lora", rank=4, dry_run=True)
    assert not list(tmp_path.iterdir())
    done = lm.extract(*pair, tmp_path / "lora", rank=4)
    assert [row["module"] for row in planned["rows"]] == [row["module"] for row in done["rows"]]
    assert [row["rank"] for row in planned["rows"]] == [row["rank"] for row in done["rows"]]
    assert [w["name"] for w in planned["whole"]] == [w["name"] for w in done["whole"]]
    assert done["files"]["adapter_model.safetensors"] - 20_000 < planned["bytes_at_most"] < done["bytes"]


def test_pickled_checkpoints_are_read_only_when_allowed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tuned / "config.json").read_bytes())
    torch.save(tensors_of(tuned), tmp_path / "pickled" / "pytorch_model.bin")
    assert refused(base, tmp_path / "pickled", tmp_path / "lora").code == "pickle.refused"
    lm.extract(base, tmp_path / "pickled", tmp_path / "lora", rank=4, allow_pickle=True)
    lm.extract(base, tuned, tmp_path / "other", rank=4)
    assert (tmp_path / "lora/adapter_model.safetensors").read_bytes() == (
        tmp_path / "other/adapter_model.safetensors"
    ).read_bytes()


def test_experts_in_one_tensor_are_refused_where_a_dialect_has_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    stacked = "model.layers.0.mlp.experts.gate_up_proj"
    values = [torch.randn(4, 16, 32) for _ in range(2)]
    a, b = edited(base, tmp_path / "a", put(stacked, values[0])), edited(tuned, tmp_path / "b", put(stacked, values[1]))
    assert load(base) is not None and dense("", values[0]).shape == (4, 16, 32)
    error = refused(a, b, tmp_path / "lora", to="mlx", exclude=["*norm*", "*embed*", "lm_head"])
    assert error.code == "extract.kind" and stacked in error.tensors and "--only-linear" in error.fix
