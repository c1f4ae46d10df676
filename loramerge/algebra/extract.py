"""The best low-rank factors of a large matrix, with the error they have and proof of how near the optimum that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loramerge.algebra.krylov import CHUNK, HOLD, Delta, Krylov, Operator, Probes, Ritz, thin_gram
from loramerge.algebra.threads import one_thread

__all__ = ["Delta", "Extraction", "extract"]

OVERSAMPLING = 8
FIRST_BLOCK = 16
"""Ranks hoped for where a rule, not a number, decides."""

FIRST_DEPTH = 2
"""Depth at which the certificate is tried first; it is the certificate that ends the iteration, not the depth."""

MOST_DEPTH = 40
LARGEST_SPACE = 0.6
"""Of the short side: beyond this the Gram matrix costs less."""

MOST_STEPS = 12
"""Lanczos steps of the probes before more depth is tried instead."""

DIRECT = 1e-2
"""Relative errors below this are computed as |D - BA|; above, the difference of squares is as good."""

EXACT = 1e-6
"""Relative error at which nothing is left but the rounding of fp32 products."""

_EPS = 2.0**-23


@dataclass(frozen=True)
class Extraction:
    """Factors `B A` near D (m, n), and how near.

    B is U √S and A is √S Vᵀ, so both have entries of about one size; the entry of largest size in each column of U is
    positive. Errors are relative to |D| (Frobenius); all are 0 where D is.
    """

    B: Tensor
    """(m, rank), in the dtype asked for."""
    A: Tensor
    """(rank, n)."""
    singular_values: Tensor
    """(rank,) fp64, falling."""
    norm: float
    """|D|."""
    truncation: float
    """|D - BA| / |D| before the factors are rounded to their dtype."""
    rounding: float
    """|BA - stored BA| / |D|."""
    certificate: float
    """At least `truncation` over that of the best factors of the same rank (Eckart-Young); 1 is the optimum.

    It holds for every matrix, but for a chance of 1e-6. Where the truncation is below 1e-6, all that fp32 can tell, it
    is 1 and means no more than that.
    """
    method: str
    """`krylov`, `gram`, or `zero` where nothing is kept."""
    depth: int = 0
    """Blocks of the Krylov space beyond the first."""
    _factors: tuple[Tensor, Tensor] = field(repr=False, default=(torch.empty(0), torch.empty(0)))
    """U and V as columns, fp32."""
    _excess: tuple[float, ...] = field(repr=False, default=(0.0,))
    """For every k up to the rank, how far the true k leading S² may sum to more than these do, over |D|²."""

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def error(self) -> float:
        """|D - stored BA| / |D|; rounding and truncation are orthogonal up to second order."""
        return math.hypot(self.truncation, self.rounding)

    @property
    def energy(self) -> float:
        """Share of |D|² that is kept before rounding."""
        return 1.0 if self.norm == 0 else max(0.0, 1 - self.truncation**2)

    def cut(self, rank: int) -> Extraction:
        """The first `rank` triplets alone: as good as if that rank had been asked for."""
        if rank < 0:
            raise ValueError(f"a rank cannot be {rank}")
        if rank >= self.rank:
            return self
        u, v = (x[:, :rank] for x in self._factors)
        s = self.singular_values
        lost = float((s[rank:].flip(0) ** 2).sum())
        truncation = math.sqrt(self.truncation**2 + lost / self.norm**2)
        b, a, rounding = _store(u, s[:rank], v, self.B.dtype, self.norm)
        return replace(
            self,
            B=b,
            A=a,
            singular_values=s[:rank],
            truncation=min(1.0, truncation) if rank else 1.0,
            rounding=rounding,
            certificate=_certificate(truncation, self._excess[rank]),
            method=self.method if rank else "zero",
            _factors=(u, v),
            _excess=self._excess[: rank + 1],
        )

    def final(self) -> Extraction:
        """The same without what only a later `cut` needs, which is as large as the factors."""
        return replace(self, _factors=(torch.empty(0), torch.empty(0)), _excess=())


@dataclass(frozen=True)
class _Rule:
    """How many triplets to keep, from squared singular values in units of |D|²."""

    rank: int
    energy: float | None
    floor2: float

    def choose(self, shares: Tensor) -> int | None:
        """The number, or None where it lies beyond the values known (falling).

        An energy within 1e-6 of everything is out of reach of sums: all that is not below the floor is kept then.
        """
        known = len(shares)
        candidates = [self.rank] if self.rank <= known else []
        small = int((shares > self.floor2).sum())
        if small < known:
            candidates.append(small)
        if self.energy is not None and self.energy < 1 - 1e-6:
            reached = int((shares.cumsum(0) < self.energy).sum()) + 1
            if reached <= known:
                candidates.append(reached)
        return min(candidates, default=None)


def extract(
    delta: Delta | Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    floor: float = 0.0,
    tolerance: float = 1.001,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    module: str = "",
    device: str = "cpu",
    hold: int = HOLD,
) -> Extraction:
    """Low-rank factors of a matrix D (m, n), their error proven to be at most `tolerance` times the smallest possible.

    Block Krylov with rank + 8 columns grows until its certificate (see `krylov.Ritz`) is good enough. Where D is small
    (min(m, n) <= 4 (rank + 8)) or that does not happen, the eigenvectors of the Gram matrix of the short side in fp64
    are used instead. The same arguments give the same bytes on one machine, whatever the row blocks of the delta and
    the number of threads: one call computes on one thread, and a caller with more of them runs modules side by side.

    Args:
        delta: a dense matrix (any float dtype), or one in row blocks.
        rank: the most triplets to keep; None is no limit.
        energy: keep no more triplets than needed for this share of |D|², in (0, 1].
        floor: keep singular values above this alone, such as `noise.floor` gives it.
        tolerance: above 1; how far above the optimum the error may be.
        dtype: of the factors; the loss is in `rounding`.
        seed: with `module`, makes the random start.
        device: where to compute; the factors come back to the CPU.
        hold: elements up to which a delta in blocks is kept whole in fp32. Beside it there are thin matrices,
            (m + n) * about 5 (rank + 8), or the fp64 Gram matrix and its eigenvectors.

    Raises:
        ValueError: NaN or infinity in D, or arguments that make no sense.
    """
    _check(rank, energy, floor, tolerance)
    with torch.no_grad(), one_thread():
        operator = Operator(delta, device, hold)
        if operator.norm2 == 0 or rank == 0:
            return _nothing(operator, dtype)
        short = operator.shape[0]
        noise2 = (floor**2 / operator.norm2) if floor else 0.0
        rule = _Rule(short if rank is None else min(rank, short), energy, max(noise2, (2 * _EPS) ** 2))
        found = _by_krylov(operator, rule, tolerance, seed, module) or _by_gram(operator, rule)
        return _finish(operator, found, dtype)


def _check(rank: int | None, energy: float | None, floor: float, tolerance: float) -> None:
    if rank is None and energy is None and not floor:
        raise ValueError("a rank, an energy or a floor is needed")
    if rank is not None and rank < 0:
        raise ValueError(f"a rank cannot be {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy to keep must be above 0 and at most 1, not {energy}")
    if not (floor >= 0 and math.isfinite(floor)):
        raise ValueError(f"a floor of {floor} makes no sense")
    if not tolerance > 1:
        raise ValueError(f"the tolerance must be above 1, not {tolerance}")


@dataclass(frozen=True)
class _Found:
    left: Tensor
    """Orthonormal (short, k) fp32."""
    right: Tensor
    """Dᵀ left (long, k) fp32, scaled."""
    excess: Tensor
    """(k + 1), scaled."""
    method: str
    depth: int


def _by_krylov(operator: Operator, rule: _Rule, tolerance: float, seed: int, module: str) -> _Found | None:
    """Grow the space until the certificate holds; None where the Gram matrix is the better way."""
    short = operator.shape[0]
    whole = operator.scaled_norm2
    by_number = rule.energy is None and rule.rank < short
    guess = rule.rank if by_number else min(rule.rank, FIRST_BLOCK)
    width = max(guess, FIRST_BLOCK) + OVERSAMPLING
    if short <= 4 * width:
        return None
    space = Krylov(operator, width, seed, module)
    judge = _Judge(tolerance)
    check = FIRST_DEPTH
    exhausted = False
    while True:
        if space.depth >= check or exhausted:
            ritz = space.ritz()
            k = rule.choose(ritz.theta / whole)
            if k is None and exhausted:
                k = space.size
            if k is not None and (exhausted or k + OVERSAMPLING <= max(width, space.size // 2)):
                excess = judge.certify(ritz, k)
                if excess is not None:
                    left, right = ritz.triplets(k)
                    return _Found(left, right, excess, "krylov", space.depth)
                # A large space costs more to judge than to enlarge.
                check = space.depth + max(1, space.depth // 4) + judge.far
            else:
                if 4 * 2 * width >= short:
                    return None
                space.widen(width)
                width *= 2
                check = space.depth + FIRST_DEPTH
        if exhausted or space.size + space.width > LARGEST_SPACE * short or space.depth >= MOST_DEPTH:
            return None
        exhausted = not space.deepen()


class _Judge:
    """Tries certificates, and learns from those that fail when it is worth trying again."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._ratio = 0.7
        """|E|₂² over `Ritz.outside`: a guess first, then what the probes last met."""
        self.far = False
        """The last trial was not near."""

    def certify(self, ritz: Ritz, k: int) -> Tensor | None:
        """Bounds on what the leading 0..k may hold beyond the Ritz values, if they prove the tolerance; else None."""
        operator = ritz.space.operator
        whole = operator.scaled_norm2
        left_over = whole - float(ritz.theta[:k].sum())
        if left_over < DIRECT**2 * whole:
            left, right = ritz.triplets(k)
            b, a = (right, left.T) if operator.flipped else (left, right.T)
            left_over = operator.residual2(b / operator.scale, a) * operator.scale**2
            if left_over <= EXACT**2 * whole:
                return ritz.theta.new_full((k + 1,), EXACT**2 * whole)
        enough = left_over * (1 - self._tolerance**-2) * 0.9
        proof = ritz.proof(k, enough, self._ratio * ritz.outside)
        self.far = proof is None and float(ritz.theta[k - 1]) < 1.2 * self._ratio * ritz.outside
        if proof is None:
            return None
        most, excess = proof
        if ritz.missed2 <= most:
            return excess
        probes = Probes(ritz.space)
        for _ in range(MOST_STEPS):
            if probes.step() <= most:
                return excess
            if probes.reached >= most:
                break
        # More depth lowers the norm a little, and the bound ends a little above it.
        self._ratio = max(0.3, probes.reached / ritz.outside)
        return None


