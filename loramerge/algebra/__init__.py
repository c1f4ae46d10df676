"""Algebra on low-rank updates: pure functions on factors and tensors, without files or names.

An update of one module is `D = weight scale B A` with B (m, r) and A (r, n), m the outputs and n the inputs of the
module; convolutions are flattened to (m, c * kernel). `fold` makes `Factors` of it, a `Stack` holds the updates that
several adapters make to one module, methods take a stack and give an update of the same shape::

    stack = Stack([fold(b1, a1, scale=2.0), fold(b2, a2, scale=1.0, weight=-0.5)])
    exact = linear(stack)
    small = linear(stack, fixed(16))
    merged = ties(stack, density=0.2)          # full rank: read `merged.rows(i, j)`, or cut `merged.factors(fixed(16))`

Everything is computed in float64 unless asked otherwise, on the device of the tensors. The order of adapters changes
no bit. Only the elementwise methods in space `full`, and `truncated`, form (m, n) arrays. No result but the factor-wise
ones changes when factors (B, A) become (B M, M^-1 A), if random methods are told who the adapter is (`fold(key=...)`):
their masks go by the bytes of the factors otherwise. Values out of range raise ValueError.
"""

from loramerge.algebra import noise
from loramerge.algebra.combine import cat, cosines, karcher, linear, model_stock, slerp, weighted
from loramerge.algebra.core import (
    Factors,
    RankRule,
    Stack,
    Svd,
    Update,
    content_key,
    fold,
    norm,
    relative_error,
)
from loramerge.algebra.extract import Extraction, extract
from loramerge.algebra.factored import fuse_rows, hadamard, kronecker, split_rows, tucker
from loramerge.algebra.masks import (
    adapter_threshold,
    breadcrumbs,
    dare,
    dare_ties,
    della,
    magnitude,
    ties,
    truncated,
)
from loramerge.algebra.peft_compat import (
    FactorWise,
    Weighted,
    factor_dare,
    factor_linear,
    factor_magnitude,
    factor_ties,
)
from loramerge.algebra.rank import budget, cumulative, energy, fixed, frobenius, ratio, threshold
from loramerge.algebra.resize import Resized, pad, resize, store
from loramerge.algebra.spaces import SPACES
from loramerge.algebra.subspace import iso_c, iso_cts, knots, svc, tsv, wudi
from loramerge.algebra.thresholds import kth_largest

__all__ = [
    "SPACES",
    "Extraction",
    "FactorWise",
    "Factors",
    "RankRule",
    "Resized",
    "Stack",
    "Svd",
    "Update",
    "Weighted",
    "adapter_threshold",
    "breadcrumbs",
    "budget",
    "cat",
    "content_key",
    "cosines",
    "cumulative",
    "dare",
    "dare_ties",
    "della",
    "energy",
    "extract",
    "factor_dare",
    "factor_linear",
    "factor_magnitude",
    "factor_ties",
    "fixed",
    "fold",
    "frobenius",
    "fuse_rows",
    "hadamard",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "kronecker",
    "kth_largest",
    "linear",
    "magnitude",
    "model_stock",
    "noise",
    "norm",
    "pad",
    "ratio",
    "relative_error",
    "resize",
    "slerp",
    "split_rows",
    "store",
    "svc",
    "threshold",
    "ties",
    "truncated",
    "tsv",
    "tucker",
    "weighted",
    "wudi",
]
