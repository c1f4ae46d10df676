"""How many singular values to keep: rules for one module, and a byte budget over all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loramerge.algebra.core import RankRule


def fixed(k: int) -> RankRule:
    """At most k."""
    if k < 0:
        raise ValueError(f"a rank cannot be {k}")
    return lambda s: min(k, len(s))


def energy(share: float) -> RankRule:
    """The smallest k with `sum_{j<=k} s_j^2 >= share * sum s_j^2`, share in (0, 1] (PEFT's rank as a fraction)."""
    _check_share(share)
    return lambda s: _reach(s.double().square(), share)


def frobenius(share: float) -> RankRule:
    """The smallest k with `‖D_k‖ >= share * ‖D‖`, share in (0, 1]: the energy rule at share^2 (sd-scripts `sv_fro`)."""
    _check_share(share)
    return energy(share * share)


def cumulative(share: float) -> RankRule:
    """The smallest k with `sum_{j<=k} s_j >= share * sum s_j`, share in (0, 1] (sd-scripts `sv_cumulative`)."""
    _check_share(share)
    return lambda s: _reach(s.double(), share)


def ratio(largest: float) -> RankRule:
    """All `s_j > s_1 / largest`, largest > 1 (sd-scripts `sv_ratio`; LyCORIS writes `s_j > q s_1`)."""
    if not largest > 1:
        raise ValueError(f"the ratio of the largest singular value to the smallest kept must exceed 1, not {largest}")
    return lambda s: int((s > s[0] / largest).sum()) if len(s) else 0


def threshold(size: float) -> RankRule:
    """All `s_j > size`, size >= 0."""
    if not size >= 0:
        raise ValueError(f"the threshold must not be negative, as {size} is")
    return lambda s: int((s > size).sum())


def budget(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    limit: int,
    bytes_per_element: int = 4,
) -> dict[str, int]:
    """Ranks of all modules whose factors together take at most `limit` bytes.

    Minimises `sum over modules, sum_{j > r} s_j^2` subject to `sum r (m + n) bytes_per_element <= limit` by taking
    singular values in the order of `s_j^2 / (m + n)`, falling. A value for which no room is left ends its module, not
    the others. Equal values go by module name. Optimal where all modules have one size; elsewhere away from it by less
    than the energy of the first value that did not fit.

    Args:
        spectra: singular values of every module, (k,) falling.
        shapes: (m, n) of every module.

    Returns:
        Rank of every module, 0 where nothing of it is kept.
    """
    if limit < 0 or bytes_per_element <= 0:
        raise ValueError(f"a budget of {limit} bytes at {bytes_per_element} bytes an element")
    costs = {name: sum(shapes[name]) * bytes_per_element for name in spectra}
    gains = [
        (-value * value / costs[name], name)
        for name, s in spectra.items()
        for value in s.double().tolist()
        if value > 0
    ]
    ranks = dict.fromkeys(spectra, 0)
    left = limit
    for _, name in sorted(gains):
        # Values of one module come in order and cost the same: after one without room there is none for the next.
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"the share to keep must be above 0 and at most 1, not {share}")


def _reach(values: Tensor, share: float) -> int:
    """The smallest k at which the sum of the first k values reaches the share of all."""
    if not len(values) or not values[0] > 0:
        return 0
    sums = values.cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1
