"""Every number of the analysis against its formula on the dense matrices, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_zoo import (
    WEIGHTS,
    Array,
    dense,
    factors,
    phi,
    retention,
    rounded,
    spectrum,
    svd,
    write_adapter,
    write_base,
)

import loramerge as lm

RANKS = {
    "one": {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.self_attn.k_proj": 5,
        "model.layers.0.mlp.up_proj": 1,
        "model.layers.0.mlp.down_proj": 8,
    },
    "two": {
        "model.layers.0.self_attn.q_proj": 6,
        "model.layers.0.self_attn.k_proj": 3,
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.1.self_attn.q_proj": 6,
    },
}
ALPHA, WEIGHT = {"one": 8.0, "two": 3.0}, {"one": 0.7, "two": -1.5}
DTYPE = {"one": torch.float32, "two": torch.bfloat16}
CLOSE = {"rel": 1e-8, "abs": 1e-12}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("case")
    weights = write_base(folder / "base")
    held = {name: factors(at + 1, RANKS[name], DTYPE[name]) for at, name in enumerate(RANKS)}
    deltas = {}
    for name, modules in held.items():
        write_adapter(folder / name, modules, ALPHA[name])
        # The config's alpha over each module's own rank: rank_pattern says the rank, alpha stays.
        deltas[name] = {m: dense(B, A, WEIGHT[name] * ALPHA[name] / A.shape[0]) for m, (B, A) in modules.items()}
    given = [(folder / name, WEIGHT[name]) for name in RANKS]
    return {
        "alone": lm.analyze(given, points=0, jobs=2),
        "base": lm.analyze(given, base=folder / "base", points=0, jobs=2),
        "deltas": deltas,
        "factors": held,
        "weights": {n.removesuffix(".weight"): w.double().numpy() for n, w in weights.items()},
        "folder": folder,
    }


def rows(case: dict[str, Any], how: str) -> dict[str, Any]:
    return {row["module"]: row for row in case[how]["modules"]}


def updates(case: dict[str, Any], how: str) -> list[tuple[str, str, dict[str, Any], Array]]:
    """(module, adapter, what is said of it, dense update)."""
    found = rows(case, how)
    return [
        (module, name, found[module]["updates"][at], case["deltas"][name][module])
        for at, name in enumerate(RANKS)
        for module in RANKS[name]
    ]


@pytest.mark.parametrize("how", ["alone", "base"])
def test_every_module_has_a_row_and_nothing_else(case: dict[str, Any], how: str) -> None:
    assert set(rows(case, how)) == RANKS["one"].keys() | RANKS["two"].keys()
    for row in case[how]["modules"]:
        assert tuple(row["shape"]) == WEIGHTS[row["module"]]
        assert [u is not None for u in row["updates"]] == [row["module"] in RANKS[name] for name in RANKS]


@pytest.mark.parametrize("how", ["alone", "base"])
def test_spectra(case: dict[str, Any], how: str) -> None:
    for module, name, said, D in updates(case, how):
        assert said["stored_rank"] == RANKS[name][module]
        for key, value in spectrum(D).items():
            assert said[key] == pytest.approx(value, **CLOSE), (module, name, key)
        assert said["singular_values"] == pytest.approx(list(svd(D)[1]), **CLOSE)


def test_similarity_of_updates_and_of_factors(case: dict[str, Any]) -> None:
    checked = 0
    for row in case["alone"]["modules"]:
        module = row["module"]
        for pair in row["pairs"]:
            D1, D2 = (case["deltas"][name][module] for name in RANKS)
            (U1, _, V1), (U2, _, V2) = svd(D1), svd(D2)
            (B1, A1), (B2, A2) = (case["factors"][name][module] for name in RANKS)
            sides = {
                "left": (U1, U2),
                "right": (V1, V2),
                "B": (svd(B1.double().numpy())[0], svd(B2.double().numpy())[0]),
                "A": (svd(A1.double().numpy())[2], svd(A2.double().numpy())[2]),
            }
            for side, (X, Y) in sides.items():
                table = pair["phi"][side]
                assert (table["i"], table["j"]) == (list(range(1, X.shape[1] + 1)), list(range(1, Y.shape[1] + 1)))
                want = [[phi(X, Y, i, j) for j in table["j"]] for i in table["i"]]
                assert np.allclose(table["phi"], want, rtol=1e-8, atol=1e-12), (module, side)
                assert table["dimension"] == X.shape[0]
                checked += 1
    assert checked == 3 * 4


def test_mean_similarity_and_its_chance_level(case: dict[str, Any]) -> None:
    both = [m for m in RANKS["one"] if m in RANKS["two"]]
    table = case["alone"]["pairs"][0]["phi"]["right"]
    assert table["modules"] == len(both) == 3
    for a, i in enumerate(table["i"]):
        for b, j in enumerate(table["j"]):
            here = [
                phi(svd(D1)[2], svd(D2)[2], i, j)
                for m in both
                if i <= len(svd(D1 := case["deltas"]["one"][m])[1]) and j <= len(svd(D2 := case["deltas"]["two"][m])[1])
            ]
            level = [max(i, j) / WEIGHTS[m][1] for m in both if i <= RANKS["one"][m] and j <= RANKS["two"][m]]
            if here:
                assert table["mean"][a][b] == pytest.approx(np.mean(here), rel=1e-8, abs=1e-11)
                assert table["chance"][a][b] == pytest.approx(np.mean(level), rel=1e-8)


@pytest.mark.parametrize("how", ["alone", "base"])
def test_collisions(case: dict[str, Any], how: str) -> None:
    for row in case[how]["modules"]:
        for pair in row["pairs"]:
            D1, D2 = (case["deltas"][name][row["module"]] for name in RANKS)
            (U1, _, V1), (U2, _, V2) = svd(D1), svd(D2)
            size = np.linalg.norm(D1) * np.linalg.norm(D2)
            assert pair["inner"] == pytest.approx(float((D1 * D2).sum()), rel=1e-8, abs=1e-10 * size)
            assert pair["cosine"] == pytest.approx(float((D1 * D2).sum()) / size, rel=1e-8, abs=1e-10)
            shares = {
                "first_left": np.linalg.norm(U2 @ U2.T @ D1) / np.linalg.norm(D1),
                "first_right": np.linalg.norm(D1 @ V2 @ V2.T) / np.linalg.norm(D1),
                "first_both": np.linalg.norm(U2 @ U2.T @ D1 @ V2 @ V2.T) / np.linalg.norm(D1),
                "second_left": np.linalg.norm(U1 @ U1.T @ D2) / np.linalg.norm(D2),
                "second_right": np.linalg.norm(D2 @ V1 @ V1.T) / np.linalg.norm(D2),
                "second_both": np.linalg.norm(U1 @ U1.T @ D2 @ V1 @ V1.T) / np.linalg.norm(D2),
            }
            for key, value in shares.items():
                assert pair["common"][key] == pytest.approx(value**2, **CLOSE), key
            m, n = D1.shape
            chances = {"first_left": U2.shape[1] / m, "second_right": U1.shape[1] / n}
            assert {key: pair["common_chance"][key] for key in chances} == pytest.approx(chances)
            opposed = (np.sign(D1) * np.sign(D2) < 0).sum() / (D1 * D2 != 0).sum()
            assert pair["sign_conflict"] == pytest.approx(opposed, rel=1e-12)
            lost = 1 - np.abs(D1 + D2).sum() / (np.abs(D1) + np.abs(D2)).sum()
            assert pair["cancelled"] == pytest.approx(lost, **CLOSE)
            level = np.minimum(np.abs(D1), np.abs(D2)).sum() / (np.abs(D1) + np.abs(D2)).sum()
            assert pair["cancelled_chance"] == pytest.approx(level, **CLOSE)


@pytest.mark.parametrize("how", ["alone", "base"])
def test_what_the_sum_keeps_of_each(case: dict[str, Any], how: str) -> None:
    zero = {m: np.zeros(WEIGHTS[m]) for m in WEIGHTS}
    total = {m: sum((case["deltas"][n].get(m, zero[m]) for n in RANKS), zero[m]) for m in WEIGHTS}
    for module, _, said, D in updates(case, how):
        S = total[module]
        assert said["survival"]["kept"] == pytest.approx((S * D).sum() / (D * D).sum(), **CLOSE)
        agreeing = (D * D)[S * D > 0].sum() / (D * D).sum()
        assert said["survival"]["kept_sign"] == pytest.approx(agreeing, **CLOSE)
    for at, name in enumerate(RANKS):
        inner = sum(float((total[m] * D).sum()) for m, D in case["deltas"][name].items())
        square = sum(float((D * D).sum()) for D in case["deltas"][name].values())
        assert case[how]["adapters"][at]["kept"] == pytest.approx(inner / square, **CLOSE)


def test_totals_of_a_pair_are_those_of_the_whole_updates(case: dict[str, Any]) -> None:
    one, two = (
        np.concatenate([case["deltas"][n].get(m, np.zeros(WEIGHTS[m])).ravel() for m in WEIGHTS]) for n in RANKS
    )
    pair = case["alone"]["pairs"][0]
    assert pair["cosine"] == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), **CLOSE)
    assert pair["modules"] == 3
    for at, whole in enumerate((one, two)):
        assert case["alone"]["adapters"][at]["norm"] == pytest.approx(np.linalg.norm(whole), **CLOSE)


def test_amplification_and_the_three_projections_of_table_7(case: dict[str, Any]) -> None:
    for module, _, said, D in updates(case, "base"):
        W = case["weights"][module]
        U, S, V = svd(D)
        k = len(S)
        told = said["amplification"]
        projection = np.linalg.norm(U.T @ W @ V)
        assert told["projection"] == pytest.approx(projection, **CLOSE)
        assert told["factor"] == pytest.approx(np.linalg.norm(D) / projection, **CLOSE)
        assert said["relative_norm"] == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W), **CLOSE)
        chance = k * np.linalg.norm(W) / np.sqrt(W.size)
        assert told["chance"] == pytest.approx(chance, **CLOSE)
        assert told["over_chance"] == pytest.approx(projection / chance, **CLOSE)
        UW, _, VW = svd(W, min(W.shape))
        assert [line["rank"] for line in told["table"]][-1] == k
        for line in told["table"]:
            r = line["rank"]
            assert line["update"] == pytest.approx(np.linalg.norm(U[:, :r].T @ W @ V[:, :r]), **CLOSE)
            assert line["base"] == pytest.approx(np.linalg.norm(UW[:, :r].T @ W @ VW[:, :r]), **CLOSE)
            assert line["random"] == pytest.approx(r * np.linalg.norm(W) / np.sqrt(W.size), **CLOSE)


def test_the_random_projection_is_the_root_mean_square_over_random_subspaces() -> None:
    rng = np.random.default_rng(0)
    W, r = rng.standard_normal((20, 30)) + 3, 4
    squares = []
    for _ in range(4000):
        U, V = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in W.shape)
        squares.append(np.linalg.norm(U.T @ W @ V) ** 2)
    assert np.sqrt(np.mean(squares)) == pytest.approx(r * np.linalg.norm(W) / np.sqrt(W.size), rel=0.05)


def test_directions_shared_with_the_weight(case: dict[str, Any]) -> None:
    for module, _, said, D in updates(case, "base"):
        W = case["weights"][module]
        U, S, V = svd(D)
        table = said["base_directions"]
        UW, SW, VW = svd(W, len(table["i"]))
        assert len(table["i"]) >= len(S) == len(table["j"])
        assert np.allclose(table["left"], [[phi(UW, U, i, j) for j in table["j"]] for i in table["i"]], rtol=1e-8)
        assert np.allclose(table["right"], [[phi(VW, V, i, j) for j in table["j"]] for i in table["i"]], rtol=1e-8)
        row = rows(case, "base")[module]["base"]
        assert row["singular_values"] == pytest.approx(list(SW), **CLOSE)
        assert (row["norm"], row["dtype"]) == (pytest.approx(np.linalg.norm(W), **CLOSE), "bfloat16")


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float16", "float32"])
def test_retention(case: dict[str, Any], dtype: str) -> None:
    assert (rounded(np.array([1.00390625, 1.01171875]), "bfloat16") == [1.0, 1.015625]).all()  # ties go to even
    kept, wanted = 0.0, 0.0
    for module, name, said, D in updates(case, "base"):
        want = retention(case["weights"][module], D, "bfloat16" if dtype == "keep" else dtype)
        assert said["retention"][dtype] == pytest.approx(want, rel=1e-8, abs=1e-9)
        if name == "one":
            kept, wanted = kept + want * (D * D).sum(), wanted + (D * D).sum()
    told = case["base"]["adapters"][0]["retention"][dtype]
    assert told["mean"] == pytest.approx(kept / wanted, rel=1e-8)
    least = min((said["retention"][dtype], module) for module, name, said, _ in updates(case, "base") if name == "one")
    assert (told["least"]["value"], told["least"]["module"]) == least


def test_retention_of_the_sum(case: dict[str, Any]) -> None:
    for row in case["base"]["modules"]:
        if all(row["updates"]):
            D = sum(case["deltas"][name][row["module"]] for name in RANKS)
            want = retention(case["weights"][row["module"]], D, "bfloat16")
            assert row["retention"]["keep"] == pytest.approx(want, rel=1e-8)


def test_counts(case: dict[str, Any]) -> None:
    one = case["base"]["adapters"][0]
    shapes = {m: WEIGHTS[m] for m in RANKS["one"]}
    parameters = sum(r * sum(shapes[m]) for m, r in RANKS["one"].items())
    changed = sum(m * n for m, n in shapes.values())
    model = sum(m * n for m, n in WEIGHTS.values()) + 24
    assert (one["parameters"], one["theta"], one["changed_parameters"]) == (parameters, parameters, changed)
    assert one["bytes"] == 4 * parameters
    assert one["fewer"] == pytest.approx(
        {"changed": changed / parameters, "model": model / parameters, "bytes": 2 * model / (4 * parameters)}
    )
    assert case["base"]["base"]["parameters"] == model


def test_numbers_do_not_depend_on_jobs(case: dict[str, Any]) -> None:
    given = [(case["folder"] / name, WEIGHT[name]) for name in RANKS]
    assert lm.analyze(given, base=case["folder"] / "base", points=0, jobs=1) == case["base"]


def test_a_change_of_basis_of_the_factors_changes_nothing_but_what_is_said_of_factors(tmp_path: Path) -> None:
    """(B M, M^-1 A) is the same update."""
    held = factors(1, RANKS["one"], torch.float64)
    g = torch.Generator().manual_seed(5)
    turned = {}
    for name, (B, A) in held.items():
        M = torch.randn(A.shape[0], A.shape[0], generator=g, dtype=torch.float64) + 3 * torch.eye(A.shape[0])
        turned[name] = B @ M, torch.linalg.inv(M) @ A
    write_adapter(tmp_path / "a", held)
    write_adapter(tmp_path / "b", turned)
    data = lm.analyze([tmp_path / "a", tmp_path / "b"], points=0)
    for row in data["modules"]:
        a, b = row["updates"]
        assert a["singular_values"] == pytest.approx(b["singular_values"], rel=1e-8)
        (pair,) = row["pairs"]
        assert pair["cosine"] == pytest.approx(1, abs=1e-12)
        for side in ("left", "right"):
            assert np.diag(pair["phi"][side]["phi"]) == pytest.approx(1, abs=1e-8)
        assert (pair["sign_conflict"], a["survival"]["kept"]) == (0, pytest.approx(2))
    assert data["pairs"][0]["phi"]["A"]["mean"][0][0] < 0.999
