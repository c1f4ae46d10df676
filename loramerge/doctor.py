"""What this machine and this installation can do: versions, processors, a directory's file system, the Hub."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import importlib.metadata
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loramerge import __version__
from loramerge.errors import InputError, LoramergeError
from loramerge.tensors.source import stat_file
from loramerge.tensors.writer import PAGE, AlignedBuffer, copy_whole_file, linux_call

NEEDED = ("torch", "safetensors", "numpy", "click", "huggingface-hub", "onnx", "xxhash")
EXTRAS = ("peft", "transformers")
# As /proc/cpuinfo calls them, on x86 and on ARM.
MATRIX_FLAGS = ("amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16", "sme", "bf16", "svebf16")

_FSYNC_SECONDS = 0.5
_EXCHANGE = 2
_AT_FDCWD = -100


def examine(directory: str | Path, *, self_test: Callable[[Path], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Look at everything. No network; nothing is left in `directory`.

    Args:
        directory: whose file system is tried.
        self_test: merges something in the directory that it is given; its ``ok`` counts. It is not called where
            a package is missing.

    Returns:
        Plain data: ``ok`` (all needed packages load and the self test passed), ``versions``, ``packages``,
        ``extras``, ``processor``, ``devices``, ``directory``, ``hub``, ``self_test``.

    Raises:
        InputError: `directory` does not exist or is none.
    """
    name, path = str(directory), Path(directory)
    if not os.path.isdir(path):
        stat_file(path, name)
        raise InputError("input.not-directory", "is not a directory", fix="give a directory", file=name)
    packages = {package: _package(package) for package in NEEDED}
    devices, packages["torch"]["problem"] = _devices()
    whole = all(package["version"] and not package["problem"] for package in packages.values())
    test = _self_test(self_test) if whole else {"ok": False, "why": "a package is missing or does not load"}
    return {
        "ok": whole and bool(test["ok"]),
        "versions": {
            "loramerge": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "packages": packages,
        "extras": {package: _package(package)["version"] for package in EXTRAS},
        "processor": _processor(),
        "devices": devices,
        "directory": _directory(path, name),
        "hub": _hub(),
        "self_test": test,
    }


def _package(name: str) -> dict[str, Any]:
    """The version of an installed package, from its metadata; it is not imported."""
    try:
        return {"version": importlib.metadata.version(name), "problem": None}
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "problem": "is not installed"}


# -------------------------------------------------------------------------------------------- processors


def _processor() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = "", set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name" and not model:
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return {
        "model": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable": usable,
        "matrix_units": [flag for flag in MATRIX_FLAGS if flag in flags],
        "memory": _memory(),
    }


def _memory() -> int | None:
    """Bytes of memory of the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> tuple[dict[str, Any], str | None]:
    """What torch sees, and why it cannot be loaded, if so."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation fails in many ways: libraries, symbols, versions
        return {"threads": None, "cuda": [], "mps": False}, f"cannot be loaded: {type(error).__name__}: {error}"
    cuda = []
    with contextlib.suppress(Exception):  # a driver that does not fit is no reason to say nothing else
        cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    mps = False
    with contextlib.suppress(Exception):
        mps = bool(torch.backends.mps.is_available())
    return {"threads": torch.get_num_threads(), "cuda": cuda, "mps": mps}, None


# ---------------------------------------------------------------------------------------------- the disk


def _directory(path: Path, name: str) -> dict[str, Any]:
    """Space and abilities of the file system that holds `path`: each True, False, or None where not tried."""
    data: dict[str, Any] = {"path": name, "free": None, "writable": False, "why": None}
    data |= dict.fromkeys(("direct_io", "fallocate", "reflink", "exchange", "hard_links", "fsync_per_second"))
    with contextlib.suppress(OSError):
        data["free"] = shutil.disk_usage(path).free
    try:
        with tempfile.TemporaryDirectory(prefix=".loramerge-doctor-", dir=path) as scratch:
            data["writable"] = True
            data |= _abilities(Path(scratch))
    except OSError as error:
        data["why"] = error.strerror or str(error)
    return data


def _abilities(scratch: Path) -> dict[str, Any]:
    one, two = scratch / "one", scratch / "two"
    one.write_bytes(b"1" * PAGE)
    two.write_bytes(b"2" * PAGE)
    return {
        "direct_io": _tried(lambda: _write_direct(scratch / "direct")),
        "fallocate": _tried(lambda: _allocate(scratch / "allocated")),
        "reflink": _tried(lambda: copy_whole_file(one, scratch / "cloned", link=False) == "cloned"),
        "exchange": _tried(lambda: _exchange(one, two)),
        "hard_links": _tried(lambda: os.link(one, scratch / "linked")),
        "fsync_per_second": _fsync_rate(scratch / "synced"),
    }


def _tried(attempt: Callable[[], bool | None]) -> bool:
    """Whether it can be done: not where it says no, and not where it fails."""
    try:
        return attempt() is not False
    except (OSError, LoramergeError, NotImplementedError):
        return False


def _write_direct(path: Path) -> bool:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flag)
    try:
        buffer = AlignedBuffer(PAGE)
        return os.pwrite(fd, buffer.window(0, PAGE), 0) == PAGE
    finally:
        os.close(fd)


def _allocate(path: Path) -> bool:
    call = linux_call("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    if call is None:
        return False
    with open(path, "xb") as file:
        call(file.fileno(), 0, 0, 1 << 20)
    return True


def _exchange(one: Path, two: Path) -> bool:
    call = linux_call("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call is None:
        return False
    before = one.read_bytes()
    call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _EXCHANGE)
    return two.read_bytes() == before


def _fsync_rate(path: Path) -> float | None:
    """How often a second 4 KiB can be made durable."""
    try:
        with open(path, "xb", buffering=0) as file:
            count, start = 0, time.monotonic()
            while (passed := time.monotonic() - start) < _FSYNC_SECONDS or not count:
                os.pwrite(file.fileno(), b"\0" * mmap.PAGESIZE, 0)
                os.fsync(file.fileno())
                count += 1
            return round(count / passed, 1) if passed else None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return None


# ----------------------------------------------------------------------------------------------- the rest


def _hub() -> dict[str, Any]:
    """Where the Hub is, and whether there is a token. The token itself is never shown, nor is the Hub asked."""
    data: dict[str, Any] = {"endpoint": None, "offline": None, "logged_in": None, "why": None}
    try:
        hub = importlib.import_module("huggingface_hub")
        constants = importlib.import_module("huggingface_hub.constants")
        place = urlsplit(str(constants.ENDPOINT))
        data["endpoint"] = place._replace(netloc=place.netloc.rpartition("@")[2]).geturl()  # less a password
        data["offline"] = bool(constants.HF_HUB_OFFLINE)
        data["logged_in"] = bool(hub.get_token())
    except Exception as error:  # its settings come from the environment and may be anything
        data["why"] = f"huggingface_hub cannot be used: {type(error).__name__}"
    return data


def _self_test(test: Callable[[Path], Mapping[str, Any]] | None) -> dict[str, Any]:
    """A merge in a temporary directory."""
    if test is None:
        return {"ok": True, "why": "not asked for"}
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="loramerge-doctor-", ignore_cleanup_errors=True) as scratch:
            good = bool(test(Path(scratch))["ok"])
    except LoramergeError as error:
        return {"ok": False, "why": error.message}
    except Exception as error:  # that is what the test is for
        return {"ok": False, "why": f"{type(error).__name__}: {error}"}
    return {
        "ok": good,
        "why": None if good else "the output is not right",
        "seconds": round(time.monotonic() - start, 2),
    }
