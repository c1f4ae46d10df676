"""Whether two stored tensors hold the same numbers, perhaps one of them turned around."""

from __future__ import annotations

from loramerge.tensors.checkpoint import Located
from loramerge.tensors.dtypes import bits

_BLOCK = 4 << 20


def equal(a: Located, b: Located, *, turned: bool = False) -> bool:
    """Whether `b` has the bytes of `a`, or of its transpose. Both of one dtype."""
    rows, cols = (a.info.shape[0], a.info.numel // a.info.shape[0]) if a.info.numel and a.info.shape else (1, 1)
    wanted = (cols, rows) if turned else a.info.shape
    if a.info.dtype != b.info.dtype or tuple(wanted) != b.info.shape or a.info.nbytes != b.info.nbytes:
        return False
    if a.file is b.file and a.info.begin == b.info.begin:
        return not turned
    size = bits(a.info.dtype) // 8
    if not turned:
        for at in range(0, a.info.nbytes, _BLOCK):
            n = min(_BLOCK, a.info.nbytes - at)
            if a.file.source.read(a.info.begin + at, n) != b.file.source.read(b.info.begin + at, n):
                return False
        return True
    import numpy

    word = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}[size]
    whole = numpy.frombuffer(b.file.source.read(b.info.begin, b.info.nbytes), dtype=word).reshape(cols, rows)
    step = max(1, _BLOCK // (cols * size))
    for r0 in range(0, rows, step):
        n = min(step, rows - r0)
        raw = a.file.source.read(a.info.begin + r0 * cols * size, n * cols * size)
        if not numpy.array_equal(numpy.frombuffer(raw, dtype=word).reshape(n, cols), whole[:, r0 : r0 + n].T):
            return False
    return True
