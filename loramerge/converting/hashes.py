"""Digests that trainers keep in the metadata of their files, to tell one adapter from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

LEGACY_OFFSET, LEGACY_BYTES = 0x100000, 0x10000


def digests(header: bytes, data: Iterator[bytes], names: Mapping[str, str]) -> dict[str, str]:
    """What a file with this header and this data gets noted: `model`: sha256 of everything after the header;
    `legacy`: the first eight digits of the sha256 of 64 KiB from 1 MiB on, header counted in.

    sd-scripts, library/train_util.py: precalculate_safetensors_hashes, addnet_hash_safetensors, addnet_hash_legacy.

    Args:
        header: of the file as it would be without these entries of its metadata.
        data: what follows the header, in pieces.
        names: our names -> the dialect's.
    """
    model, legacy = hashlib.sha256(), hashlib.sha256()
    at = 0
    for piece in (header, *data):
        if at:
            model.update(piece)
        begin, end = max(0, LEGACY_OFFSET - at), min(len(piece), LEGACY_OFFSET + LEGACY_BYTES - at)
        if begin < end:
            legacy.update(piece[begin:end])
        at += len(piece)
    found = {"model": model.hexdigest(), "legacy": legacy.hexdigest()[:8]}
    return {theirs: found[ours] for ours, theirs in names.items()}
