"""The dtypes of the safetensors format: names on disk, sizes in bits, names for people."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Name on disk -> (bits, name for people). The whole `Dtype` of safetensors 0.8 (safetensors/src/tensor.rs).
_TABLE: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn"),
    "F6_E2M3": (6, "float6_e2m3fn"),
    "F6_E3M2": (6, "float6_e3m2fn"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}

BITS: Mapping[str, int] = MappingProxyType({name: bits for name, (bits, _) in _TABLE.items()})
"""Bits of one element by the name on disk (``"BF16"`` -> 16)."""


def bits(name: str) -> int:
    """Bits of one element of the dtype called `name` on disk. `KeyError` when there is no such dtype."""
    return BITS[name]


def is_float(name: str) -> bool:
    """Whether `name` is a real floating-point dtype (fp8, fp6 and fp4 count; complex does not)."""
    return name in _TABLE and _TABLE[name][1].startswith(("float", "bfloat"))


def display(name: str) -> str:
    """The name for people: ``"BF16"`` -> ``"bfloat16"``. An unknown name comes back as it is."""
    return _TABLE[name][1] if name in _TABLE else name
