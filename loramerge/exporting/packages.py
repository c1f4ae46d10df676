"""The optional packages that an export needs: are they there, and in versions that were tried?"""

from __future__ import annotations

import importlib.util

from loramerge.errors import UnsupportedError

TRIED = ((5, 23), (5, 24))
"""The versions of the modelling library whose exporter has the form that is used here: from, and below."""


def check_exporter() -> None:
    """Raises UnsupportedError ``export.extra`` unless an exporter of a known form is installed."""
    fix = "pip install 'loramerge[onnx]'"
    missing = [name for name in ("onnxscript", "onnx_ir") if importlib.util.find_spec(name) is None]
    try:
        import transformers
    except ImportError as error:
        missing.append(str(error.name))
    if missing:
        raise UnsupportedError("export.extra", f"exporting to ONNX needs {', '.join(missing)}", fix=fix)
    name, version = transformers.__name__, transformers.__version__
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TRIED[0] <= numbers < TRIED[1]:
        low, high = (".".join(map(str, v)) for v in TRIED)
        message = f"{name} {version} is installed, its exporter is known from {low} to below {high}"
        raise UnsupportedError("export.extra", message, fix=fix)


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def check_runtime(what: str) -> None:
    """Raises UnsupportedError ``export.extra`` unless onnxruntime is installed."""
    if not has_runtime():
        fix = "pip install 'loramerge[onnxruntime]', or --no-verify to go without"
        raise UnsupportedError("export.extra", f"{what} needs onnxruntime", fix=fix)
