"""Updates that are sparse in another basis: trained coefficients of a Fourier or a wavelet transform."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Dense, Form, Refused, Shapes, Unfit
from loramerge.adapters.kinds.sparse import SparseEntries
from loramerge.adapters.kinds.wavelets import FILTERS, high_pass

if TYPE_CHECKING:
    from torch import Tensor


class FourierSpectrum:
    """`W' = W + λ s Re(ifft2(D))`, D (out, in) zero but for the n coefficients `spectrum` (Gao et al. 2024, FourierFT).

    Coefficient k lies at place p[k] of the flattened D, p being the first n of `randperm(out * in)` of torch's CPU
    generator with the setting `seed`. Setting `scale` is s. peft 0.21.2, tuners/fourierft/layer.py.
    """

    name: ClassVar[str] = "fourier-spectrum"
    required: ClassVar[tuple[str, ...]] = ("spectrum",)
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        return _drawn_places(shapes, settings, shape)

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        spectrum, factor = factors["spectrum"], context.options["scale"] * context.weight
        if factor == 0 or not spectrum.any():
            return None
        D = spectrum.new_zeros(context.shape)
        D.view(-1)[_places(D.numel(), context.options["seed"], len(spectrum)).to(D.device)] = spectrum * factor
        return Dense(torch.fft.ifft2(D).real)


class WaveletSpectrum:
    """`W' = W + λ s Δ`, Δ from n coefficients `spectrum` at places drawn as `FourierSpectrum` draws them (WaveFT).

    Without the setting `transform`, Δ is the sparse matrix itself. With it, the matrix is put into the middle of one
    that is `length - 2` larger each way, where length is that of the filter of the setting `wavelet`, and one more
    where odd; its quarters are the bands of one inverse wavelet step: top left low in both directions, top right high
    along the rows' index and low along the columns', bottom left the other way, bottom right high in both. Δ is the
    middle of the result. peft 0.21.2, tuners/waveft/layer.py and waverec2d.py.
    """

    name: ClassVar[str] = "wavelet-spectrum"
    required: ClassVar[tuple[str, ...]] = ("spectrum",)
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        options = _drawn_places(shapes, settings, shape)
        if not settings.get("transform"):
            return options
        wavelet = settings.get("wavelet")
        if wavelet not in FILTERS:
            raise Refused(f"the coefficients of its wavelet {wavelet} are not known; known are {', '.join(FILTERS)}")
        return {**options, "wavelet": wavelet}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        spectrum, factor = factors["spectrum"], context.options["scale"] * context.weight
        if factor == 0 or not spectrum.any():
            return None
        rows, cols = context.shape
        places = _places(rows * cols, context.options["seed"], len(spectrum)).to(spectrum.device)
        if "wavelet" not in context.options:
            at = torch.stack([places // cols, places % cols])
            return SparseEntries.form({"values": spectrum * context.options["scale"], "indices": at}, context)
        low = spectrum.new_tensor(FILTERS[context.options["wavelet"]])
        high = spectrum.new_tensor(high_pass(FILTERS[context.options["wavelet"]]))
        margin = len(low) - 2
        height, width = (n + margin + (n + margin) % 2 for n in (rows, cols))
        padded = spectrum.new_zeros(height, width)
        top, left = (height - rows) // 2, (width - cols) // 2
        padded[places // cols + top, places % cols + left] = spectrum * factor
        h, w = height // 2, width // 2
        # Bands in the order of the two one-dimensional steps: rows low, then high; columns low, then high.
        bands = torch.cat(
            [torch.cat([padded[:h, :w], padded[h:, :w]], 1), torch.cat([padded[:h, w:], padded[h:, w:]], 1)]
        )
        delta = _synthesis(_synthesis(bands, low, high).T, low, high).T
        top, left = (delta.shape[0] - rows) // 2, (delta.shape[1] - cols) // 2
        return Dense(delta[top : top + rows, left : left + cols].contiguous())


def _drawn_places(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    spectrum, seed, scale = shapes["spectrum"], settings.get("seed"), settings.get("scale")
    if len(shape) != 2 or len(spectrum) != 1 or spectrum[0] > prod(shape):
        raise Unfit(f"spectrum {spectrum} does not fit the weight {shape}")
    if type(seed) is not int or scale is None:
        raise Unfit("the config does not say its seed and its scaling")
    return {"seed": seed, "scale": float(scale)}


@lru_cache(maxsize=4)
def _places(total: int, seed: int, count: int) -> Tensor:
    """The first `count` of a random order of `total` places, as they were drawn before training."""
    import torch

    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].clone()


def _synthesis(bands: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """One inverse step along the last axis, the low band before the high: (n, 2 m) -> (n, 2 m - length + 2)."""
    import torch

    length = len(low)
    filters = torch.stack([low, high])[:, None]
    whole = torch.nn.functional.conv_transpose1d(bands.reshape(len(bands), 2, -1), filters, stride=2)[:, 0]
    return whole[:, length - 2 : whole.shape[1] - (length - 2)]
