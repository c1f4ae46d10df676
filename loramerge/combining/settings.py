"""What the configs of several adapters say beside numbers of modules: kept where they agree, told where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramerge.adapters.config import metadata_of
from loramerge.combining.reading import Source
from loramerge.converting.target import Target
from loramerge.tensors.text import some

SAID = {"task": "task", "base": "base model"}
"""Our name of a setting -> what it is called."""


def settings_of(sources: Sequence[Source]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the result, and notes on what they disagree about.

    `modules-to-save` is the union, `bias` the more of two, `tied` holds where one says it; of the task and the base the
    first is written where they differ, with a note that names all.
    """
    every = [source.adapter.settings for source in sources]
    made, notes = dict(every[0]), []
    for name, called in SAID.items():
        values = list(dict.fromkeys(str(s[name]) for s in every if s.get(name)))
        if values:
            made[name] = next(s[name] for s in every if s.get(name))
        if len(values) > 1:
            notes.append(f"the adapters name different {called}s: {some(values)}; the first is written")
    saved = [name for s in every for name in s.get("modules-to-save") or ()]
    if saved:
        made["modules-to-save"] = sorted(set(saved))
    biases = [s.get("bias") for s in every if s.get("bias") not in (None, "none")]
    if biases:
        made["bias"] = "all" if "all" in biases else biases[0]
    rows = next((s["token-rows"] for s in every if s.get("token-rows")), None)
    if rows is not None:
        made["token-rows"] = rows
    if any(s.get("tied") for s in every):
        made["tied"] = True
    return made, notes


def metadata_kept(sources: Sequence[Source], target: Target) -> tuple[dict[str, str], list[str]]:
    """Metadata of the weight files that still holds, and the names of all that is left out.

    Kept is what the target's table calls true of the model (`kept-metadata`) and no two adapters disagree about: the
    rest tells of one training, or of factors that are no longer there.
    """
    every = [metadata_of(source.adapter.checkpoint) for source in sources]
    names = list(dict.fromkeys(name for metadata in every for name in metadata))
    kept = {}
    for name in names:
        values = {metadata[name] for metadata in every if name in metadata}
        if name in target.write.get("kept-metadata", ()) and len(values) == 1:
            kept[name] = values.pop()
    return kept, [name for name in names if name not in kept and name not in target.write.get("metadata", {})]
