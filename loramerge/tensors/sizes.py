"""Sizes as people write them."""

from __future__ import annotations

import re

from loramerge.errors import UsageError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes: ``"2GB"`` (10^9), ``"1GiB"`` (2^30), ``"500 MB"``, ``"1000000"``.

    Raises:
        UsageError: ``usage.size``: it is no size, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError("usage.size", f"{text!r} is not a size", fix="write it as 2GB, 500MB or 1GiB")
    nbytes = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()]
    if not 1 <= nbytes < 2**63:
        raise UsageError("usage.size", f"{text!r} is out of range", fix="write it as 2GB, 500MB or 1GiB")
    return int(nbytes)
