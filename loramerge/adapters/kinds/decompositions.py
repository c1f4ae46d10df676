"""Updates defined through a decomposition of the weight itself, of which a part is exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Refused, Shapes, Unfit, WholeMap
from loramerge.adapters.kinds.sparse import check_range

if TYPE_CHECKING:
    from torch import Tensor


class SubspaceInjection:
    """`W' = W + λ Q (s R - Tᵀ W)`: P (out, r), R (r, in) (DEFT of peft 0.21.2, tuners/deft/layer.py).

    Setting `projection`: `"relu"`: Q = P, T = max(P, 0); `"qr"`: Q = T = the orthogonal factor of P with LAPACK's
    signs, which R was trained with. Setting `remove-only`: without R. s = alpha / r where the setting `alpha` is
    given, else 1.
    """

    name: ClassVar[str] = "subspace-injection"
    required: ClassVar[tuple[str, ...]] = ("P",)
    optional: ClassVar[tuple[str, ...]] = ("R",)
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def sides(shapes: Shapes) -> tuple[int | None, int | None]:
        return shapes["P"][0], prod(shapes["R"][1:]) if "R" in shapes else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        P, R, how = shapes["P"], shapes.get("R"), settings.get("projection")
        if len(shape) != 2 or len(P) != 2 or P[0] != shape[0] or (R is not None and (P[1], shape[1]) != R):
            raise Unfit(f"P {P}" + (f" and R {R}" if R else "") + f" do not fit the weight {shape}")
        if (R is None) != bool(settings.get("remove-only")):
            raise Unfit("it has " + ("no R" if R is None else "an R") + ", and the config says otherwise")
        if how not in ("relu", "qr"):
            raise Refused(f"its projection {how} is not known")
        alpha = settings.get("alpha")
        return {"projection": how, "scale": float(alpha) / P[1] if alpha else 1.0}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        P = factors["P"]
        if context.weight == 0:
            return None
        if context.options["projection"] == "qr":
            Q = torch.linalg.qr(P.cpu()).Q.to(P.device)
            T = Q
        else:
            Q, T = P, P.relu()
        R = factors["R"] * context.options["scale"] if "R" in factors else None

        def apply(W: Tensor) -> Tensor:
            removed = T.T @ W
            return W.addmm_(Q, -removed if R is None else R - removed, alpha=context.weight)

        return WholeMap(apply)


class SingularTail:
    """`W' = W + λ (U diag(S) V - U₀ diag(S₀) V₀)`: the n smallest singular components of W, exchanged for trained ones.

    U (out, n), S (n,), V (n, in); U₀, S₀, V₀ are those of W, rounded to the dtype of the base as they were in training.
    peft 0.21.2, tuners/osf/layer.py and utils.py (Nayak et al. 2025).
    """

    name: ClassVar[str] = "singular-tail"
    required: ClassVar[tuple[str, ...]] = ("U", "S", "V")
    optional: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ("U", "S", "V")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return shapes["U"][0], prod(shapes["V"][1:])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        U, S, V = (shapes[name] for name in SingularTail.required)
        if len(shape) != 2 or len(S) != 1 or (shape[0], *S) != U or (*S, shape[1]) != V or S[0] > min(shape):
            raise Unfit(f"U {U}, S {S} and V {V} do not fit the weight {shape}")
        return {"stored": settings.get("stored", "F32")}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        U, S, V = (factors[name] for name in SingularTail.required)
        if context.weight == 0 or not len(S):
            return None

        def apply(W: Tensor) -> Tensor:
            import torch

            kept = min(W.shape) - len(S)
            U0, S0, V0 = torch.linalg.svd(W, full_matrices=False)
            parts = (t.contiguous() for t in (U0[:, kept:], S0[kept:], V0[kept:]))
            U0, S0, V0 = (_rounded(t, context.options["stored"]) for t in parts)
            return W.addmm_(U * S, V, alpha=context.weight).addmm_(U0 * S0, V0, alpha=-context.weight)

        return WholeMap(apply)


class TruncatedPair:
    """`W' = W - λ D + λ s B diag(d) A`, D being the r smallest singular components of W (Wang et al. 2024, KaSA).

    A (r, in), B (out, r), `diag` (r,). Training drops D first and rounds to the dtype of the base. Dropping it from a
    base that lacks it already changes nothing beyond rounding. Setting `residual-base`: the base does lack it, D = 0.
    peft 0.21.2, tuners/lora/variants.py, KasaLinearVariant.
    """

    name: ClassVar[str] = "truncated-pair"
    required: ClassVar[tuple[str, ...]] = ("A", "B", "diag")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["A"][0]

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return shapes["B"][0], prod(shapes["A"][1:])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B, diag = (shapes[name] for name in TruncatedPair.required)
        if len(shape) != 2 or len(A) != 2 or (shape[0], A[0]) != B or A[1] != shape[1] or diag != (A[0],):
            raise Unfit(f"A {A}, B {B} and diag {diag} do not fit the weight {shape}")
        if A[0] >= min(shape):
            raise Unfit(f"rank {A[0]} leaves nothing of the weight {shape}")
        return {"truncate": not settings.get("residual-base"), "stored": settings.get("stored", "F32")}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0:
            return None
        right, left = factors["A"], factors["B"] * (factors["diag"] * (context.scale * context.weight))

        def apply(W: Tensor) -> Tensor:
            import torch

            if context.options["truncate"]:
                U, S, V = torch.linalg.svd(W, full_matrices=False)
                kept = len(S) - len(right)
                rest = _rounded((U[:, :kept] * S[:kept]) @ V[:kept], context.options["stored"])
                W = rest if context.weight == 1 else W.lerp_(rest, context.weight)
            return W.addmm_(left, right)

        return WholeMap(apply)


class JointDecomposition:
    """`W' = U (S + diag(l)) Vᵀ`, the columns of U being those of `W V⁻ᵀ` at length 1 (FRoD; λ blends W and W').

    V (in, in) is shared by all modules of one role, S (in, in) is sparse with `values` (n,) at `indices` (2, n), l
    (in,) is trained from the lengths of those columns on. U is computed in float64 and rounded to float32, then to the
    dtype of the base, as in training. peft 0.21.2, tuners/frod/layer.py.
    """

    name: ClassVar[str] = "joint-decomposition"
    required: ClassVar[tuple[str, ...]] = ("l", "values", "V", "indices")
    optional: ClassVar[tuple[str, ...]] = ()
    integers: ClassVar[tuple[str, ...]] = ("indices",)
    may_be_empty: ClassVar[tuple[str, ...]] = ("values", "indices")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def sides(shapes: Shapes) -> tuple[int | None, int | None]:
        return None, prod(shapes["l"])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        lengths, values, V, indices = (shapes[name] for name in JointDecomposition.required)
        if len(shape) != 2 or (shape[1], shape[1]) != V or lengths != (shape[1],):
            raise Unfit(f"l {lengths} and V {V} do not fit the weight {shape}")
        if len(values) != 1 or indices != (2, *values):
            raise Unfit(f"values {values} and indices {indices} do not fit one another")
        return {"stored": settings.get("stored", "F32")}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0:
            return None
        lengths, values, V, indices = (factors[name] for name in JointDecomposition.required)

        def apply(W: Tensor) -> Tensor:
            import torch

            exact, v = W.double().cpu(), V.double().cpu()
            try:
                B = torch.linalg.solve(v, exact.T).T
            except RuntimeError:
                B = exact @ torch.linalg.pinv(v, rtol=1e-6).T
            norms = B.norm(dim=0)
            U = torch.where(norms > 1e-12, B / norms, 0.0)
            U = _rounded(U.float(), context.options["stored"]).to(W)
            S = torch.diag(lengths)
            S.index_put_(tuple(check_range(indices, len(S))), values, accumulate=True)
            changed = U @ (S @ V.T)
            return changed if context.weight == 1 else W.lerp_(changed, context.weight)

        return WholeMap(apply)


def _rounded(values: Tensor, stored: str) -> Tensor:
    """The values rounded to a dtype of 16 bits, in the dtype that they have."""
    import torch

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored)
    return values if dtype is None else values.to(dtype).to(values.dtype)
