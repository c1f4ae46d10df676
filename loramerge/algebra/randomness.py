"""Random numbers that belong to an element, whenever and wherever it is computed."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

WORDS = 4
"""Numbers of 64 bits that one value of the counter gives (Philox 4x64, Salmon et al. 2011)."""


def stream(seed: int, adapter: bytes, module: str) -> int:
    """The 128-bit key of an adapter's random numbers in one module."""
    digest = hashlib.sha256(f"{seed};{len(adapter)};".encode() + adapter + module.encode()).digest()
    return int.from_bytes(digest[:16], "little")


def uniform(key: int, first: int, count: int) -> Tensor:
    """Numbers `first` to `first + count` of a stream, float64 in [0, 1): element e is the same in every block."""
    skip = first % WORDS
    words = np.random.Philox(key=key, counter=first // WORDS).random_raw(count + skip)[skip:]
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
