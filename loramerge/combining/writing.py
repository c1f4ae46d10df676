"""From what was computed to the items that are written: pairs with their biases, and what is stored whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from loramerge.algebra import Factors
from loramerge.combining.computing import Stored
from loramerge.combining.matching import Slot
from loramerge.combining.report import Result
from loramerge.converting.from_pairs import difference, pair
from loramerge.converting.items import PAIR, Item
from loramerge.errors import MismatchError
from loramerge.tensors.text import plural, some


def items_of(result: Result) -> list[Item]:
    """Everything that is left, under our names; what is not is noted in `result.left_out`.

    Raises:
        MismatchError: `combine.empty`: nothing is left that an adapter could be made of.
    """
    items = [*_pairs_and_wholes(result), *(w.item for w in result.wholes)]
    if all(item.kind == "plain" for item in items):
        raise _empty(result)
    return items


def _empty(result: Result) -> MismatchError:
    if not result.stored:
        return MismatchError(
            "combine.empty",
            "the adapters only replace whole parameters, and no adapter is made of these alone",
            fix="merge them into the base instead",
        )
    names = [slot.key.name for slot, _ in result.stored]
    return MismatchError(
        "combine.empty",
        f"nothing is left: the result is zero in all of {plural(len(names), 'module')}, {some(names, 2)}",
        fix="the base alone is the result; see the weights",
        tensors=names[:5],
    )


def _pairs_and_wholes(result: Result) -> Iterator[Item]:
    """Pairs with their biases, and what is stored whole."""
    biased = "bias" in result.target.keys.get(PAIR, {})
    biases = {
        (slot.key.role, slot.key.path): stored.whole.flatten()
        for slot, stored in result.stored
        if slot.key.leaf == "bias" and stored.whole is not None and bool(stored.whole.any())
    }
    attached = set()
    for slot, stored in result.stored:
        if stored.whole is not None:
            continue
        place = slot.key.role, slot.key.path
        bias = biases.get(place) if biased and slot.key.leaf == "weight" else None
        factors = stored.factors
        assert factors is not None
        if not stored.rank:
            if bias is None:
                result.left_out.append(slot.key.name)
                continue
            m, n = factors.shape  # the bias needs a pair to go with
            factors = Factors(factors.b.new_zeros(m, 1), factors.a.new_zeros(1, n))
        value = None
        if biased and biases and not stored.embedding:
            # A reader that takes biases of pairs takes them of all pairs.
            value = factors.b.new_zeros(factors.shape[0]) if bias is None else bias
            attached.add(place)
        yield _pair(slot, stored, factors, value)
    for slot, stored in result.stored:
        place = slot.key.role, slot.key.path
        if stored.whole is None or (slot.key.leaf == "bias" and place in attached):
            continue
        if not bool(stored.whole.any()):
            result.left_out.append(slot.key.name)
            continue
        value = stored.whole.reshape(stored.shape)
        yield replace(
            difference(slot.path, slot.key.leaf, value, role=slot.key.role, flat=slot.flat),
            module=slot.module,
            how=stored.how,
        )


def _pair(slot: Slot, stored: Stored, factors: Factors, bias: Tensor | None) -> Item:
    item = pair(
        slot.path,
        factors.b,
        factors.a,
        shape=None if stored.embedding else stored.shape,
        exact_shape=stored.exact_shape,
        embedding=stored.embedding,
        role=slot.key.role,
        flat=slot.flat,
        leaf="" if slot.key.leaf == "weight" else slot.key.leaf,
        bias=bias,
    )
    return replace(item, module=slot.module, how=stored.how, error=stored.error, norm=stored.norm)