def _by_gram(operator: Operator, rule: _Rule) -> _Found:
    """Eigenvectors of D Dᵀ of the short side in fp64: exact down to 1e-8 of the largest singular value."""
    vectors = operator.gram().mT  # columns in a row, as LAPACK wants them: else it works on a copy
    operator.release()
    values = vectors.new_empty(len(vectors))
    # The eigenvectors take the place of the matrix: beside it there is nothing but the workspace, two more of them.
    torch.linalg.eigh(vectors, out=(values, vectors))
    values = values.flip(0).clamp(min=0)
    k = rule.choose(values / operator.scaled_norm2)
    if k is None:
        k = min(rule.rank, len(values))
    left = vectors[:, len(values) - k :].flip(1).float().contiguous()
    del vectors
    slack = 16 * 2.0**-52 * operator.scaled_norm2
    excess = torch.full((k + 1,), slack, dtype=torch.float64, device=values.device)
    return _Found(left, operator.transposed(left), excess, "gram", 0)


def _finish(operator: Operator, found: _Found, dtype: torch.dtype) -> Extraction:
    """Singular values from the right factor, signs, the error, the rounding of the stored factors."""
    left, right = found.left, found.right
    if left.shape[1] == 0:
        return _nothing(operator, dtype)
    scaled = torch.linalg.vector_norm(right, dim=0, dtype=torch.float64)
    scaled, order = scaled.sort(descending=True, stable=True)
    left, right = left[:, order], right[:, order] / scaled.float()
    s = (scaled / operator.scale).cpu()
    norm = math.sqrt(operator.norm2)
    # The true error of these very factors: lengths and angles of the columns are as fp32 left them.
    weighted = scaled[:, None] * scaled
    product2 = float((weighted * thin_gram(left, left) * thin_gram(right, right)).sum())
    inner = float((scaled**2 * torch.linalg.vector_norm(right, dim=0, dtype=torch.float64) ** 2).sum())
    truncation = math.sqrt(max(0.0, 1 - (2 * inner - product2) / operator.scaled_norm2))
    u, v = (right, left) if operator.flipped else (left, right)
    peak = u.abs().argmax(0)
    sign = torch.where(u.gather(0, peak[None])[0] < 0, -1.0, 1.0)
    u, v = u * sign, v * sign
    if truncation < DIRECT:
        root = (scaled / operator.scale).sqrt().float()
        truncation = math.sqrt(operator.residual2(u * root, (v * root).T)) / norm
    u, v = u.cpu(), v.cpu()
    b, a, rounding = _store(u, s, v, dtype, norm)
    excess = tuple((found.excess / operator.scaled_norm2).tolist())
    return Extraction(
        B=b,
        A=a,
        singular_values=s,
        norm=norm,
        truncation=min(1.0, truncation),
        rounding=rounding,
        certificate=_certificate(truncation, excess[-1]),
        method=found.method,
        depth=found.depth,
        _factors=(u, v),
        _excess=excess,
    )


