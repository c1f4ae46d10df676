"""Verbs that take sources take references to the Hub as well: their arguments are looked up before they run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from loramerge.errors import UsageError
from loramerge.hub.finding import Finder
from loramerge.hub.reference import parse
from loramerge.tensors import mounts

P = ParamSpec("P")
R = TypeVar("R")


def reaching(**roles: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets parameters of a function be references; `roles`: the name of each, and what it is to be.

    `stream`: a checkpoint that is read once from beginning to end; `base`: one of which headers and some weights are
    read; `adapter`, `adapters`: as `merge` takes them; `model`: a base or an adapter; `whole`: a model with all that
    lies beside it. The function's own parameters `token` and `offline` say how; `in_place` refuses references. While
    it runs, adapters that a receipt names are found too.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def reached(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            options = {**given.get("options", {}), **given}
            finder = Finder(options.get("token"), bool(options.get("offline")), options.get("progress"))
            for name, role in roles.items():
                if given.get(name) is None:
                    continue
                if options.get("in_place") and role in ("stream", "whole") and _refers(given[name]):
                    fix = f"loramerge pull {given[name]} -o DIR, then change DIR"
                    raise UsageError("usage.in-place", "what is on the Hub cannot be changed in place", fix=fix)
                if role == "stream":
                    given[name] = finder.base(given[name], stream=True)
                else:
                    given[name] = getattr(finder, role)(given[name])
            with mounts.found_by(finder.adapter):
                return function(*bound.args, **bound.kwargs)

        return reached

    return decorated


def _refers(source: object) -> bool:
    return isinstance(source, str) and parse(source) is not None
