"""The card of an adapter: what its headers and its config tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter
from loramerge.errors import LoramergeError
from loramerge.hub import frontmatter
from loramerge.hub.frontmatter import Input
from loramerge.hub.local import Gathered
from loramerge.hub.markdown import block, code, plain, table
from loramerge.hub.reference import MAIN
from loramerge.tensors.dtypes import display

_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")


def lines(
    gathered: Gathered, repo: str, branch: str, token: str | None, notes: list[str], library: str | None
) -> tuple[dict[str, Any], str] | None:
    """Front matter and body; None where the files are no adapter that can be read.

    `base_model` is what the config names as the base, where that is a repository: known from the cache that it was
    read from, or because the Hub has one of that name.
    """
    try:
        adapter = open_adapter(gathered.source)
    except LoramergeError:
        return None
    try:
        base = _base(adapter, token, notes)
        fields: dict[str, Any] = {
            "base_model": None if base is None else base.repo,
            "base_model_relation": None if base is None else "adapter",
            "library_name": library,
        }
        tags = ["lora"]
        if base is not None:
            fields |= frontmatter.copied(base.card, ("pipeline_tag", "license", "license_name", "license_link"))
            if "://" not in fields.get("license_link", "://") and fields["license_link"] not in gathered.names:
                fields["license_link"] = f"https://huggingface.co/{base.repo}/blob/main/{fields['license_link']}"
            fields["language"] = frontmatter.joined([base.card], "language")
            tags.insert(0, f"base_model:adapter:{base.repo}")
        fields["tags"] = tags
        return fields, _body(adapter, repo, branch, base)
    finally:
        adapter.checkpoint.close()


def _base(adapter: Adapter, token: str | None, notes: list[str]) -> Input | None:
    named = adapter.settings.get("base")
    if not isinstance(named, str) or not named:
        return None
    repo, commit, _ = frontmatter.located(named)
    if repo is None:
        if not _ID.fullmatch(named) or Path(named).exists() or not _exists(named, token):
            return None
        repo, revision = named, adapter.config.get("revision")
        commit = revision if isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) else None
    row: Mapping[str, Any] = {"source": f"hf://{repo}@{commit or 'main'}"}
    return frontmatter.read_input(row, token, notes, repo=repo, commit=commit)


def _exists(repo: str, token: str | None) -> bool:
    from huggingface_hub import HfApi

    try:
        return HfApi(token=token, library_name="loramerge").model_info(repo, timeout=30).id == repo
    except Exception:  # whatever is the matter, nothing is known of it, and the card says nothing
        return False


def _body(adapter: Adapter, repo: str, branch: str, base: Input | None) -> str:
    about = "" if base is None else f" for {code(base.name)}"
    if base is not None and base.commit is not None:
        about += f" at commit {code(base.commit)}"
    out = [f"# {plain(repo.split('/')[-1])}", "", f"An adapter{about}.", ""]
    facts = [("dialect", plain(adapter.dialect.title)), ("modules", str(len(adapter.modules)))]
    facts += [(key, f"{v:g}") for key in ("rank", "alpha") if isinstance(v := adapter.settings.get(key), int | float)]
    facts += [("weights", ", ".join(sorted({display(f.info.dtype) for f in adapter.factors().values()})))]
    if adapter.plain:
        facts.append(("whole parameters", str(len(adapter.plain))))
    out += [*table(("", ""), facts, "lr"), "", "## Modules", ""]
    groups = Counter(_NUMBER.sub("*", module.path) for module in adapter.modules)
    out += [*table(("module", "count"), [(code(n), str(c)) for n, c in sorted(groups.items())], "lr"), ""]
    out += ["## Into the base", ""]
    place = f"hf://{repo}" + ("" if branch == MAIN else f"@{branch}")
    source = "BASE" if base is None else f"hf://{base.repo}" + (f"@{base.commit}" if base.commit else "")
    return "\n".join(out + block(f"loramerge merge {source} {place} -o OUT")).rstrip() + "\n"
