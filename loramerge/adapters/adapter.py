"""An adapter as its trainer saved it: every factor by module, the values of its config, its scale."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loramerge.adapters.dialect import Dialect
from loramerge.adapters.patterns import Patterns
from loramerge.errors import InputError
from loramerge.tensors.checkpoint import Checkpoint, WeightFile
from loramerge.tensors.dtypes import display
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.text import quoted

FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")

_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


@dataclass(frozen=True, slots=True)
class Factor:
    """One tensor of an adapter file. `transposed`: the file holds its last two axes exchanged; `shape` is ours."""

    key: str
    info: TensorInfo
    file: WeightFile
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.info.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def scalar(self, where: str) -> float:
        """Its value, where it holds one number.

        Raises:
            InputError: `adapter.scalar` for more than one element, a dtype that is no number, or NaN.
        """
        if self.info.numel != 1:
            what = f"{display(self.info.dtype)} {self.info.shape}"
            raise InputError("adapter.scalar", f"{quoted(self.key)} is {what}, not one number", file=where)
        return self.numbers(where)[0]

    def numbers(self, where: str) -> tuple[float, ...]:
        """Its values, where it holds a few numbers (a shape, a scale).

        Raises:
            InputError: `adapter.scalar` for more than eight elements, a dtype that is no number, or NaN.
        """
        width = self.info.nbytes // max(1, self.info.numel)
        if self.info.numel > 8 or self.info.dtype not in (*_SCALARS, "BF16"):
            what = f"{display(self.info.dtype)} {self.info.shape}"
            raise InputError("adapter.scalar", f"{quoted(self.key)} is {what}, not a few numbers", file=where)
        raw = self.file.source.read(self.info.begin, self.info.nbytes)
        items = [raw[at : at + width] for at in range(0, len(raw), width)]
        if self.info.dtype == "BF16":
            values = [struct.unpack("<f", b"\0\0" + item)[0] for item in items]
        else:
            values = [struct.unpack(_SCALARS[self.info.dtype], item)[0] for item in items]
        if not all(map(math.isfinite, values)):
            raise InputError("adapter.scalar", f"{quoted(self.key)} is {values}", file=where, tensors=[self.key])
        return tuple(float(value) for value in values)


@dataclass(frozen=True)
class Module:
    """The factors that an adapter holds for one module, by factor name.

    `depth` and `inner` tell wrapped parameters of one module apart (see `ParsedKey`); `leaf` is the parameter that
    they change, where the kind does not say.
    """

    path: str
    kind: str
    depth: int
    inner: str
    factors: Mapping[str, Factor]
    leaf: str = ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Factor name -> shape."""
        return {name: factor.shape for name, factor in self.factors.items()}


@dataclass(frozen=True)
class Plain:
    """A parameter that the adapter brings whole: `path` is its full name, `X.weight`."""

    path: str
    factor: Factor
    depth: int
    saved: bool


@dataclass(frozen=True)
class Section:
    """The config of one component of a model, where an adapter file has several: for modules below `prefix`."""

    prefix: str
    settings: Mapping[str, Any]
    rank_pattern: Patterns
    alpha_pattern: Patterns


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, headers only. Made by `open_adapter`; nothing of its weights has been read.

    `settings` are the values of its config under the names that the dialect's table gives them
    (`alpha`, `rank`, `rslora`, ...). `transposed`: the keys of factors that lie transposed in the file.
    """

    name: str
    path: Path
    dialect: Dialect
    checkpoint: Checkpoint
    modules: tuple[Module, ...]
    plain: tuple[Plain, ...]
    harmless: tuple[str, ...]
    settings: Mapping[str, Any]
    rank_pattern: Patterns
    alpha_pattern: Patterns
    sections: tuple[Section, ...] = ()
    transposed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.checkpoint.nbytes

    def factors(self) -> dict[str, Factor]:
        """Every tensor of the adapter by key."""
        return {
            k: Factor(k, located.info, located.file, k in self.transposed)
            for k, located in self.checkpoint.tensors.items()
        }

    @cached_property
    def positions(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (its position among the modules of its kind, how many these are), in the order of the file."""
        counts: Counter[str] = Counter()
        found = {}
        for module in self.modules:
            found[module.path] = (module.kind, counts[module.kind])
            counts[module.kind] += 1
        return {path: (at, counts[kind]) for path, (kind, at) in found.items()}

    def section(self, name: str) -> Section:
        """The config that holds for the module of this name, and the name within it as patterns see it."""
        for section in self.sections:
            if name.startswith(section.prefix):
                return section
        return Section("", self.settings, self.rank_pattern, self.alpha_pattern)

    def alpha(self, module: Module) -> float | None:
        """The alpha that a module's own tensor says; None where it has none.

        Raises:
            InputError: `adapter.scalar`.
        """
        factor = module.factors.get("alpha")
        return None if factor is None else factor.scalar(self.name)

    def claimed_rank(self, name: str) -> int | None:
        """The rank that the config says of the module of this name; None where it says none."""
        section = self.section(name)
        claimed = self._claimed_rank(section, name.removeprefix(section.prefix))
        return None if claimed is None else int(claimed)

    @staticmethod
    def _claimed_rank(section: Section, name: str) -> float | None:
        claimed = section.rank_pattern.lookup(name)
        rank: float | None = section.settings.get("rank") if claimed is None else claimed
        return rank

    def scale(self, name: str, rank: int, *, stacked: int = 1, own: float | None = None) -> float:
        """`alpha / rank` (or `alpha / sqrt(rank)` for rsLoRA, or what else the dialect's rule is) of one module.

        Args:
            name: module path, as patterns see it.
            rank: rows of A; with `stacked` experts in one factor, rows of A over all of them.
            stacked: how many experts share the factor.
            own: the alpha of the module's own tensor, which goes before all else.

        Raises:
            InputError: `adapter.rank` where config and tensors disagree, `adapter.alpha` where alpha is missing.
        """
        where = self.name
        if rank % stacked:
            raise InputError(
                "adapter.rank",
                f"{rank} rows do not divide into {stacked} experts",
                file=where,
                tensors=[name],
            )
        rank //= stacked
        section = self.section(name)
        settings, name = section.settings, name.removeprefix(section.prefix)
        rule = self.dialect.scale
        if rule.get("rule") == "absolute":
            return float(settings.get("scale", rule.get("default", 1.0)))
        if rule.get("rule") == "one":
            return 1.0
        claimed = self._claimed_rank(section, name)
        alpha = own
        if alpha is None:
            alpha = section.alpha_pattern.lookup(name)
        if alpha is None:
            alpha = settings.get("alpha")
        if alpha is None or (alpha == 0 and rule.get("zero") == "one"):
            if alpha is not None or rule.get("missing") == "rank":
                return 1.0
            raise InputError(
                "adapter.alpha",
                f"nothing in this {self.dialect.title} adapter says alpha",
                fix=f"give it: --alpha N (its tensors have rank {rank})",
                file=where,
            )
        root = math.sqrt if settings.get("rslora") else float
        if claimed is not None and claimed != rank and rule.get("rank") != "tensors":
            raise InputError(
                "adapter.rank",
                f"the config says rank {claimed}, the tensors have rank {rank}: "
                f"scale {alpha / root(claimed):.4g} or {alpha / root(rank):.4g}?",
                fix="correct r or rank_pattern in the config to what was trained",
                file=where,
                tensors=[name],
            )
        return float(alpha) / root(rank)
