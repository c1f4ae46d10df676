"""What adapters change in a base: the value that binding makes and planning reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loramerge.adapters.adapter import Factor
from loramerge.adapters.updates import Update
from loramerge.binding.namespace import Namespace


@dataclass
class Matches:
    """What became of the tensors and modules of one adapter."""

    modules: int = 0
    matched: int = 0
    applied: set[str] = field(default_factory=set)
    harmless: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    unmatched: dict[str, str] = field(default_factory=dict)
    """Key -> why it has no home (may be empty)."""


@dataclass(frozen=True)
class Replaced:
    """A tensor whose bytes come from an adapter."""

    adapter: int
    factor: Factor
    path: str
    is_base: bool = False
    """Whether it is a copy of the weight that the update was trained on, not the trained weight itself."""


@dataclass
class Binding:
    """What adapters change in a base.

    `updates`: stored tensor -> updates in the order given. `replaced`: stored tensor -> the adapter's tensor that
    takes its place (before updates). `added`: names that the base does not have. `grown`: stored tensor -> the shape
    that zeros pad it to before updates. `untied`: new name -> the tensor it was tied to. `config`: what the config must
    say now.
    """

    names: Namespace
    updates: dict[str, list[Update]] = field(default_factory=dict)
    replaced: dict[str, Replaced] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    grown: dict[str, tuple[int, ...]] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, Any] = field(default_factory=dict)
    """Where parameters lie that were found by their values, as plain data: once merged they are not found again."""
    matches: list[Matches] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    products: Any = None
    """What a method made of several adapters: one more of them, which updates name by the number after the last."""

    def update(self, name: str, update: Update) -> None:
        """Adds one update of a stored tensor."""
        self.updates.setdefault(name, []).append(update)

    def touched(self, name: str) -> bool:
        """Whether anything changes this tensor."""
        return name in self.updates or name in self.replaced
