"""Which tensor of a fine-tune is which of its base: by name, and by view where the fine-tune has another layout."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loramerge.adapters.views import View
from loramerge.binding import tie
from loramerge.binding.families import families
from loramerge.binding.namespace import Namespace, slots_of
from loramerge.errors import MismatchError
from loramerge.tensors.checkpoint import Checkpoint, Located
from loramerge.tensors.text import plural, quoted, some

Selected = Callable[[str], bool]


@dataclass(frozen=True)
class Match:
    """A stored tensor of the base, and where its value after training lies.

    `tuned` is the one tensor that it is; where the fine-tune has another layout, `view` says which rows of which of its
    tensors it is, and `parts` where these lie.
    """

    name: str
    base: Located
    tuned: Located | None
    view: View | None = None
    parts: tuple[tuple[str, Located], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.info.shape

    @property
    def tuned_shape(self) -> tuple[int, ...]:
        return self.shape if self.tuned is None else self.tuned.info.shape

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def nbytes(self) -> int:
        """Bytes to read for one comparison."""
        return self.base.info.nbytes + sum(t.info.nbytes for t in self.sources)

    @property
    def sources(self) -> tuple[Located, ...]:
        """The tensors of the fine-tune that it is made of."""
        return (self.tuned,) if self.tuned is not None else tuple(t for _, t in self.parts)


@dataclass(frozen=True)
class Pairing:
    """Every selected tensor of the base with its counterpart.

    `tied`: names of heads that the base's architecture ties to an embedding -> the embedding's stored name.
    `names`: of the base. `notes`: what was decided for the user. `unselected`: tensors of the base that are left out,
    each with itself.
    """

    matches: tuple[Match, ...]
    names: Namespace
    tied: Mapping[str, str]
    notes: tuple[str, ...]
    unselected: tuple[Match, ...]

    @property
    def excluded(self) -> int:
        return len(self.unselected)


def selector(include: Sequence[str], exclude: Sequence[str]) -> Selected:
    """A test of tensor names: one of `include` (if any) and none of `exclude`, globs over the whole name or over its
    module's."""

    def selected(name: str) -> bool:
        both = (name, name.rpartition(".")[0])
        if include and not any(fnmatch.fnmatchcase(text, glob) for glob in include for text in both):
            return False
        return not any(fnmatch.fnmatchcase(text, glob) for glob in exclude for text in both)

    return selected


def pair(base: Checkpoint, tuned: Checkpoint, selected: Selected) -> Pairing:
    """Finds every tensor of the base in the fine-tune.

    Raises:
        MismatchError: `extract.missing`, `extract.extra`, `extract.shape`, `extract.architecture`, `extract.tied`: what
            has no counterpart, by name.
    """
    names, theirs = _names(base), _names(tuned)
    ties = {p.output: p.input for p in tie.tied_pairs(names, base.config or {})}
    their_ties = {p.output: p.input for p in tie.tied_pairs(theirs, tuned.config or {})}
    used: set[str] = set()
    matches: list[Match] = []
    missing: list[str] = []
    notes: list[str] = []
    unselected: list[Match] = []
    for name, located in base.tensors.items():
        if not selected(name):
            unselected.append(Match(name, located, located))
            used.add(name)
            continue
        found = _found(name, located, tuned, theirs, their_ties)
        if found is None:
            missing.append(name)
            continue
        matches.append(found)
        used |= {t.info.name for t in found.sources}
    extra = [name for name in tuned.tensors if name not in used and selected(name)]
    for name in [n for n in extra if n in ties]:
        # A head of its own in the file, tied in the base: nothing new as long as both are one.
        if not _equal_bytes(tuned.tensors[name], tuned.tensors.get(their_ties.get(name, ties[name]))):
            raise MismatchError(
                "extract.tied",
                f"{quoted(name)} is tied to {quoted(ties[name])} in the base, and a tensor of its own in the fine-tune",
                fix=f"untie the base first (save it with the head as a tensor of its own), or --exclude '{name}'",
                file=tuned.name,
                tensors=[name],
            )
        extra.remove(name)
        notes.append(f"{quoted(name)} is stored twice in {tuned.name}: it is {quoted(ties[name])}")
    buffers = [n for n in (*missing, *extra) if names.families.is_buffer(n)]
    if buffers:
        notes.append(f"only one of both has {some(buffers, 3)}, which a model makes for itself")
    missing, extra = ([n for n in side if n not in buffers] for side in (missing, extra))
    _check(base, tuned, missing, extra, matches)
    renamed = [m for m in matches if m.tuned is None or m.tuned.info.name != m.name]
    if renamed:
        notes.append(f"{plural(len(renamed), 'tensor')} of the base were found under other names in {tuned.name}")
    return Pairing(tuple(matches), names, ties, tuple(notes), tuple(unselected))


