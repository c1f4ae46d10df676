"""What methods make of factors, as if it were the file of one more adapter: factors that are computed when read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge.errors import InputError
from loramerge.merging.sites import Site
from loramerge.methods import Chosen
from loramerge.tensors.checkpoint import Located, WeightFile
from loramerge.tensors.hashing import block_digest
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import MemorySource
from loramerge.tensors.text import quoted

if TYPE_CHECKING:
    from loramerge.merging.stream import FactorFile, Factors

KEPT_BYTES = 256 << 20
"""Bytes of results that are kept; others are made again."""


class Products(Mapping[str, Located]):
    """Factors `B A` of what a method makes of each site (a `FactorFile`), by the keys that `keys_of` gives.

    They are made in float64 on the CPU from factors as they are stored, with one thread, and rounded once to the dtype
    that the merge computes in: whoever reads them, wherever, gets the same bytes.

    Args:
        adapters: what the sites' updates name by number.
        dtype: `F32` or `F64`.
    """

    transposed: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = {}

    def __init__(self, adapters: Sequence[FactorFile], sites: Sequence[Site], how: Chosen, dtype: str) -> None:
        self.name = how.name
        self.sites = tuple(sites)
        self.how = how
        self.distances: dict[str, float] = {}
        self._adapters = adapters
        self._dtype = dtype
        self._keys = {key: i for i in range(len(sites)) for key in self.keys_of(i)}
        self._locks = [threading.Lock() for _ in sites]
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[Located, Located]] = OrderedDict()
        self._digests: dict[int, bytes] = {}
        self._factors: Factors | None = None

    @property
    def checkpoint(self) -> Products:
        """Itself: it has `tensors`."""
        return self

    @property
    def tensors(self) -> Mapping[str, Located]:
        """Key -> factor."""
        return self

    def keys_of(self, site: int) -> tuple[str, str]:
        """The keys of A and B of a site."""
        return f"{site}.{self.sites[site].name}.A", f"{site}.{self.sites[site].name}.B"

    def elements(self, key: str) -> int:
        """At most how many elements a factor has: an estimate from headers."""
        site = self.sites[self._keys[key]]
        ranks = sum(getattr(update, "rank", 64) for of in site.members for m in of for update in m.updates[:1])
        return ranks * (site.view.cols if key.endswith(".A") else site.view.rows)

    @property
    def held_bytes(self) -> int:
        """Bytes of all factors, if they were all kept."""
        return sum(self.elements(key) for key in self) * (8 if self._dtype == "F64" else 4)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: str) -> Located:
        site = self._keys[key]
        with self._locks[site]:
            with self._lock:
                found = self._kept.get(site)
            if found is None:
                found = self._made(site)
                with self._lock:
                    self._kept[site] = found
                    while len(self._kept) > 1 and self._bytes() > KEPT_BYTES:
                        self._kept.popitem(last=False)
        return found[0 if key == self.keys_of(site)[0] else 1]

    def _bytes(self) -> int:
        return sum(located.info.nbytes for pair in self._kept.values() for located in pair)

    def _made(self, site: int) -> tuple[Located, Located]:
        from loramerge.merging import mixing
        from loramerge.merging.stream import Factors

        with self._lock:
            if self._factors is None:
                import torch

                self._factors = Factors(self._adapters, torch.float64, torch.device("cpu"))
        b, a, distance = mixing.product(self.sites[site], self.how, self._factors.read)
        if distance is not None:
            self.distances[self.sites[site].name] = distance
        A, B = (mixing.raw(t, self._dtype) for t in (a, b))
        digest = block_digest(A + B)
        if self._digests.setdefault(site, digest) != digest:
            # An undo file with these would give back something else than what was merged into.
            message = f"the factors for {quoted(self.sites[site].name)} were not the same when they were made again"
            raise InputError("method.unsteady", message, fix="merge again without --reversible")
        keys = self.keys_of(site)
        return self._located(keys[0], a.shape, A), self._located(keys[1], b.shape, B)

    def _located(self, key: str, shape: Sequence[int], data: bytes) -> Located:
        file = WeightFile("", MemorySource(data, self.name), Header({}, {}, 0, len(data)), "memory")
        return Located(file, TensorInfo(key, self._dtype, tuple(shape), 0, len(data)))
