"""The model card: honest front matter, and what was made of what, from the receipt and the headers alone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramerge.errors import LoramergeError
from loramerge.formats import load_formats
from loramerge.hub import adaptercard, cache, frontmatter, notices
from loramerge.hub.frontmatter import CARD, Input
from loramerge.hub.local import Gathered
from loramerge.hub.markdown import block, code, plain, table
from loramerge.hub.reference import MAIN, RemoteFile, Resolved
from loramerge.merging import undo
from loramerge.merging.run import Options

MODES = ("auto", "new", "none")
MARK = "<!-- written by loramerge: take this line out to keep what you change -->"
MARK_BYTES = b"<!-- written by loramerge:"
COPIED = ("license", "license_name", "license_link", "pipeline_tag", "library_name")
MADE_BY = ("merge", "switch", "export")

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Card:
    """A card that was written. `notes`: what was found on the way."""

    text: str
    notes: tuple[str, ...] = ()


def choose(
    gathered: Gathered,
    remote: tuple[str, RemoteFile] | None,
    mode: str,
    repo: str,
    branch: str,
    token: str | None,
    version: str,
) -> Card | None:
    """The card to put into the commit; None where the one that is there stays.

    `auto`: a card of somebody else's, in the directory or in the repository, stays; one of ours is written anew.
    `new`: it is written in any case. `none`: it is not written. `remote`: the commit that the branch is at, and the
    card that it has.
    """
    if mode == "none":
        return None
    own = gathered.read(CARD)
    if mode == "auto":
        if own is not None and MARK_BYTES not in own:
            return None
        if own is None and remote is not None and not _is_ours(repo, *remote, token):
            return None
    made = write(gathered, repo, branch, token, version)
    for note in made.notes:
        notices.warn(note)
    return made


def _is_ours(repo: str, commit: str, card: RemoteFile, token: str | None) -> bool:
    """Whether a card in a repository is one that was written here."""
    found = Resolved(repo, commit, "", commit, (card,))
    try:
        return MARK_BYTES in (cache.fetch(found, [card], token=token) / CARD).read_bytes()
    except (LoramergeError, OSError):
        return False  # a card that cannot be read is not ours to replace


def write(gathered: Gathered, repo: str, branch: str, token: str | None, version: str) -> Card:
    """The card of a model or an adapter: the same for the same files, without dates.

    Args:
        gathered: the files that it is about.
        repo: the repository that it will lie in.
        branch: and the branch.
        token: to read the cards of the inputs with.
        version: of this tool.
    """
    notes: list[str] = []
    receipt = gathered.receipt
    if receipt is not None:
        lines = _merged(gathered, receipt, repo, branch, token, notes)
    else:
        known = library(gathered, adapter=True)
        lines = adaptercard.lines(gathered, repo, branch, token, notes, known) or _plain(gathered, repo)
    fields, body = lines
    end = "" if receipt is not None else f"\nUploaded with loramerge {plain(version)}.\n"
    return Card(f"{frontmatter.render(fields)}\n{MARK}\n\n{body}{end}", tuple(notes))


def library(gathered: Gathered, adapter: bool = False) -> str | None:
    """The library that loads it, told by its files."""
    for rules in load_formats("cards"):
        for row in rules.get("library", ()):
            if bool(row.get("adapter")) != adapter or gathered.file(row["file"]) is None:
                continue
            if "field" in row and row["field"] not in _json(gathered, row["file"]):
                continue
            return str(row["library"])
    return None


def _json(gathered: Gathered, name: str) -> dict[str, Any]:
    try:
        data = json.loads((gathered.read(name) or b"{}").decode("utf-8-sig"))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


# ------------------------------------------------------------------------------------------------ merged models


def _merged(
    gathered: Gathered, receipt: Mapping[str, Any], repo: str, branch: str, token: str | None, notes: list[str]
) -> tuple[dict[str, Any], str]:
    base = frontmatter.read_input(receipt["base"], token, notes)
    adapters = [frontmatter.read_input(row, token, notes) for row in receipt["adapters"]]
    command = str(receipt.get("command"))
    merged = bool(adapters) and command in MADE_BY
    ids = list(dict.fromkeys(i.repo for i in (base, *adapters) if i.repo is not None))
    fields: dict[str, Any] = {}
    if base.repo is not None or (merged and ids):
        fields["base_model"] = ids
        fields["base_model_relation"] = "merge" if merged else None
    fields["library_name"] = None if command == "export" else library(gathered)
    taken = frontmatter.copied(base.card, COPIED)
    fields |= {k: v for k, v in taken.items() if k != "library_name" or fields["library_name"] is None}
    fields["license_link"] = _license_link(gathered, base, fields.get("license_link"))
    for name in ("language", "datasets"):
        fields[name] = frontmatter.joined([base.card, *(a.card for a in adapters)], name)
    fields["tags"] = ["merge", "lora", "loramerge"] if merged else ["loramerge"]
    licences = _licences(base, adapters, notes)
    if not merged:
        fields["base_model"] = base.repo
    out = [f"# {_title(repo)}", "", _summary(command, base, adapters), ""]
    out += [*_inputs(base, adapters), ""]
    out += [*licences, *_how(receipt, base, adapters, command)]
    if merged:
        out += [*_modules(receipt), *_numbers(receipt), *_back(gathered, receipt, base, repo, branch, command)]
    out += _footer(gathered, receipt)
    return _ordered(fields), "\n".join(out).rstrip() + "\n"


def _ordered(fields: Mapping[str, Any]) -> dict[str, Any]:
    order = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "license_name")
    names = (*order, "license_link", "language", "datasets", "tags")
    return {name: fields.get(name) for name in names}


def _title(repo: str) -> str:
    return plain(repo.split("/")[-1])


def _summary(command: str, base: Input, adapters: Sequence[Input]) -> str:
    if command == "unmerge":
        return f"{code(base.name)}, brought back from a merge."
    if not adapters:
        return f"{code(base.name)}, exported."
    what = "an adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    tail = ", exported to ONNX" if command == "export" else ""
    return f"{code(base.name)} with {what} merged into its weights{tail}."


def _inputs(base: Input, adapters: Sequence[Input]) -> list[str]:
    rows = [(role, code(i.name), "local" if i.commit is None else code(i.commit)) for role, i in _roles(base, adapters)]
    weights = ["", *("" if a.weight is None else f"{a.weight:g}" for a in adapters)]
    return table(("", "input", "commit", "weight"), [(*row, w) for row, w in zip(rows, weights, strict=True)], "lllr")


def _roles(base: Input, adapters: Sequence[Input]) -> list[tuple[str, Input]]:
    return [("base", base), *(("adapter", adapter) for adapter in adapters)]


def _licences(base: Input, adapters: Sequence[Input], notes: list[str]) -> list[str]:
    named = [(i, i.license) for i in (base, *adapters) if i.license]
    if len({licence for _, licence in named}) < 2:
        return []
    words = "; ".join(f"{i.name}: {licence}" for i, licence in named)
    notes.append(f"the inputs have different licences ({words}): see that what you publish keeps to all of them")
    rows = [(code(i.name), plain(licence)) for i, licence in named]
    return ["The inputs have different licences, and all of them hold:", "", *table(("input", "licence"), rows), ""]


def _license_link(gathered: Gathered, base: Input, link: Any) -> str | None:
    """A link to the licence that leads somewhere: to a file that is pushed as well, or to the base's own."""
    if not isinstance(link, str) or "://" in link:
        return link if isinstance(link, str) else None
    if link in gathered.names:
        return link
    return f"https://huggingface.co/{base.repo}/blob/{base.commit}/{link}" if base.repo is not None else None