def _names(checkpoint: Checkpoint) -> Namespace:
    shapes = {name: (t.info.dtype, t.info.shape) for name, t in checkpoint.tensors.items()}
    return Namespace(slots_of(shapes), families(), checkpoint.config or {})


def _found(
    name: str, located: Located, tuned: Checkpoint, theirs: Namespace, their_ties: Mapping[str, str]
) -> Match | None:
    if name in tuned.tensors:
        return Match(name, located, tuned.tensors[name])
    if name in their_ties:  # a head of its own in the base, which the fine-tune keeps as its embedding
        return Match(name, located, tuned.tensors[their_ties[name]])
    target = theirs.target(name.replace("/", "."))
    if target is None:
        return None
    if target.stored is not None and target.stored in tuned.tensors:
        return Match(name, located, tuned.tensors[target.stored])
    shape = located.info.shape
    if not shape or (target.view.rows, target.view.cols) != (shape[0], located.info.numel // max(1, shape[0])):
        return None
    stored = dict.fromkeys(part.tensor for part in target.view.parts)
    if not all(tensor in tuned.tensors for tensor in stored):
        return None
    return Match(name, located, None, target.view, tuple((tensor, tuned.tensors[tensor]) for tensor in stored))


def _check(
    base: Checkpoint, tuned: Checkpoint, missing: Sequence[str], extra: Sequence[str], matches: Sequence[Match]
) -> None:
    """Refuses what has no counterpart; little in common is another architecture."""
    if missing and extra and len(matches) < min(len(missing), len(extra)):
        raise MismatchError(
            "extract.architecture",
            f"{len(missing)} of {len(missing) + len(matches)} tensors of {base.name} are not in {tuned.name}: they are "
            f"not one architecture ({some(list(missing), 2)} there, {some(list(extra), 2)} here)",
            fix="give the base that the model was fine-tuned from",
            file=tuned.name,
        )
    for code, names, where, what in (
        ("extract.missing", missing, tuned, "of the base are not in the fine-tune"),
        ("extract.extra", extra, tuned, "of the fine-tune are not in the base"),
    ):
        if names:
            raise MismatchError(
                code,
                f"{plural(len(names), 'tensor')} {what}: {some(list(names), 3)}",
                fix=f"give the base that it was fine-tuned from, or leave them out: --exclude '{names[0]}'",
                file=where.name,
                tensors=list(names),
            )
    facts = families()
    odd = [m for m in matches if m.tuned_shape != m.shape and not _grown(m, facts.is_vocabulary(m.module))]
    if odd:
        first = odd[0]
        raise MismatchError(
            "extract.shape",
            f"{plural(len(odd), 'tensor')} have another shape in the fine-tune: {quoted(first.name)} is {first.shape} "
            f"in the base and {first.tuned_shape} in the fine-tune",
            fix=f"give the base that it was fine-tuned from, or leave them out: --exclude '{first.name}'",
            file=tuned.name,
            tensors=[m.name for m in odd],
        )


def _grown(match: Match, vocabulary: bool) -> bool:
    """Whether a vocabulary got another size: the rows of an embedding or a head (or its bias), nothing else."""
    return vocabulary and match.tuned_shape[1:] == match.shape[1:]


def _equal_bytes(a: Located, b: Located | None, step: int = 1 << 23) -> bool:
    if b is None or (a.info.dtype, a.info.shape) != (b.info.dtype, b.info.shape):
        return False
    for at in range(0, a.info.nbytes, step):
        n = min(step, a.info.nbytes - at)
        if a.file.source.read(a.info.begin + at, n) != b.file.source.read(b.info.begin + at, n):
            return False
    return True
