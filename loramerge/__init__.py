"""loramerge: LoRA adapters into model checkpoints, exactly, at the speed of copying the file, in bounded memory.

    import loramerge as lm
    receipt = lm.merge("base", {"lora-a": 0.7, "lora-b": 0.3}, "out")

Everything here is loaded when it is first used: `import loramerge` itself imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loramerge import errors
from loramerge.errors import LoramergeError

if TYPE_CHECKING:
    from loramerge.api import Switcher as Switcher
    from loramerge.api import analyze as analyze
    from loramerge.api import build as build
    from loramerge.api import combine as combine
    from loramerge.api import convert as convert
    from loramerge.api import diff as diff
    from loramerge.api import export as export
    from loramerge.api import extract as extract
    from loramerge.api import inspect as inspect
    from loramerge.api import lock as lock
    from loramerge.api import merge as merge
    from loramerge.api import merge_tensors as merge_tensors
    from loramerge.api import open_adapter as open_adapter
    from loramerge.api import open_checkpoint as open_checkpoint
    from loramerge.api import plan_merge as plan_merge
    from loramerge.api import plan_switch as plan_switch
    from loramerge.api import plan_unmerge as plan_unmerge
    from loramerge.api import pull as pull
    from loramerge.api import push as push
    from loramerge.api import recover as recover
    from loramerge.api import resize as resize
    from loramerge.api import switch as switch
    from loramerge.api import unmerge as unmerge
    from loramerge.api import verify as verify

__version__ = "0.1.0"

__all__ = [
    "LoramergeError",
    "Switcher",
    "__version__",
    "analyze",
    "build",
    "combine",
    "convert",
    "diff",
    "errors",
    "export",
    "extract",
    "inspect",
    "lock",
    "merge",
    "merge_tensors",
    "open_adapter",
    "open_checkpoint",
    "plan_merge",
    "plan_switch",
    "plan_unmerge",
    "pull",
    "push",
    "recover",
    "resize",
    "switch",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from loramerge import api

        return getattr(api, name)
    raise AttributeError(f"module 'loramerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
