"""Where outputs come from, as an in-toto statement with SLSA provenance, for tools that sign such statements."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loramerge.building import numerics
from loramerge.building.inputs import file_digests, local_files, output_files, pinned_reference
from loramerge.building.lock import Lock, Row
from loramerge.building.recipe import Recipe
from loramerge.errors import OutputError, UsageError
from loramerge.merging.receipt import Receipt
from loramerge.tensors.output import partial_path, sweep_partials
from loramerge.tensors.text import quoted
from loramerge.tensors.writer import fsync_path, output_errors, write_small_file

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://pypi.org/project/loramerge/#"
BUILDER = "https://pypi.org/project/loramerge/#local"
"""Where nobody says who builds: this package, on a machine that nobody vouches for."""


def statement(recipe: Recipe, lock: Lock, version: str, builder_id: str | None = None) -> dict[str, Any]:
    """The statement of a build: subjects are the files of the outputs, dependencies those of the inputs.

    Raises:
        UsageError: `usage.attest`: `SOURCE_DATE_EPOCH` is no number, or `builder_id` no URI.
    """
    subjects = [
        {"name": _inside(row["path"], file["name"]), "digest": {"sha256": file["sha256"]}}
        for row in lock.outputs
        for file in row.get("files") or ()
    ]
    asked = {"recipe": recipe.path.name, "outputs": [{"path": row["path"], **row["make"]} for row in lock.outputs]}
    made_of = [_recipe(recipe), *(d for row in lock.inputs for d in _dependencies(row))]
    return _statement("build-recipe-v1", subjects, asked, dict(lock.numerics), made_of, version, builder_id)


def of_merge(
    receipt: Receipt,
    base: Path,
    adapters: Sequence[Path],
    version: str,
    *,
    builder_id: str | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """The statement of one merge. Files on disk, of inputs and output, are read for their digests.

    Of what is on the Hub it has the commit, and the digests that the Hub lists.

    Raises:
        UsageError: as `statement`; InputError: an input cannot be read any more.
    """
    data, single = receipt.data, receipt.path.parent != receipt.out
    rows: list[Row] = []
    for role, path, told in zip(
        ("base", *("adapter" for _ in adapters)), (base, *adapters), (data["base"], *data["adapters"]), strict=True
    ):
        row = {key: told[key] for key in ("source", "repo", "commit") if key in told}
        if "commit" in told:
            row["files"] = [f for f in told["files"] if "sha256" in f]
        else:
            row["files"] = file_digests(local_files(role, path, told["source"], allow_pickle), told["source"])
        rows.append(row)
    beside = [*data["files"], *([data["undo"]] if data.get("undo") else [])]
    names = {*(str(f["name"]) for f in beside), receipt.path.name}
    files = output_files(receipt.out, single, sorted(names - {receipt.out.name}))
    subjects = [
        {"name": _inside(receipt.out.name, f["name"]), "digest": {"sha256": f["sha256"]}}
        for f in file_digests(files, str(receipt.out))
    ]
    asked = {
        "base": data["base"]["source"],
        "adapters": [{"source": row["source"], "weight": row["weight"]} for row in data["adapters"]],
        "options": dict(data["options"]),
    }
    made_of = [d for row in rows for d in _dependencies(row)]
    return _statement("merge-v1", subjects, asked, numerics.identity(version, False), made_of, version, builder_id)


def _statement(
    kind: str,
    subjects: list[dict[str, Any]],
    asked: dict[str, Any],
    computing: dict[str, Any],
    made_of: list[dict[str, Any]],
    version: str,
    builder_id: str | None,
) -> dict[str, Any]:
    """The statement itself.

    Field names follow the in-toto Attestation Framework (Statement v1, ResourceDescriptor v1) and SLSA Provenance v1.
    Nothing in it depends on when it was made; only `SOURCE_DATE_EPOCH`, where it is set, is its time.
    """
    details: dict[str, Any] = {"builder": {"id": _builder(builder_id), "version": {"loramerge": version}}}
    if (when := _source_date()) is not None:
        details["metadata"] = {"startedOn": when, "finishedOn": when}
    return {
        "_type": STATEMENT,
        "subject": sorted(subjects, key=lambda s: str(s["name"])),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE + kind,
                "externalParameters": asked,
                "internalParameters": computing,
                "resolvedDependencies": made_of,
            },
            "runDetails": details,
        },
    }


def check(path: Path, force: bool, builder_id: str | None) -> None:
    """Refuses what would fail after the work: a place, an id, a time.

    Raises:
        OutputError: `output.exists`, `output.no-parent`. UsageError: `usage.attest`.
    """
    check_place(path, force)
    _builder(builder_id)
    _source_date()


def _builder(given: str | None) -> str:
    builder = given or BUILDER
    if ":" not in builder or any(c.isspace() for c in builder):
        fix = "give a URI, such as that of the workflow"
        raise UsageError("usage.attest", f"the builder's id {quoted(builder)} is no URI", fix=fix)
    return builder


def check_place(path: Path, force: bool) -> None:
    """Refuses to put a statement where something else lies.

    Raises:
        OutputError: `output.exists`, `output.no-parent`.
    """
    if not path.parent.is_dir():
        raise OutputError("output.no-parent", "the folder for the statement does not exist", fix="mkdir -p", file=path)
    if not os.path.lexists(path) or force:
        return
    try:
        known = json.loads(path.read_bytes()).get("_type") == STATEMENT
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        message = "there is something else already where the statement is to go"
        raise OutputError("output.exists", message, fix="--force replaces it, or give another name", file=path)


def write(path: Path, made: dict[str, Any]) -> None:
    """Writes a statement in one step.

    Raises:
        OutputError: `output.*`.
    """
    with output_errors(path):
        place = Path(os.path.abspath(path))
        sweep_partials(place)
        part = partial_path(place)
        try:
            write_small_file(part, (json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())
            os.replace(part, place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        fsync_path(place.parent)


def _inside(output: str, file: str) -> str:
    """A file of an output, by the output's path in the recipe; a single file is the output itself."""
    if output.endswith((".safetensors", ".onnx")):
        folder = output.rpartition("/")[0]
        return f"{folder}/{file}" if folder else file
    return f"{output.rstrip('/')}/{file}"