def _certificate(truncation: float, excess: float) -> float:
    """Truncation over a lower bound on the optimum, whose square is at least truncation² - excess."""
    if truncation <= EXACT:
        return 1.0
    left = truncation**2 - excess
    return max(1.0, truncation / math.sqrt(left)) if left > 0 else math.inf


def _store(u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype, norm: float) -> tuple[Tensor, Tensor, float]:
    """U √S and √S Vᵀ in the dtype, and |UΣVᵀ - that| / norm, from Gram matrices of the rounding errors alone."""
    root = s.sqrt()
    # BA - B'A' = dB A + B' dA = [dB B'] [A; dA], without a difference of large numbers.
    b, of_b = _rounded(u, root, dtype, exact=False)
    a, of_a = _rounded(v, root, dtype, exact=True)
    square = float((of_b * of_a).sum())
    return b, a.T.contiguous(), math.sqrt(max(0.0, square)) / norm if norm else 0.0


def _rounded(x: Tensor, root: Tensor, dtype: torch.dtype, *, exact: bool) -> tuple[Tensor, Tensor]:
    """X √S in the dtype, (rows, k), and the Gram matrix of [X √S, the loss], or of [the loss, what is kept]."""
    kept = x.new_empty(x.shape, dtype=dtype)
    gram = torch.zeros(2 * len(root), 2 * len(root), dtype=torch.float64)
    height = max(1, CHUNK // max(1, 2 * len(root)))
    for first in range(0, len(x), height):
        wide = x[first : first + height].double() * root
        part = wide.to(dtype)
        if not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"the factors do not fit into {dtype}: their largest entry is {float(wide.abs().max()):.3g}"
            )
        kept[first : first + height] = part
        lost = wide - part.double()
        both = torch.cat([wide, lost] if exact else [lost, part.double()], 1)
        gram.addmm_(both.T, both)
    return kept, gram


def _nothing(operator: Operator, dtype: torch.dtype) -> Extraction:
    """Rank 0."""
    m, n = operator.rows, operator.columns
    empty = torch.empty(0, dtype=torch.float64)
    nothing = 0.0 if operator.norm2 == 0 else 1.0
    return Extraction(
        B=torch.empty(m, 0, dtype=dtype),
        A=torch.empty(0, n, dtype=dtype),
        singular_values=empty,
        norm=math.sqrt(operator.norm2),
        truncation=nothing,
        rounding=0.0,
        certificate=1.0,
        method="zero",
        _factors=(torch.empty(m, 0), torch.empty(n, 0)),
    )