def _how(receipt: Mapping[str, Any], base: Input, adapters: Sequence[Input], command: str) -> list[str]:
    if command not in ("merge", "switch", "export"):
        return []
    words = ["loramerge", "merge" if command == "switch" else command, _argument(base)]
    for adapter in adapters:
        weight = 1.0 if adapter.weight is None else adapter.weight
        words += ["--adapter"] if command == "export" else []
        words.append(_argument(adapter) + ("" if weight == 1 else f"={weight:g}"))
    words += ["-o", "OUT"]
    if command == "export":
        words += ["--to", "onnx"]
        made = receipt.get("export")
        made = made if isinstance(made, dict) else {}
        words += [w for key in ("task", "dtype", "opset") if made.get(key) for w in (f"--{key}", str(made[key]))]
    words += _flags(receipt["options"])
    line = " ".join(word if word.startswith("--") else shlex.quote(word) for word in words)
    return ["The same weights are made by", "", *block(line)]


def _argument(given: Input) -> str:
    if given.repo is None:
        return given.name
    return f"hf://{given.repo}@{given.commit}" + (f"/{given.path}" if given.path else "")


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Options that were given, as flags of the command line. Those that say how fast are no part of the result."""
    usual = Options().recorded()
    out: list[str] = []
    for name, value in options.items():
        if name in ("device", "method_options", "checkpoint") or value == usual.get(name) or value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            out.append(flag)
        elif isinstance(value, list) and name == "enable_lora":
            out += [flag, ",".join("1" if v else "0" for v in value)]
        elif isinstance(value, list):
            out += [word for item in value for word in (flag, str(item))]
        else:
            out += [flag, str(value)]
    for name, value in (options.get("method_options") or {}).items():
        out += [f"--{name.replace('_', '-')}", str(value)]
    return out


def _modules(receipt: Mapping[str, Any]) -> list[str]:
    """Which modules changed: layers of one kind in one row."""
    kept = receipt.get("retention", {})
    kept = kept.get("modules", {}) if isinstance(kept, dict) else {}
    groups: dict[str, list[Any]] = {}
    for name, row in receipt["tensors"].items():
        if row.get("do") != "change":
            continue
        module = name.removesuffix(".weight")
        groups.setdefault(_NUMBER.sub("*", f".{module}.").strip("."), []).append(kept.get(module))
    if not groups:
        return []
    rows = []
    for pattern, values in groups.items():
        known = [v for v in values if isinstance(v, int | float)]
        rows.append((code(pattern), str(len(values)), f"{min(known):.4f}" if known else ""))
    return ["## Changed weights", "", *table(("module", "count", "least retention"), sorted(rows), "lrr"), ""]


def _numbers(receipt: Mapping[str, Any]) -> list[str]:
    kept = receipt.get("retention")
    total = kept.get("total") if isinstance(kept, dict) else None
    if not isinstance(total, int | float):
        return []
    tensors = list(receipt["tensors"].values())
    changed = sum(row.get("do") == "change" for row in tensors)
    copied = sum(row.get("do") == "copy" and "grown" not in row for row in tensors)
    options = receipt["options"]
    dtype = plain(str(options.get("compute_dtype")))
    same = f"; {copied} are the base's, byte for byte" if options.get("dtype") == "keep" else ""
    return [
        f"{changed} of {len(tensors)} tensors changed{same}. Updates were summed in {dtype}",
        f"and rounded once; after rounding {total:.4f} of the update is left (1 is all of it).",
        "",
    ]


def _back(
    gathered: Gathered, receipt: Mapping[str, Any], base: Input, repo: str, branch: str, command: str
) -> list[str]:
    if command == "export":
        return []
    place = f"hf://{repo}" + ("" if branch == MAIN else f"@{branch}")
    if any(name.endswith(undo.NAME) for name in gathered.names):
        line = f"loramerge unmerge {place} -o BASE"
        how = "The undo file beside the weights brings the base back, bit for bit:"
    else:
        line = f"loramerge unmerge {place} --base {shlex.quote(_argument(base))} -o BASE"
        how = "With the base at hand the merge is taken back, bit for bit:"
    return ["## Back to the base", "", how, "", *block(line)]


def _footer(gathered: Gathered, receipt: Mapping[str, Any]) -> list[str]:
    version = plain(str(receipt.get("version")))
    name = gathered.receipt_file.name if gathered.receipt_file is not None else ""
    text = f"Made with loramerge {version}. {code(name)} names every input and output with its digest; "
    return [f"{text}`loramerge verify` checks it."]


def _plain(gathered: Gathered, repo: str) -> tuple[dict[str, Any], str]:
    """Of files that nothing more is known of."""
    names = [(code(f.name), str(f.size)) for f in gathered.files if f.name != CARD]
    body = [f"# {_title(repo)}", "", *table(("file", "bytes"), names, "lr"), ""]
    return {"library_name": library(gathered)}, "\n".join(body)
