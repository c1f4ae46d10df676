"""Carries what is bound to the parameters of an ONNX model over to the tensors that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loramerge.adapters.updates import ByKind, Update
from loramerge.adapters.views import View
from loramerge.binding.binding import Binding
from loramerge.binding.lowering import Site, lowered, lowered_view, site_data, whole_change
from loramerge.binding.namespace import Namespace, Slot
from loramerge.binding.onnx_equal import equal
from loramerge.binding.onnx_params import Param, Shared
from loramerge.binding.onnx_values import Recorded, Values
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint, Located
from loramerge.tensors.onnx_file import all_weights
from loramerge.tensors.text import quoted, some

GIVE_BASE = (
    "give the checkpoint that the model was exported from too: --base CHECKPOINT finds its weights by their values"
)
MERGE_FIRST = "merge into the checkpoint that the model was exported from, and export that"


class Lowering:
    """Carries what is bound to parameters over to stored tensors."""

    def __init__(
        self,
        model: Checkpoint,
        params: Mapping[str, Param],
        shared: Mapping[str, Shared],
        values: Values | Recorded | None,
        bound: Binding,
    ) -> None:
        self.model, self.params, self.shared, self.values, self.bound = model, params, shared, values, bound
        self.shapes = {name: slot.shape for name, slot in bound.names.slots.items()}
        self.owner: dict[str, str] = {}
        self.sites: dict[str, list[Site]] = {}
        self.changed: set[str] = set()
        """Paths of the modules whose weights change."""
        weights = [] if model.onnx is None else list(all_weights(model.onnx))
        folder = model.files[0].name[: model.files[0].name.rfind("/") + 1]
        self.checked = {folder + w.place[0] for w in weights if w.checksum and w.place is not None}
        self.encoded = {w.key: w.encoded for w in weights if w.encoded}

    def binding(self) -> Binding:
        bound = self.bound
        self._refuse_new_shapes()
        touched = list(dict.fromkeys([*bound.updates, *bound.replaced]))
        for updates in bound.updates.values():
            for update in updates:
                if isinstance(update, ByKind):
                    touched += [p.tensor for v in (update.view, update.bias_of) if v is not None for p in v.parts]
        touched = list(dict.fromkeys(touched))
        changed = set(bound.updates) | set(bound.replaced)
        lost = [name for name in touched if name not in self.params or not self.params[name].tensors]
        by_value = self.values.find(lost) if self.values is not None and lost else {}
        self.changed = {name.rpartition(".")[0] for name in changed}
        for name in touched:
            self.sites[name] = list(by_value.get(name, ())) or self._sites_of(name)
            for site in self.sites[name] if name in changed else ():
                self._claim(name, site)
        slots = [Slot(n, n, t.info.dtype, t.info.shape) for n, t in self.model.tensors.items()]
        names = Namespace(slots, bound.names.families, bound.names.config)
        found = {name: site_data(self.shapes[name], sites) for name, sites in by_value.items() if name in changed}
        made = replace(bound, names=names, updates={}, replaced={}, sites=found)
        for name in touched:
            if name in changed:
                self._lower(made, name)
        return made

    def _refuse_new_shapes(self) -> None:
        """The graph keeps its weights as they are: none more, none larger, none apart that were one."""
        bound = self.bound
        if any(slot.source not in ("", name) for name, slot in bound.names.slots.items() if name not in bound.untied):
            raise UnsupportedError(
                "onnx.shape", "the adapter repeats layers, which no graph can do", fix=MERGE_FIRST, file=self.model.name
            )
        if bound.untied:
            new, old = next(iter(bound.untied.items()))
            raise self._shared_error(old, [new])
        resized = [n for n, new in bound.replaced.items() if n in bound.names and new.factor.shape != self.shapes[n]]
        if wrong := [*bound.added, *resized, *bound.grown]:
            raise UnsupportedError(
                "onnx.shape",
                f"the adapter adds or resizes {some(wrong)}, and the graph is made for the shapes that it has",
                fix=MERGE_FIRST,
                file=self.model.name,
                tensors=wrong,
            )
        self.bound.config.clear()  # what goes with new shapes

    def _sites_of(self, name: str) -> list[Site]:
        """Where a parameter lies, by names: every copy of it.

        Raises:
            MismatchError: `onnx.ambiguous` where the module of the name reads several weights that differ.
        """
        param = self.params.get(name)
        if param is None or not param.tensors:
            raise MismatchError(
                "onnx.no-site",
                f"no weight of the model is {quoted(name)}: the checkpoint has it, the graph has nothing equal to it",
                fix="is this the checkpoint that the model was exported from, in the same state?",
                file=self.model.name,
                tensors=[name],
            )
        keys = list(param.tensors)
        first = param.named or keys[0]
        same = [key for key in keys if key == first or self._equal(param, first, param, key)]
        if len(same) < len(keys) and not param.named:
            raise MismatchError(
                "onnx.ambiguous",
                f"{quoted(param.module)} reads {some(keys)}, which differ: nothing says which is {quoted(name)}",
                fix=GIVE_BASE,
                file=self.model.name,
                tensors=keys,
            )
        self._check_encoded(name, same)
        sites = [param.site(key, self.model.tensors[key].info) for key in same]
        for twin in (self.params[n] for n in param.twins):
            more = [k for k in twin.tensors if k not in same and self._equal(param, first, twin, k)]
            sites += [twin.site(key, self.model.tensors[key].info) for key in more]
        return sites

    def _check_encoded(self, name: str, keys: Sequence[str]) -> None:
        if encoded := [key for key in keys if key not in self.model.tensors]:
            raise UnsupportedError(
                "onnx.encoded",
                f"{quoted(name)} keeps its numbers in {self.encoded.get(encoded[0], 'a field')}, where they cannot be "
                "rewritten in place",
                fix="save it with raw data: tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array"
                "(tensor), tensor.name)) for each initializer",
                file=self.model.name,
                tensors=encoded,
            )

    def _equal(self, a: Param, key: str, b: Param, other: str) -> bool:
        turned = a.tensors[key] != b.tensors[other]
        if key not in self.model.tensors or other not in self.model.tensors:
            return False
        return equal(self.model.tensors[key], self.model.tensors[other], turned=turned)

    def _claim(self, name: str, site: Site) -> None:
        """Refuses a change of a tensor that is somebody else's too."""
        for piece in site.pieces:
            located, shared = self.model.tensors[piece.tensor], self.shared.get(piece.tensor)
            self._check_kept(name, located)
            if shared is None:
                continue
            others = shared.paths - {""}
            module = name.rpartition(".")[0]
            if len(shared.ways) > 1 or (module in others and others != {module}):
                raise self._shared_error(name, sorted(others - {module}) or list(shared.ops))
            if shared.scaled:
                raise UnsupportedError(
                    "onnx.layout",
                    f"the graph multiplies {quoted(piece.tensor)} with a number when it uses it",
                    fix=MERGE_FIRST,
                    file=self.model.name,
                    tensors=[piece.tensor],
                )

    def _check_kept(self, name: str, located: Located) -> None:
        """Refuses to change what is not kept as numbers that can be rewritten."""
        if located.file.name in self.checked:
            raise UnsupportedError(
                "onnx.checksum",
                f"the graph has a checksum of {quoted(located.file.name)}, which would no longer be true",
                fix="save the model again without checksums (onnx.save_model(..., save_as_external_data=True))",
                file=self.model.name,
                tensors=[name],
            )
        if located.info.dtype not in ("F32", "F16", "BF16", "F64"):
            raise UnsupportedError(
                "onnx.quantised",
                f"{quoted(name)} is kept as codes ({located.info.dtype})",
                fix="merge into the float model that it was quantised from, and quantise the result",
                file=self.model.name,
                tensors=[name],
            )

    def _shared_error(self, name: str, others: Sequence[str]) -> MismatchError:
        return MismatchError(
            "onnx.shared",
            f"the weight of {quoted(name)} is used for {some(list(others))} as well, which the adapter does not change",
            fix=f"{MERGE_FIRST}: there they become two weights",
            file=self.model.name,
            tensors=[name],
        )

    def _lower(self, made: Binding, name: str) -> None:
        shape = self.shapes[name]
        if not self.sites[name]:
            raise AssertionError(f"{name} changes nowhere")
        for copy, site in enumerate(self.sites[name]):
            self._take(name, site)
            for update in self.bound.updates.get(name, ()):
                for tensor, low in self._updates(name, shape, site, copy, update):
                    made.update(tensor, low)
            new = self.bound.replaced.get(name)
            if new is None:
                continue
            tensor = site.pieces[0].tensor
            stored = self.model.tensors[tensor].info
            if site.same and new.factor.info.dtype == stored.dtype and new.factor.shape == stored.shape:
                made.replaced[tensor] = new
                continue
            keys = (("value", new.factor.key),)
            module = name.rpartition(".")[0]
            rows = list(whole_change(name, shape, site, "replacement", new.adapter, module, keys, 1.0))
            for tensor, low in rows:
                made.updates.setdefault(tensor, []).insert(0, low)  # before updates, which were trained on it

    def _take(self, name: str, site: Site) -> None:
        """Two parameters that an adapter changes may not be one weight; pieces of one may."""
        for piece in site.pieces:
            span = f"{piece.tensor}:{piece.row}:{piece.col}"
            if (other := self.owner.setdefault(span, name)) != name:
                raise MismatchError(
                    "onnx.shared",
                    f"the adapter changes {quoted(other)} and {quoted(name)}, which are one weight of the model",
                    fix=MERGE_FIRST,
                    file=self.model.name,
                    tensors=[other, name],
                )

    def _updates(
        self, name: str, shape: Sequence[int], site: Site, copy: int, update: Update
    ) -> list[tuple[str, Update]]:
        if not isinstance(update, ByKind):
            return list(lowered(name, shape, site, update))
        sites = {n: self.sites[n][min(copy, len(self.sites[n]) - 1)] for n in self._tensors_of(update)} | {name: site}
        view = lowered_view(update.view, self.shapes, sites)
        beside = None if update.bias_of is None else lowered_view(update.bias_of, self.shapes, sites)
        mine = _indices(update.view, update.part, self.shapes, sites)
        return [(view.parts[i].tensor, replace(update, view=view, part=i, bias_of=beside)) for i in mine]

    def _tensors_of(self, update: ByKind) -> set[str]:
        views = [update.view, *([] if update.bias_of is None else [update.bias_of])]
        return {part.tensor for view in views for part in view.parts}


def _indices(view: View, part: int, shapes: Mapping[str, Sequence[int]], sites: Mapping[str, Site]) -> range:
    """Which parts of a lowered view come of one part of the view."""
    counts = [len(lowered_view(View(view.shape, (p,)), shapes, sites).parts) for p in view.parts]
    first = sum(counts[:part])
    return range(first, first + counts[part])
