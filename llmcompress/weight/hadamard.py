"""The random input basis of incoherence processing: seeded signs, then a Hadamard transform; orthogonal and fast."""

import torch
from torch import Tensor

ROWS = 8192  # of a matrix at a time: a transform needs three times what it turns


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """Return `x [..., in] @ R`: random signs, then an orthonormal Hadamard transform over `block` columns at a time.

    A transform takes columns `in / block` apart, so each mixes across the whole width (and across attention heads).
    `unrotate` inverts it, up to rounding. Products with small Hadamard matrices are several times as fast as adding and
    subtracting, above all in bfloat16, where they also round less often.
    """
    columns = (x * _plus_minus(signs, x)).reshape(-1, block, x.shape[-1] // block).transpose(1, 2)
    matrix = SYLVESTER.to(x)
    done = min(block, len(matrix))
    turned = columns.reshape(-1, done) @ matrix[:done, :done]
    while done < block:
        size = min(block // done, len(matrix))
        turned = matrix[:size, :size] @ turned.reshape(-1, size, done)
        done *= size
    return turned.reshape(columns.shape).transpose(1, 2).reshape(x.shape) * block**-0.5


def unrotate(x: Tensor, signs: Tensor, block: int, *, reuse: bool = False) -> Tensor:
    """Return `x [..., in] @ R.T`, by adding and subtracting, which gives the same numbers on every machine.

    `reuse`: True if the memory of a long `x` may hold the result.
    """
    is_long = not torch.compiler.is_compiling() and x.ndim == 2 and len(x) > ROWS  # a traced length has no value
    if is_long and not x.requires_grad:
        turned = x if reuse else torch.empty_like(x)
        for part, place in zip(x.split(ROWS), turned.split(ROWS), strict=True):
            place.copy_(unrotate(part, signs, block))
        return turned
    return _hadamard(x, block) * _plus_minus(signs, x)


def _plus_minus(signs: Tensor, like: Tensor) -> Tensor:
    return signs.to(like.dtype) * 2 - 1


def _hadamard(x: Tensor, block: int) -> Tensor:
    strided = x.reshape(*x.shape[:-1], block, x.shape[-1] // block)
    half = 1
    while half < block:
        pairs = strided.reshape(*x.shape[:-1], block // (2 * half), 2, half, strided.shape[-1])
        low, high = pairs.unbind(-3)
        strided = torch.stack([low + high, low - high], -3)
        half *= 2
    return strided.reshape(x.shape) * block**-0.5


# Of ones and minus ones; its corners are those of 32, 16, 8, 4, 2, 1
SYLVESTER = _hadamard(torch.eye(64, dtype=torch.float32, device="cpu"), 64) * 8
