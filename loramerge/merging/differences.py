"""The undo code of updates that depend on the weight: how W and M differ, whatever made M of W."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

VERSION = 1
CHECK = struct.Struct("<I")
XOR_HEADER = struct.Struct("<BBxxI")

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode_xor(W: Tensor, M: Tensor) -> bytes:
    """What it takes, besides M, to get W back bit for bit, whatever made M of it. Any one dtype.

    Of the bits of a float as an ordered number, the difference between W and M: it is smaller than their exclusive or,
    which carries spread over. Byte planes are compressed apart: the high ones are nearly all zero.
    """
    if M.dtype != W.dtype or M.numel() != W.numel() or W.numel() >= 1 << 32:
        raise ValueError(f"W has {W.numel()} elements of {W.dtype}, M has {M.numel()} of {M.dtype}")
    w, m = _ordered(W), _ordered(M)
    steps = w - m
    steps = (steps << 1) ^ (steps >> (8 * steps.itemsize - 1))  # 0, -1, 1, -2, ... as 0, 1, 2, 3, ...
    pieces = [XOR_HEADER.pack(VERSION, steps.itemsize, steps.size)]
    planes = steps.astype(steps.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, steps.itemsize)
    for plane in planes.T:
        packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        packed = packer.compress(plane.tobytes()) + packer.flush()
        pieces += [CHECK.pack(len(packed)), packed]
    coded = b"".join(pieces)
    return coded + CHECK.pack(zlib.crc32(coded))


def decode_xor(M: Tensor, coded: bytes) -> Tensor:
    """W (n,) bit for bit, from M (n,) and what `encode_xor` gave.

    Raises:
        ValueError: the bytes are damaged, or are for a tensor of another size.
    """
    m = _ordered(M)
    coded = checked(coded, XOR_HEADER.size)
    if XOR_HEADER.unpack_from(coded) != (VERSION, m.itemsize, m.size):
        raise ValueError(f"undo data is not for {m.size} elements of {m.itemsize} bytes, or of another version")
    planes = np.empty((m.size, m.itemsize), np.uint8)
    at = XOR_HEADER.size
    for i in range(m.itemsize):
        if len(coded) < at + CHECK.size:
            raise ValueError("undo data is cut off")
        (length,) = CHECK.unpack_from(coded, at)
        at += CHECK.size
        unpacker = zlib.decompressobj()
        try:
            plane = unpacker.decompress(coded[at : at + length], m.size + 1)
        except zlib.error as error:
            raise ValueError("undo data is damaged: it cannot be decompressed") from error
        if len(plane) != m.size or not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
            raise ValueError("undo data has the wrong length")
        at += length
        planes[:, i] = np.frombuffer(plane, np.uint8)
    if at != len(coded):
        raise ValueError("undo data has the wrong length")
    steps = planes.view(m.dtype.newbyteorder("<")).reshape(-1).astype(m.dtype)
    steps = ((steps >> 1) & np.iinfo(m.dtype).max) ^ -(steps & 1)
    return torch.from_numpy(_reordered(steps + m)).view(M.dtype)


def _ordered(tensor: Tensor) -> Array:
    """The bits of floats as ints in the order of their values, -0.0 one below 0.0; `_reordered` undoes it."""
    return _reordered(tensor.detach().cpu().contiguous().view(-1).view(INTEGERS[tensor.element_size()]).numpy())


def _reordered(bits: Array) -> Array:
    return np.asarray(bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max))


def checked(coded: bytes, least: int) -> bytes:
    """The bytes without their checksum, which is right."""
    if len(coded) < least + CHECK.size:
        raise ValueError("undo data is cut off")
    coded, (check,) = coded[: -CHECK.size], CHECK.unpack(coded[-CHECK.size :])
    if zlib.crc32(coded) != check:
        raise ValueError("undo data is damaged: its checksum is wrong")
    return coded
