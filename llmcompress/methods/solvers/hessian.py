"""The second moment of a layer's inputs, H = X^T X / tokens `[in, in]`, made safe to invert.

Damping adds a share of the mean diagonal: 0.1 beats the usual 0.01 on held-out tokens when calibration is small.
Factors are memoised on the moments, for all layers that share an input. Moments of no tokens have no H; methods that
can do without (`Method.data_free`) take the identity.
"""

import torch
from torch import Tensor

from llmcompress.errors import NumericsError
from llmcompress.methods.moments import Moments
from llmcompress.runtime.phases import phase

LADDER = (1.0, 10.0, 100.0)  # times the damping asked for
FLOAT32 = 1e-3  # damping from which on float32, twice as fast, factors H: its rounding is far below what is added
TRIANGLE = 256  # rows of a triangle that is inverted in one piece
DEAD = 1e-10  # an input channel with less than this share of the mean energy was never seen


def channel_energy(moments: Moments) -> Tensor:
    """Return the diagonal of H `[in]`, float64; a dead channel gets the mean energy, which leaves its weights alone."""
    energy = outer_of(moments).diagonal().double() / max(moments.tokens, 1e-30)
    mean = energy.mean() if energy.mean() > 0 else energy.new_ones(())
    return energy + torch.where(energy <= DEAD * mean, mean, 0.0)


def second_moment(moments: Moments, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a new H `[in, in]`; dead channels as in `channel_energy`."""
    energy = channel_energy(moments)
    hessian = outer_of(moments).to(dtype, copy=True).div_(max(moments.tokens, 1e-30))
    hessian.diagonal().copy_(energy)
    return hessian


def outer_of(moments: Moments) -> Tensor:
    """Return X^T X `[in, in]`. Raises ValueError where it was not collected."""
    if moments.outer is None:
        raise ValueError("this method needs the moment 'outer'; declare it in @method(needs=...)")
    return moments.outer


def add_damping(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` times its mean diagonal to `hessian`, in place, and return it."""
    hessian.diagonal().add_((damping * hessian.diagonal().double().mean()).to(hessian.dtype))
    return hessian


def inverse_factor(moments: Moments, damping: float, order: Tensor | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Return the upper U with `inverse(H) = U^T U`, float32 `[in, in]`, and a note if more damping was needed.

    `order [in]` permutes the channels first. Raises NumericsError if even 100 times the damping fails.
    """

    @phase("factor")
    def compute() -> tuple[Tensor, tuple[str, ...]]:
        for step in LADDER:
            precision = torch.float32 if damping * step >= FLOAT32 else torch.float64
            hessian = add_damping(second_moment(moments, precision), damping * step)
            # with J the reversal, J H J = L L^T gives U = J inverse(L) J: one factorisation, one triangular inverse
            hessian = hessian.flip(0, 1) if order is None else hessian[order.flip(0)][:, order.flip(0)]
            lower, failed = torch.linalg.cholesky_ex(hessian)
            del hessian  # the largest matrices of a run live here
            if not failed:
                upper = invert_lower(lower.float()).flip(0, 1)
                return upper, () if step == 1 else (f"damping raised to {damping * step:g}",)
        raise NumericsError(f"its input statistics cannot be factored even with damping {damping * LADDER[-1]:g}")

    key = ("inverse_factor", damping, None if order is None else order.numpy(force=True).tobytes())
    return moments.memo(key, compute)


def invert_lower(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangle `[in, in]`, by halves, so that most of it is products."""
    inverse = torch.zeros_like(lower)
    _fill(inverse, lower, 0, len(lower))
    return inverse


def _fill(inverse: Tensor, lower: Tensor, start: int, stop: int) -> None:
    """Write the inverse of a square on the diagonal into its place."""
    # no closure: one that calls itself keeps both matrices alive until the next garbage collection
    if stop - start <= TRIANGLE:
        eye = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        inverse[start:stop, start:stop] = torch.linalg.solve_triangular(lower[start:stop, start:stop], eye, upper=False)
        return
    middle = (start + stop) // 2
    _fill(inverse, lower, start, middle)
    _fill(inverse, lower, middle, stop)
    place = inverse[middle:stop, start:middle]
    place.copy_(lower[middle:stop, start:middle])
    _times_lower(place, inverse[start:middle, start:middle])
    _lower_times(inverse[middle:stop, middle:stop], place)
    place.neg_()


def _times_lower(left: Tensor, lower: Tensor) -> None:
    """Multiply `left` by a lower triangle `[in, in]` from the right, in place, without most of its zeros."""
    middle = len(lower) // 2
    if len(lower) <= TRIANGLE:
        left.copy_(left @ lower)
        return
    first, second = left[:, :middle], left[:, middle:]
    _times_lower(first, lower[:middle, :middle])
    first.addmm_(second, lower[middle:, :middle])
    _times_lower(second, lower[middle:, middle:])


def _lower_times(lower: Tensor, right: Tensor) -> None:
    """Multiply `right` by a lower triangle `[in, in]` from the left, in place, without most of its zeros."""
    middle = len(lower) // 2
    if len(lower) <= TRIANGLE:
        right.copy_(lower @ right)
        return
    first, second = right[:middle], right[middle:]
    _lower_times(lower[middle:, middle:], second)
    second.addmm_(lower[middle:, :middle], first)
    _lower_times(lower[:middle, :middle], first)


def metric(moments: Moments, target: Tensor, damping: float) -> Tensor:
    """Return the metric of errors in `target [out, in]`, float32 `[in, in]`: the damped H, or I without tokens."""
    if moments.outer is None:
        return torch.eye(target.shape[1], device=target.device)
    return add_damping(second_moment(moments, torch.float32), damping)


def feedback_factor(moments: Moments, damping: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return `inverse_factor`, or None without tokens, when errors are not fed back."""
    return (None, ()) if moments.outer is None else inverse_factor(moments, damping)
