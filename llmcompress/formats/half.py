"""Floats as float16, for engines that compute in it."""

from torch import Tensor, float16

from llmcompress.errors import InputError


def as_half(value: Tensor, name: str) -> Tensor:
    """Return floats as float16, all else as it is. Raises InputError for a number that float16 cannot hold."""
    if not value.is_floating_point():
        return value
    half = value.to(float16)
    if not half.isfinite().all():
        raise InputError(f"{name} has numbers beyond float16, in which the engine would hold them; export to dense")
    return half
