"""Writes an adapter from items: named, expressed and arranged for a target, read back, committed all or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from loramerge import pickled
from loramerge.adapters.opening import open_adapter
from loramerge.binding.namespace import Namespace
from loramerge.converting.arrange import architecture, arranged, own_names
from loramerge.converting.express import Expressed, express
from loramerge.converting.items import PAIR, Item, item_of
from loramerge.converting.naming import named
from loramerge.converting.target import Target
from loramerge.converting.write import Built, build, destination, keys_of
from loramerge.errors import LoramergeError
from loramerge.tensors.output import Output, check_destination, check_space
from loramerge.tensors.writer import write_small_file

CLOSE = 1e-6
"""How far a scale that is read back may be from what was meant (alpha is kept as float32 in some files)."""


@dataclass(frozen=True)
class Prepared:
    """An adapter that is ready to be written: its files in memory, where they go, what they must read back as."""

    place: Path
    target: Target
    expressed: Expressed
    built: Built
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(map(len, self.built.files.values()))

    def write(self, *, force: bool = False) -> None:
        """Writes all files and reads them back before anything is seen at the place.

        Raises:
            OutputError. LoramergeError: `convert.check`: what was written is not what was meant.
        """
        check_space(self.place, self.nbytes)
        with Output(self.place, self.built.what, force) as output:
            for name, data in self.built.files.items():
                write_small_file(output.directory / name, data)
            _check(output.directory / self.built.weights, self.target, self.expressed)
            output.commit()


def check_place(out: str | Path, target: Target, inputs: Sequence[str | Path], *, force: bool = False) -> None:
    """Whether an adapter for the target can be written to `out`, before anything is read.

    Raises:
        UsageError: `output.name`. OutputError: it exists, lies in an input, or cannot be written.
    """
    what, _ = destination(Path(out), target)
    check_destination(Path(out), inputs=[Path(path) for path in inputs], force=force, what=what)


def prepare(
    items: Sequence[Item],
    target: Target,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    names: Namespace | None = None,
    metadata: Mapping[str, str] | None = None,
    as_they_are: bool = False,
    rank: int | None = None,
    drop: bool = False,
    where: str = "",
) -> Prepared:
    """Items of any kinds as an adapter for a target.

    Args:
        items: by role and path (see `naming.with_roles`), factors in the dtype that they are written in; `pair` and
            `whole` make them.
        settings: what a config says that is no number of a module, under our names: `task`, `base`, `bias`, `tied`,
            `token-rows`, `modules-to-save`.
        names: of the base, where there is one; some targets cannot do without.
        metadata: entries of a source's weight file that still hold.
        as_they_are: `module` of the items is what the target calls them already, the prefix of a component included.
        rank: of the pairs that take the place of what the target cannot hold.
        drop: leave out what it cannot hold.
        where: the input that errors are about.

    Raises:
        UnsupportedError: `convert.kind`, `convert.components`, `convert.empty`; MismatchError: `convert.needs-base`.
    """
    place, notes = Path(out), list[str]()
    what, file = destination(place, target)
    known = {**(settings or {}), "architecture": architecture(target, names, where)}
    called = _own if as_they_are and target.roles else named
    called(items, target, where, [])  # what has no name is told before all else
    expressed = express(items, target, rank=rank, drop=drop, where=where)
    own = own_names(arranged(expressed.items, target, names, known), target, known, where)
    expressed = replace(expressed, items=tuple(called(own, target, where, notes)))
    return Prepared(place, target, expressed, build(expressed, target, what, file, known, metadata), tuple(notes))


def _own(items: Sequence[Item], target: Target, where: str, notes: list[str]) -> list[Item]:
    """`naming.named` for items that keep their names."""
    return [replace(item, path=item.module) for item in items]


def pair(
    path: str,
    B: Tensor,
    A: Tensor,
    *,
    shape: Sequence[int] | None = None,
    exact_shape: bool = False,
    embedding: bool = False,
    scale: float = 1.0,
    role: str = "",
    flat: bool = False,
    leaf: str = "",
    bias: Tensor | None = None,
) -> Item:
    """The update `scale B A` of one module as an item.

    Args:
        path: of the module, as the model names it, without the prefix of a component.
        B: (out, r). A: (r, in * prod(kernel)). Both in the dtype that is written.
        shape: of the weight (out, in, *kernel) where it is a convolution's. `exact_shape`: a base told it.
        embedding: the module is an embedding: B is (dim, r) and A (r, vocabulary), the change of its weight (B A)^T.
        role, flat: the component of a pipeline, and whether `path` has `_` for `.`; see `naming.with_roles`.
        leaf: the parameter, where it is not the weight.
        bias: (out,), a change of the module's bias, scaled along.
    """
    sizes = tuple(shape) if shape is not None else (B.shape[0], A.shape[1])
    factors: dict[str, Tensor]
    if embedding:
        factors = {"embedding-A": A.contiguous(), "embedding-B": B.contiguous()}
    else:
        if prod(sizes[1:]) != A.shape[1] or sizes[0] != B.shape[0]:
            raise ValueError(f"factors {tuple(B.shape)} and {tuple(A.shape)} for a weight {sizes}")
        ones = [1] * (len(sizes) - 2)
        factors = {
            "A": A.reshape(A.shape[0], *sizes[1:]).contiguous(),
            "B": B.reshape(*B.shape, *ones).contiguous(),
        }
    if bias is not None:
        factors["bias"] = bias
    return Item(
        path,
        PAIR,
        factors,
        scale,
        leaf=leaf,
        role=role,
        path=path,
        flat=flat,
        shape=sizes,
        exact_shape=exact_shape,
    )


def whole(path: str, leaf: str, value: Tensor, *, role: str = "", flat: bool = False) -> Item:
    """A parameter that the adapter brings whole, in place of the model's: `path`.`leaf`."""
    return Item(path, "plain", {"value": value}, leaf=leaf, role=role, path=path, flat=flat)


def difference(path: str, leaf: str, value: Tensor, *, role: str = "", flat: bool = False) -> Item:
    """What is added to a parameter, of its shape."""
    return Item(path, "difference", {"diff": value}, leaf=leaf, role=role, path=path, flat=flat, shape=value.shape)


def _check(weights: Path, target: Target, expressed: Expressed) -> None:
    """Reads back what was written: every module there, of its kind, with its scale."""
    folder = weights.parent if "config" in target.write else weights
    again = open_adapter(folder, alpha=expressed.alpha, read_pickle=pickled.read_header)
    try:
        found = {}
        stacked = {item.parameter.rpartition(".")[0] for item in expressed.items if item.parameter}
        for module in again.modules:
            if module.path in stacked:
                continue  # which of its parameters is meant, only a base tells
            item = item_of(again, module, written=True)
            found[module.path, item.kind] = item
        for item in expressed.items:
            if item.kind == "plain" or item.parameter:
                continue
            key = next(keys_of(item, target))[0]
            read = found.get((again.dialect.parse(key, again.checkpoint.tensors).path, item.kind))
            if read is None or (
                item.rank is not None and not math.isclose(read.scale, item.scale, rel_tol=CLOSE, abs_tol=1e-30)
            ):
                what = "is not found" if read is None else f"has the scale {read.scale}, not {item.scale}"
                raise LoramergeError("convert.check", f"what was written does not read back: {item.path} {what}")
    finally:
        again.checkpoint.close()
