"""What becomes of every tensor that a fine-tune changed: a low-rank pair, the whole parameter, or a refusal by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loramerge.adapters.views import View, whole_view
from loramerge.binding.binding import Binding
from loramerge.binding.namespace import Namespace
from loramerge.converting.express import suffix_of
from loramerge.converting.homes import Homes
from loramerge.converting.items import PAIR
from loramerge.converting.target import Target
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.extracting.pairing import Match, Pairing
from loramerge.extracting.parts import Sorted, Unit, Whole
from loramerge.extracting.reading import AnyChange, Change, ViewChange
from loramerge.extracting.stacks import WEIGHT, stack_of, units_of, wrapped_outside
from loramerge.tensors.text import plural, some

BIAS = "bias"


@dataclass
class Sorter:
    """One sorting: the pairs of tensors, what is to be written, and what the user wants.

    Args:
        changed: stored names of the base whose bytes differ.
        low_rank_embeddings: embeddings and heads become pairs too.
        only_linear: leave out what would go whole.
    """

    pairing: Pairing
    changed: frozenset[str]
    target: Target
    base_name: str
    tuned_name: str
    low_rank_embeddings: bool = False
    only_linear: bool = False
    _units: list[Unit] = field(default_factory=list)
    _wholes: list[Whole] = field(default_factory=list)
    _left: list[Match] = field(default_factory=list)
    _refused: list[tuple[Match, str]] = field(default_factory=list)
    _fused: set[str] = field(default_factory=set)
    """Last names that experts of this model have on disk: readers take every module of these names for an expert."""

    def sort(self) -> Sorted:
        """Decides for every changed tensor.

        Raises:
            UnsupportedError: `extract.kind`: what the target cannot hold, by name, and the flag that leaves it out.
        """
        changed = [m for m in self.pairing.matches if m.name in self.changed]
        homes = Homes(Binding(self.names), self.target)
        if homes.layout is not None and not (self._lists and all(_is_at_home(m, homes) for m in changed)):
            self._in_layout(homes, changed)
            if self._lists:  # whole modules are listed by names that these files do not have
                why = f"has another name in {self.target.title}, which lists whole modules"
                self._refused += [(whole.matches[0], why) for whole in self._wholes]
            return self._done((), None)
        if not self._lists:
            for match in changed:
                self._one(match)
            return self._done((), self.names.families.task_of(self.names.config))
        task, saved = self._heads()
        for match in changed:
            multihead = self._multihead(match)
            path = multihead or self._embedder(match)
            if path and not self.only_linear:
                saved.append(path)
            elif multihead:
                self._left.append(match)
        stacked = self._stacks(changed)
        for match in changed:
            done = match.name in stacked or match in self._left
            if not done and not any(_inside(match.module, path) for path in saved):
                self._one(match)  # others go with their module
        return self._with_modules(saved, task)

    @property
    def names(self) -> Namespace:
        return self.pairing.names

    @property
    def _lists(self) -> bool:
        """Whether the target's config lists the modules that are whole: they go with all their parameters then."""
        methods: Sequence[Mapping[str, Mapping[str, str]]] = self.target.write.get("method", ())
        return self.target.plain is True and any("whole" in m.get("fields", {}) for m in methods)

    def _one(self, match: Match) -> None:
        shape, module = match.shape, match.module
        if self._is_pair(match) and not (self._lists and module.rpartition(".")[2] in self._fused):
            flipped = len(shape) == 2 and self._is_flipped(match)
            out_in = (shape[1], shape[0]) if flipped else shape
            self._units.append(Unit(module, self.path(module), self._change(match), out_in, flipped))
        elif self.low_rank_embeddings and self._is_vocabulary(match) and match.tuned_shape == shape:
            heads = tuple(h.rpartition(".")[0] for h, e in self.pairing.tied.items() if e == match.name)
            embedding = not self._is_head(module)
            seen = (shape[1], shape[0]) if embedding else shape
            paths = tuple(self.path(head) for head in heads)
            self._units.append(
                Unit(module, self.path(module), self._change(match), seen, embedding, embedding=embedding, also=paths)
            )
        elif self.only_linear:
            self._left.append(match)
        elif len(shape) == 3 and match.leaf != WEIGHT:
            self._refused.append((match, "is a stack of weights (experts)"))
        elif self.names.families.is_shared(module) and self._lists:
            self._refused.append((match, "is shared by several embeddings in memory"))
        elif (whole := self._whole(match.name, self.path(module), match.leaf, (match,))) is None:
            why = self.target.refuse.get("plain", f"{self.target.title} has no whole parameters of this kind")
            self._refused.append((match, why))
        else:
            self._wholes.append(whole)

    def _is_pair(self, match: Match) -> bool:
        """Whether a weight is that of a linear or a convolution, as far as names and shapes tell."""
        shape = match.shape
        if match.leaf != WEIGHT or len(shape) < 2 or match.tuned_shape != shape or 0 in shape:
            return False
        if len(shape) > 2:
            return shape[1] > 1 or shape[0] == 1  # depthwise: A spans all channels, the weight one
        return not self._is_vocabulary(match) and self.names.families.is_linear(match.module)

    def _is_flipped(self, match: Match) -> bool:
        """Whether a linear is stored (in, out).

        Raises:
            MismatchError: `extract.config` where its name may mean either and nothing says what model it is.
        """
        found = self.names.families.is_transposed(self.names.model_type, match.module)
        if found is None:
            raise MismatchError(
                "extract.config",
                f"{match.name!r} is stored (out, in) by some models and (in, out) by others, and there is no config",
                fix="put the model's config.json beside the weights of the base, and give that directory",
                file=self.base_name,
                tensors=[match.name],
            )
        return found

    def _is_vocabulary(self, match: Match) -> bool:
        facts = self.names.families
        two = match.leaf == WEIGHT and len(match.shape) == 2
        return two and (facts.is_vocabulary(match.module) or facts.is_shared(match.module))

    def _is_head(self, module: str) -> bool:
        """Whether a vocabulary's module is the output's."""
        ends = {pair.output.rpartition(".")[0].rpartition(".")[2] for pair in self.names.families.tied}
        return module.rpartition(".")[2] in ends

    def _whole(self, name: str, path: str, leaf: str, matches: tuple[Match, ...], **known: Any) -> Whole | None:
        """A whole parameter as the target keeps it: as it is, or as a difference; None where it has no place for it."""
        target = self.target
        plain, differences = target.keys.get("plain", {}), target.keys.get("difference", {})
        same_shape = all(m.tuned_shape == m.shape for m in matches)
        if target.plain is True or (isinstance(target.plain, tuple) and path.rpartition(".")[2] in target.plain):
            return Whole(name, path, leaf, matches, **known)
        for at, what in ((path, leaf), (f"{path}.{leaf}", "")):
            if what == "" and (leaf in (WEIGHT, BIAS) or target.write["path"] != "dotted"):
                continue
            if suffix_of(plain, "value", what) is not None:
                return Whole(name, at, what, matches, **known)
            if same_shape and suffix_of(differences, "diff", what) is not None:
                return Whole(name, at, what, matches, difference=True, **known)
        return None

    def _change(self, match: Match) -> Change:
        return Change(match, self.base_name, self.tuned_name)

    def path(self, module: str) -> str:
        """A module as the target names it: as the model's code does in memory, where its file has other names."""
        if not self.target.write.get("prefix") or module in self._heads_of_class:
            return module
        for rule in self.names.families.renamed:
            if rule.loading and (not rule.model_types or rule.model_types & self.names.model_types):
                module = rule.in_memory(module)
        return f"{self._lead}{module}"

    @property
    def _heads_of_class(self) -> set[str]:
        return {output.rpartition(".")[0] for output in self.pairing.tied}

    @property
    def _lead(self) -> str:
        """`transformer.` for a file that was saved without it and a class that has it (`wte` for `transformer.wte`)."""
        for output, stored in self.pairing.tied.items():
            for pair in self.names.families.tied:
                if pair.output == output and pair.input != stored and pair.input.endswith(f".{stored}"):
                    return pair.input[: -len(stored)]
        return ""

    # ------------------------------------------------------------------------------------------------ experts in stacks

    def _stacks(self, changed: Sequence[Match]) -> set[str]:
        """Stacked parameters as the model has them in memory, whole or in pieces on disk; the names that they use."""
        if not self.target.write.get("stacked-as") or self.target.name != self.target.dialect.name:
            return set()
        by_name = {m.name: m for m in self.pairing.matches}
        found: dict[str, tuple[str, ...]] = {}
        used: set[str] = set()
        for match in changed:
            known = stack_of(match.name, len(match.shape), self.names)
            if known is not None and known[0] not in found:
                found[known[0]] = known[1]
        for parameter, last_names in found.items():
            stack = self.names.find_stack(parameter)
            if stack is None:
                continue
            names = [stack.name] if not stack.pieces else [n for expert in stack.pieces for n, _, _ in expert]
            if any(name not in by_name for name in names):
                first = next(by_name[name] for name in names if name in by_name)
                self._refused.append((first, f"is a part of {parameter}, of which other parts are left out"))
                continue
            used |= set(names)
            if stack.pieces:
                self._fused |= set(last_names)
            changes = {name: self._change(by_name[name]) for name in names}
            inner = wrapped_outside(parameter, found, self.target.dialect.experts.get("order", ()))
            self._units += units_of(parameter, stack, changes, inner, self.names)
        return used

    # -------------------------------------------------------------------------------- modules that are listed as whole

    def _heads(self) -> tuple[str | None, list[str]]:
        """What the model is for, and its head: a config that says so makes a reader expect the head, changed or not."""
        facts, known = self.names.families, self.names.config.get("architectures")
        name = str(known[0]) if isinstance(known, list) and known else ""
        for head in facts.heads:
            if not name.endswith(head["architecture"]) or self.only_linear:
                continue
            saved = set()
            for match in self.pairing.matches:
                segments = match.module.split(".")
                at = next((i for i, s in enumerate(segments) if s in head["modules"]), None)
                if at is not None:
                    saved.add(".".join(segments[: at + 1]))
            if saved:
                return str(head["task"]), sorted(saved)
        return facts.task_of(self.names.config), []

    def _multihead(self, match: Match) -> str:
        """The attention module that a weight is of, where its forward pass reads the weights past all wrappers."""
        for path in (match.module, match.module.rpartition(".")[0]):
            if f"{path}.in_proj_weight" in self.names:
                return path
        return ""

    def _embedder(self, match: Match) -> str:
        """The embedding module with others inside that a parameter lies in which is neither weight nor bias."""
        module = match.module
        odd = self._leaf(match) not in (WEIGHT, BIAS) and not self._is_leaf(module)
        return module if odd and not self.names.families.is_linear(module) else ""

    def _with_modules(self, saved: Iterable[str], task: str | None) -> Sorted:
        """Modules that go whole with all that is in them; biases alone."""
        paths = set(saved)
        kept: list[Whole] = []
        for whole in self._wholes:
            module = whole.matches[0].module
            if whole.leaf == BIAS and not any(w.path == whole.path and w.leaf != BIAS for w in self._wholes):
                kept.append(whole)
            elif any(u.stacked is not None and u.stacked.parameter.startswith(f"{whole.path}.") for u in self._units):
                self._refused.append((whole.matches[0], "lies in a module whose other parameters are stacks of pairs"))
            elif self._is_leaf(module):
                paths.add(module)
            else:
                why = "lies in a module that has others inside, and would need all of them whole"
                self._refused.append((whole.matches[0], why))
        if self.only_linear:
            return self._done((), task)
        paths = self._as_listed(paths)
        biases = [w for w in kept if not any(_inside(w.matches[0].module, path) for path in paths)]
        listed = [
            Whole(m.name, self.path(m.module), self._leaf(m), (m,), same=m.name not in self.changed)
            for m in (*self.pairing.matches, *self.pairing.unselected)  # a reader wants all that is in a module
            if any(_inside(m.module, path) for path in paths)
        ]
        heads = self._tied_heads(listed)
        self._wholes = [*biases, *listed, *heads]
        tops = {p for p in paths if not any(_inside(p, q) and p != q for q in paths)}
        saved = sorted({self.path(p) for p in tops} | {head.path for head in heads})
        return self._done(tuple(saved), task, bool(biases))

    def _is_leaf(self, module: str) -> bool:
        return bool(module) and not any(name.startswith(f"{module}.") for name in self._modules)

    @cached_property
    def _modules(self) -> frozenset[str]:
        """Every module of the base that has a tensor."""
        return frozenset(m.module for m in (*self.pairing.matches, *self.pairing.unselected))

    def _as_listed(self, paths: set[str]) -> set[str]:
        """The modules that a reader takes for those listed: it compares ends of paths, dot or no dot before them."""
        modules = {self.path(module): module for module in self._modules}
        listed = {self.path(p) for p in paths}
        more = {m for path, m in modules.items() if any(path.endswith(p) for p in listed)}
        paired = {u.module for u in self._units}
        if clash := sorted(more & paired):
            match = next(m for m in self.pairing.matches if m.module in paths)
            why = f"cannot be listed as whole without meaning {some(clash, 2)} as well"
            self._refused.append((match, why))
        return paths | more

    def _leaf(self, match: Match) -> str:
        """The parameter as the model's code names it (`weight` for the `gamma` of old files)."""
        for new, old, below in self.names.families.aliases:
            if below and match.leaf == old and match.module.endswith(below):
                return new
        return match.leaf

    def _tied_heads(self, kept: Sequence[Whole]) -> list[Whole]:
        """Heads that share an embedding which goes whole: a wrapper around the embedding alone would part them."""
        by_name = {w.name: w for w in kept}
        made = []
        for head, stored in self.pairing.tied.items():
            if stored in by_name and head not in by_name:
                module, _, leaf = head.rpartition(".")
                made.append(Whole(head, module, leaf, by_name[stored].matches, tied=True))
        return made

    def _in_layout(self, homes: Homes, changed: Sequence[Match]) -> None:
        """Modules as the target's layout has them, wherever their rows lie in the base."""
        by_name = {m.name: m for m in self.pairing.matches}
        seen: set[tuple[str, str, str]] = set()
        for match in changed:
            view = whole_view(match.name, match.shape)
            exact = homes.exact(view)
            found = [exact] if exact is not None else [home for home, _ in homes.owners(view)]
            if not found:
                self._one(match)
            for home in found:
                if (home.role, home.path, home.leaf) in seen:
                    continue
                seen.add((home.role, home.path, home.leaf))
                stored = list(dict.fromkeys(part.tensor for part in home.view.parts))
                if any(name not in by_name for name in stored):
                    self._refused.append((match, f"is a part of {home.path}, of which other parts are left out"))
                    continue
                matches = tuple(by_name[name] for name in stored)
                alone = matches[0] if len(matches) == 1 and home.stored == matches[0].name else None
                if alone is not None and not home.view.parts[0].flipped:
                    self._homed(match, home.role, home.path, home.leaf, alone.shape, self._change(alone), matches, None)
                else:
                    change = ViewChange(home.view, tuple(self._change(m) for m in matches))
                    self._homed(match, home.role, home.path, home.leaf, home.view.shape, change, matches, home.view)

    def _homed(
        self,
        match: Match,
        role: str,
        path: str,
        leaf: str,
        shape: tuple[int, ...],
        change: AnyChange,
        matches: tuple[Match, ...],
        view: View | None,
    ) -> None:
        pair = leaf == WEIGHT and (len(shape) == 2 or (len(shape) > 2 and (shape[1] > 1 or shape[0] == 1)))
        vocabulary = self._is_vocabulary(match) or not self.names.families.is_linear(path)
        if pair and not (vocabulary and len(shape) == 2):
            self._units.append(Unit(match.module, path, change, shape, role=role))
        elif self.only_linear:
            self._left.append(match)
        elif (whole := self._whole(match.name, path, leaf, matches, view=view, role=role)) is None:
            self._refused.append((match, f"{self.target.title} has no whole parameters of this kind"))
        else:
            self._wholes.append(whole)

    def _done(self, saved: tuple[str, ...], task: str | None, biases: bool = False) -> Sorted:
        if self._refused:
            names = [m.name for m, _ in self._refused]
            if PAIR not in self.target.keys:
                raise UnsupportedError("extract.kind", f"{self.target.title} has no low-rank pairs", tensors=names)
            match, why = self._refused[0]
            more = f", and {plural(len(names) - 1, 'other tensor')}" if len(names) > 1 else ""
            raise UnsupportedError(
                "extract.kind",
                f"{match.name!r} changed, and {why}{more}",
                fix=f"--only-linear leaves such tensors out, or one by one: --exclude '{names[0]}'",
                file=self.tuned_name,
                tensors=names,
            )
        left = tuple({m.name: m for m in self._left}.values())
        return Sorted(tuple(self._units), tuple(self._wholes), left, saved, task, biases)


def _is_at_home(match: Match, homes: Homes) -> bool:
    """Whether the target's layout names a tensor as the base does."""
    home = homes.exact(whole_view(match.name, match.shape))
    return home is not None and home.path == match.module and home.leaf == match.leaf


def _inside(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")
