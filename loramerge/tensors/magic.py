"""What a file is, told by its first bytes and never by its suffix."""

from __future__ import annotations

PREFIX_BYTES = 512
"""How many first bytes `identify` wants (fewer where the file is shorter)."""

MAX_HEADER_BYTES = 100_000_000
"""Longest safetensors header that the safetensors library reads or writes."""

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"

_DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "safetensors": ("a safetensors file", "give it a name that ends in .safetensors"),
    "zip": (
        "a zip archive (a PyTorch checkpoint or .npz)",
        "if it is a PyTorch checkpoint, name it .bin and pass --allow-pickle, or convert it to safetensors",
    ),
    "pickle": (
        "a Python pickle (an old PyTorch checkpoint)",
        "load it with torch.load(..., weights_only=True) and save it with safetensors.torch.save_file",
    ),
    "gguf": ("a GGUF file", "use the safetensors checkpoint that the GGUF file was made from"),
    "gzip": ("gzip-compressed", "unpack it with gunzip first"),
    "lfs-pointer": ("a Git LFS pointer, not the file itself", "run `git lfs pull` where it was cloned"),
    "html": ("a web page, not weights", "download the file itself, not the page about it"),
    "npy": ("a NumPy array file", "save the arrays by name with safetensors.numpy.save_file"),
    "json": ("a JSON text file", "give the weights file; for an index, the directory that it lies in"),
    "empty": ("empty; was the download incomplete?", "download it again"),
    "onnx": ("an ONNX model", "give it a name that ends in .onnx, or the checkpoint that it was exported from"),
    "unknown": ("of no known format", "give a .safetensors file, or download it again"),
}


def identify(first_bytes: bytes, size: int) -> str:
    """What a file of `size` bytes is, from its first `PREFIX_BYTES` bytes.

    Returns:
        ``"safetensors"``, ``"zip"``, ``"pickle"``, ``"gguf"``, ``"gzip"``, ``"lfs-pointer"``, ``"html"``,
        ``"npy"``, ``"json"``, ``"empty"``, ``"onnx"`` (a guess, made last) or ``"unknown"``.
    """
    if size == 0:
        return "empty"
    if _is_safetensors(first_bytes):  # first: a header length may spell any other magic number
        return "safetensors"
    if first_bytes.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if first_bytes[:1] == b"\x80" and first_bytes[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if first_bytes.startswith(b"GGUF"):
        return "gguf"
    if first_bytes.startswith(b"\x1f\x8b"):
        return "gzip"
    if first_bytes.startswith(b"\x93NUMPY"):
        return "npy"
    if first_bytes.startswith(b"version https://git-lfs"):
        return "lfs-pointer"
    text = first_bytes.removeprefix(_BOM).lstrip(_SPACE)
    if text[:9].lower().startswith((b"<!doctype", b"<html")):
        return "html"
    if text[:1] in (b"{", b"["):
        return "json"
    return "onnx" if _is_onnx(first_bytes) else "unknown"


def describe(kind: str) -> tuple[str, str]:
    """What a file of this `kind` is and what to do about it: ``("a web page, ...", "download the ...")``."""
    return _DESCRIPTIONS[kind]


def _is_safetensors(first_bytes: bytes) -> bool:
    # A length the library would read, then an object, perhaps after spaces: it allows leading ones.
    if len(first_bytes) < 9 or int.from_bytes(first_bytes[:8], "little") > MAX_HEADER_BYTES:
        return False
    return first_bytes[8:].lstrip(_SPACE)[:1] in (b"{", b"")


def _is_onnx(first_bytes: bytes) -> bool:
    # ModelProto: field 1 (ir_version) as a small varint, then one of its fields 2-8, 14 or 20.
    return (
        len(first_bytes) >= 3
        and first_bytes[0] == 0x08
        and 1 <= first_bytes[1] <= 32
        and first_bytes[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2)
    )
