"""PyTorch files read as if they were safetensors: names, shapes and offsets only, no tensor data.

The pickle goes through torch's ``weights_only`` loader, in an archive of our own making that holds nothing
else, onto the meta device: each storage then tells where it would have been read from. torch is imported on
use.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import zipfile
from typing import Any

from loramerge.errors import InputError, LoramergeError, UnsafeError, UnsupportedError
from loramerge.tensors import dtypes, torchzip
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import plural, quoted, some

MIN_TORCH = (2, 10)  # CVE-2026-24747: before it, weights_only corrupts memory on hostile files
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_SAVE_AGAIN = "load it with torch.load(..., weights_only=True) and save plain contiguous tensors as safetensors"
_LOCAL_HEADER = 30


def read_header(source: ByteSource) -> Header:
    """Read the names, dtypes, shapes and file offsets of the tensors in a PyTorch zip file.

    Accepted are a dict of tensors by name, alone or under ``state_dict``, ``model_state_dict``, ``model`` or
    ``module``; numbers, strings and None among them are left out. Tensors may share bytes. `data_start` is 0.

    Raises:
        UnsafeError: ``pickle.unsafe`` (torch refuses it), ``pickle.storage`` (a storage lies about its size),
            ``pickle.archive``; InputError: ``pickle.content`` (no tensors, or other things among them),
            ``pickle.archive``, ``input.*``; UnsupportedError: ``pickle.tensor`` (sparse, quantised, meta,
            non-contiguous, unknown dtype), ``pickle.torch-version``, ``pickle.legacy``,
            ``pickle.torchscript``, ``pickle.big-endian``.
    """
    archive = torchzip.read_archive(source)
    _check_version(source)
    stand_in, places = _stand_in(archive)
    document = _load(stand_in, source)
    infos = [_info(name, tensor, places, source) for name, tensor in _tensors(document, source).items()]
    infos.sort(key=lambda info: (info.begin, info.name))
    return Header({info.name: info for info in infos}, {}, 0, source.size)


def _check_version(source: ByteSource) -> None:
    import torch

    version = torch.__version__.split("+")[0].split(".")
    if tuple(int(part) for part in version[:2]) < MIN_TORCH:
        message = f"reading PyTorch files needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, this is {torch.__version__}"
        fix = "upgrade torch, or convert the file to safetensors"
        raise UnsupportedError("pickle.torch-version", message, fix=fix, file=source.name)


def _stand_in(archive: torchzip.Archive) -> tuple[io.BytesIO, dict[int, tuple[int, int]]]:
    """An archive with the pickle and empty storages; offset of each storage in it -> its place in the file.

    torch sees nothing of the file but the pickle, so its zip reader and ours cannot disagree, no mark in the
    file can move the offsets, and no tensor data is read.
    """
    buffer = io.BytesIO()
    places = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as out:
        out.writestr("a/data.pkl", archive.pickle)
        out.writestr("a/version", "3\n")
        out.writestr("a/byteorder", sys.byteorder)
        for key, place in archive.storages.items():
            info = zipfile.ZipInfo(f"a/data/{key}")
            out.writestr(info, b"")
            places[info.header_offset + _LOCAL_HEADER + len(info.filename.encode("utf-8"))] = place
    buffer.seek(0)
    return buffer, places


def _load(stand_in: io.BytesIO, source: ByteSource) -> Any:
    import torch

    # Offsets are recorded on the meta device; releases that do it in fake mode only pay for its slow import.
    meta = hasattr(torch.serialization, "_is_meta_location")
    mode: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not meta:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode()
    try:
        with mode:
            return torch.load(stand_in, map_location="meta" if meta else "cpu", weights_only=True)
    except LoramergeError:
        raise
    except Exception as error:
        text = str(error)
        if "Quantized" in text or "_empty_affine_quantized" in text:
            message = "holds quantised tensors"
            raise UnsupportedError("pickle.tensor", message, fix=_SAVE_AGAIN, file=source.name) from None
        # torch's text begins with advice on how to override the refusal; what it refused comes later.
        lines = [line for line in text.splitlines() if "Unsupported" in line] or text.strip().splitlines()
        reason = quoted(re.sub(r"\x1b\[[0-9;]*m", "", (lines or [type(error).__name__])[0]).strip(), 300)
        message = f"torch's weights_only loader refuses it: {reason}"
        fix = "convert it to safetensors on a machine where running its code does no harm"
        raise UnsafeError("pickle.unsafe", message, fix=fix, file=source.name) from None


def _tensors(document: Any, source: ByteSource) -> dict[str, Any]:
    """The dict of tensors in what was loaded, without the plain values beside them."""
    import torch

    def refuse(message: str, names: list[str] | None = None) -> InputError:
        return InputError("pickle.content", message, fix=_SAVE_AGAIN, file=source.name, tensors=names or [])

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, dict) and any(isinstance(item, torch.Tensor) for item in value.values())

    if not isinstance(document, dict):
        raise refuse(f"holds a {type(document).__name__}, not a dict of tensors")
    if not holds_tensors(document):
        wrapped = [key for key in _WRAPPERS if holds_tensors(document.get(key))]
        if len(wrapped) != 1:
            reason = f"several dicts of tensors: {some(wrapped)}" if wrapped else "no tensors"
            raise refuse(f"holds {reason}; its keys are {some([str(key) for key in document])}")
        document = document[wrapped[0]]
    odd = next((key for key in document if not isinstance(key, str)), None)
    if odd is not None:
        raise refuse(f"key {quoted(odd)} is a {type(odd).__name__}, not a string")
    tensors = {}
    for name, value in document.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None and not isinstance(value, (bool, int, float, complex, str)):
            raise refuse(f"{quoted(name)} is a {type(value).__name__}, not a tensor", [name])
    return tensors


def _info(name: str, tensor: Any, places: dict[int, tuple[int, int]], source: ByteSource) -> TensorInfo:
    import torch

    def refuse(reason: str) -> UnsupportedError:
        message = f"tensor {quoted(name)} {reason}"
        return UnsupportedError("pickle.tensor", message, fix=_SAVE_AGAIN, file=source.name, tensors=[name])

    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        raise refuse("has a lone surrogate in its name")
    if tensor.layout is not torch.strided:
        raise refuse(f"is sparse ({str(tensor.layout).removeprefix('torch.')})")
    if tensor.is_quantized:
        raise refuse("is quantised")
    dtype = _dtype_names().get(tensor.dtype)
    if dtype is None:
        raise refuse(f"has dtype {str(tensor.dtype).removeprefix('torch.')}, which safetensors does not have")
    if tensor.is_conj() or tensor.is_neg():
        raise refuse("is a conjugate or negative view")
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None:
        raise refuse("has no data: it was saved on the meta device")
    if not tensor.is_contiguous():
        raise refuse("is not contiguous in memory: save its .contiguous()")
    begin, end = places[offset]
    # What the storage claims, and what the view needs: on the meta device a view may grow its storage.
    nbytes = tensor.numel() * tensor.element_size()
    first = tensor.storage_offset() * tensor.element_size() if nbytes else 0
    claimed = max(storage.nbytes(), first + nbytes)
    if claimed != end - begin:
        message = f"tensor {quoted(name)}: its storage claims {plural(claimed, 'byte')}, the file has {end - begin}"
        fix = "do not use this file unless you know who made it"
        raise UnsafeError("pickle.storage", message, fix=fix, file=source.name, tensors=[name])
    return TensorInfo(name, dtype, tuple(tensor.shape), begin + first, begin + first + nbytes)


def _dtype_names() -> dict[Any, str]:
    import torch

    names = {getattr(torch, dtypes.display(name), None): name for name in dtypes.BITS}
    return {dtype: name for dtype, name in names.items() if isinstance(dtype, torch.dtype)}
