"""Lanes: one worker's buffers, and the way of a block through them, on the CPU or over another device."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loramerge.adapters.operators import Operator
from loramerge.errors import UsageError
from loramerge.merging.kernels import CACHED_ELEMENTS, Measured, change_block
from loramerge.tensors.writer import AlignedBuffer


class Operators(NamedTuple):
    """The operators of one tensor, and whether one of them needs the weight from before the updates."""

    each: Sequence[Operator]
    keep_original: bool


class Lane:
    """One worker's buffers, and the way of a block through them on the CPU."""

    def __init__(self, capacity: int, wide: int, dtype: torch.dtype) -> None:
        self.output = AlignedBuffer(capacity)
        self._capacity = wide
        self._input: AlignedBuffer | None = None
        self._compute = torch.empty(CACHED_ELEMENTS, dtype=dtype)

    def window(self, offset: int, length: int) -> memoryview:
        """Memory for `length` bytes that will be written at `offset` of a file."""
        return self.output.window(offset, length)

    def input(self) -> AlignedBuffer:
        """A second buffer, for tensors that change their dtype."""
        if self._input is None:
            self._input = AlignedBuffer(self._capacity)
        return self._input

    def change(
        self, source: Tensor, target: Tensor, first: int, cols: int, operators: Operators, measure: bool
    ) -> Measured:
        """See `change_block`."""
        each, keep = operators
        return change_block(source, target, first, cols, each, self._compute, keep, measure)

    def finish_operators(self) -> None:
        """Waits until operators that were just built are complete."""

    def close(self) -> None:
        self.output.close()
        if self._input is not None:
            self._input.close()


class DeviceLane(Lane):
    """The way of a block over another device: there, computed whole, and back."""

    def __init__(self, capacity: int, wide: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(capacity, wide, dtype)
        self._device = device
        self._dtype = dtype
        self._sums = torch.empty(0, dtype=dtype, device=device)

    def change(
        self, source: Tensor, target: Tensor, first: int, cols: int, operators: Operators, measure: bool
    ) -> Measured:
        block = source.to(self._device, non_blocking=True)
        if self._sums.numel() < block.numel():
            self._sums = torch.empty(block.numel(), dtype=self._dtype, device=self._device)
        rounded = torch.empty(block.numel(), dtype=target.dtype, device=self._device)
        each, keep = operators
        measured = change_block(block, rounded, first, cols, each, self._sums, keep, measure)
        target.copy_(rounded)
        return measured


class CudaLane(DeviceLane):
    """The way of a block over a CUDA device: page-locked buffers and a stream of its own.

    Each worker's copies and kernels are queued on its own stream; while one worker waits for the disk, another's
    block is on the bus and a third's is being computed.
    """

    def __init__(self, capacity: int, wide: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(capacity, wide, dtype, device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._locked = [_page_lock(self.output)]

    def input(self) -> AlignedBuffer:
        fresh = self._input is None
        buffer = super().input()
        if fresh:
            self._locked.append(_page_lock(buffer))
        return buffer

    def change(
        self, source: Tensor, target: Tensor, first: int, cols: int, operators: Operators, measure: bool
    ) -> Measured:
        with torch.cuda.stream(self._stream):
            measured = super().change(source, target, first, cols, operators, measure)
            self._stream.synchronize()
        return measured

    def finish_operators(self) -> None:
        # Factors were copied on the building thread's stream; other workers use them on theirs.
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        for address in self._locked:
            if address:
                torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        super().close()


def _page_lock(buffer: AlignedBuffer) -> int:
    """Page-locks a buffer, so that copies to and from it run beside everything else. Returns its address, or 0."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.memory))
    status = torch.cuda.cudart().cudaHostRegister(address, len(buffer.memory), 0)  # type: ignore[no-untyped-call]
    return address if int(status) == 0 else 0


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda[:N]` or `mps`.

    `auto` is the CPU: a merge is bound by the disk, and a GPU does not make that faster.

    Raises:
        UsageError: `usage.device` for a device that is not there.
    """
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            "usage.device", f"unknown device {name!r}", fix="one of auto, cpu, cuda, cuda:N, mps"
        ) from None
    there = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UsageError("usage.device", f"there is no device {name}", fix="--device cpu")
    return device