def _recipe(recipe: Recipe) -> dict[str, Any]:
    digest = hashlib.sha256(recipe.path.read_bytes()).hexdigest()
    return {"name": recipe.path.name, "digest": {"sha256": digest}}


def _dependencies(row: Row) -> list[dict[str, Any]]:
    """An input as resource descriptors: of the Hub its commit, and each of its files."""
    if "commit" not in row:
        folder, _, last = row["source"].rstrip("/").rpartition("/")
        inside = folder if any(f["name"] == last for f in row["files"]) else row["source"].rstrip("/")
        names = [f"{inside}/{f['name']}" if inside else str(f["name"]) for f in row["files"]]
        return [{"name": name, "digest": {"sha256": f["sha256"]}} for name, f in zip(names, row["files"], strict=True)]
    pinned = f"hf://{row['repo']}@{row['commit']}"
    whole = {
        "name": pinned_reference(row),
        "uri": f"pkg:huggingface/{row['repo']}@{row['commit']}",
        "digest": {"gitCommit": row["commit"]},
    }
    return [whole, *({"uri": f"{pinned}/{f['name']}", "digest": {"sha256": f["sha256"]}} for f in row["files"])]


def _source_date() -> str | None:
    """`SOURCE_DATE_EPOCH` as RFC 3339."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    try:
        return datetime.fromtimestamp(int(text), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        raise UsageError("usage.attest", f"SOURCE_DATE_EPOCH is {quoted(text)}", fix="seconds since 1970") from None
