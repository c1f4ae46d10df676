"""The report as pictures, drawn by matplotlib where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramerge.errors import UsageError
from loramerge.tensors.output import Output

Row = Mapping[str, Any]

SIDES = {"right": "inputs of B A", "left": "outputs of B A", "A": "A alone", "B": "B alone"}
MOST_LINES = 40
"""Modules that a picture of spectra has a line each for; of more, the largest changes."""


def check() -> None:
    """
    Raises:
        UsageError: `usage.plot`: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "usage.plot",
            "pictures need matplotlib",
            fix="pip install 'loramerge[plot]', or --html FILE, which needs nothing",
        )


def write(data: Row, place: Path, force: bool) -> None:
    """`spectra-N.png` for every adapter, `similarity-N-M.png` for every two, `base-N.png` with a base."""
    from matplotlib.figure import Figure

    figures: dict[str, Figure] = {}
    for k, adapter in enumerate(data["adapters"]):
        figures[f"spectra-{k + 1}.png"] = _spectra(data["modules"], k, adapter["source"])
        if adapter.get("retention"):
            figures[f"base-{k + 1}.png"] = _against_base(data["modules"], k, adapter["source"])
    for pair in data["pairs"]:
        if pair["phi"]:
            names = [data["adapters"][pair[side]]["source"] for side in ("a", "b")]
            figures[f"similarity-{pair['a'] + 1}-{pair['b'] + 1}.png"] = _similarity(pair, names)
    with Output(place, "directory", force) as output:
        for name, figure in figures.items():
            figure.savefig(output.directory / name, dpi=150, metadata={"Software": None})
        output.commit()


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics between dollar signs."""
    return text.replace("$", r"\$")


def _spectra(modules: Sequence[Row], k: int, name: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [u for row in modules if (u := row["updates"][k]) is not None and u["rank"]]
    for u in sorted(rows, key=lambda u: -u["norm"])[:MOST_LINES]:
        axes.plot(range(1, u["rank"] + 1), u["singular_values"], linewidth=0.8, alpha=0.6, color="#0550ae")
    axes.set(
        yscale="log" if rows else "linear",
        xlabel="number of the singular value",
        ylabel="singular value",
        title=_plain(name),
    )
    return figure


def _against_base(modules: Sequence[Row], k: int, name: str) -> Any:
    from matplotlib.figure import Figure

    rows = [u for row in modules if (u := row["updates"][k]) is not None and "amplification" in u]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for at, (title, values) in enumerate(
        (
            ("change over weight", [u["relative_norm"] for u in rows]),
            ("amplification", [u["amplification"]["factor"] for u in rows]),
            ("kept when merged", [u["retention"]["keep"] for u in rows]),
        )
    ):
        axes = figure.add_subplot(1, 3, at + 1)
        axes.plot([float("nan") if v is None else v for v in values], ".", color="#0550ae")
        axes.set(title=title, xlabel="module, in order")
    figure.suptitle(_plain(name))
    return figure


def _similarity(pair: Row, names: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    tables = [(SIDES[side], pair["phi"][side]) for side in SIDES if side in pair["phi"]]
    figure = Figure(figsize=(3.4 * len(tables), 3.6), layout="constrained")
    for at, (title, table) in enumerate(tables):
        axes = figure.add_subplot(1, len(tables), at + 1)
        mesh = axes.pcolormesh(table["j"], table["i"], table["mean"], vmin=0, vmax=1, shading="nearest", cmap="viridis")
        axes.set(title=title, xlabel=_plain(f"j: {names[1]}"), ylabel=_plain(f"i: {names[0]}"))
    figure.colorbar(mesh, ax=figure.axes, label="similarity")
    return figure
