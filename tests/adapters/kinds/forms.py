"""Applies forms to whole matrices, for the tests of update kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from loramerge.adapters.kinds.base import Dense, Form, Product, RowDelta, RowMap, WholeMap


def applied(form: Form | None, W: Tensor) -> Tensor:
    """W (out, cols) changed by a form; None changes nothing. W itself is left alone.

    A form that works on rows is applied in blocks of all rows, of one and of three, and must give the same each time.
    """
    match form:
        case None:
            return W.clone()
        case Product(L, R):
            return W + L @ R
        case Dense(delta):
            return W + delta
        case WholeMap(apply):
            return apply(W.clone())
    results = [_by_rows(form, W, step) for step in (len(W), 1, 3)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12 if W.dtype == torch.float64 else 1e-5, atol=1e-12)
    return results[0]


def _by_rows(form: RowDelta | RowMap, W: Tensor, step: int) -> Tensor:
    blocks = []
    for r0 in range(0, len(W), step):
        rows = W[r0 : r0 + step].clone()
        if isinstance(form, RowDelta):
            blocks.append(rows + form.rows(r0, r0 + len(rows)))
        else:
            blocks.append(form.apply(rows, r0))
    return torch.cat(blocks)
