"""What the bytes of a result may depend on beside inputs and recipe: versions of packages, and the processor."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

EXPORTING = ("onnx", "onnx-ir", "onnxscript", "transformers")
"""Packages that write the graph of an ONNX export."""

CPU = "cpu"

# What torch asks of a processor for each of its kinds of kernels (ATen/native/DispatchStub.cpp).
_LEVELS = (
    ("AVX512", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}),
    ("AVX2", {"avx2", "fma"}),
)


def identity(version: str, exports: bool) -> dict[str, str]:
    """`{"loramerge", "torch", "cpu"}`, for exports also what writes the graph. Imports none of them.

    Results in float32 depend, in the last place of a few weights, on how torch and the processor sum.
    """
    found = {"loramerge": version, "torch": _version("torch"), CPU: cpu()}
    return found | ({name: _version(name) for name in EXPORTING} if exports else {})


def cpu() -> str:
    """The machine and the kind of kernels that torch takes on it: `x86_64 AVX2`."""
    machine = platform.machine()
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    flags = set(line.partition(":")[2].split())
                    break
    except OSError:
        return machine
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    levels = [name for name, needed in _LEVELS if needed <= flags]
    if asked in ("default", "avx2"):
        levels = [name for name in levels if name.lower() == asked]
    return " ".join([machine, *levels[:1]])


def lasting(numerics: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: all but the processor, whose effect is seen in the digests of the outputs."""
    return {name: value for name, value in numerics.items() if name != CPU}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
