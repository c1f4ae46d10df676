"""Releases of trainers, where a formula depends on them."""

from __future__ import annotations


def older(version: object, first: str, *, unknown: bool = False) -> bool:
    """Whether a release (`0.17.1`, `0.18.0.dev0@abc`) is older than `first`; `unknown` where nothing says which."""
    return _release(str(version)) < _release(first) if version else unknown


def _release(version: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in version.partition("@")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
