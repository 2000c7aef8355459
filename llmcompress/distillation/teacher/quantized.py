"""A teacher that takes less memory while it teaches: the linears of its blocks in 8 or 4 bits, by bitsandbytes.

8 bits are LLM.int8() (arXiv 2208.07339): products are in integers, with weights rounded by rows and inputs by tokens,
except input columns with values above 6. So predictions depend a little on which sequences are read together. 4 bits
are NF4 in blocks of 64, with scales rounded again (arXiv 2305.14314), and decoded for every product. Token table, norms
and output head stay as they are.

The student learns from this model, so the cost of quantizing it is measured once. Every look at the held-out sequences
measures the distance to the dense model, which reads them beforehand, in the host's memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from llmcompress.distillation.context import DistillationJob
from llmcompress.distillation.held_out import Distances, distances
from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.config import MODEL, packing_entry, read_entries
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bits = Literal[8, 4]


def check_teacher(teacher: Place, bits: Bits | None) -> None:
    """Raise InputError for a compressed teacher if `bits` are given."""
    if bits is not None and packing_entry(read_entries(teacher.folder / MODEL, teacher.folder)):
        raise InputError(f"the teacher is compressed already, so it cannot be quantized to {bits} bits; leave bits out")


def measure_quantization(
    job: DistillationJob, dense: PreTrainedModel, quantized: PreTrainedModel, bits: Bits
) -> dict[str, float]:
    """Return {bits, kl, perplexity} of `quantized` on the held-out sequences, with KL(dense || quantized) in nats per
    token. Raises NumericsError if its predictions are not finite."""
    device = job.accelerator.device
    with job.autocast():
        total = sum((distances(dense, quantized, part, device) for part in job.data.held_out), start=Distances())
    if not math.isfinite(total.kl):
        other = 4 if bits == 8 else 8
        raise NumericsError(
            f"with {bits} bits the teacher's predictions are NaN or infinite; set bits to {other}, or leave them out"
        )
    means = total.means()
    return {"bits": bits, "kl": means["kl"], "perplexity": means["perplexity"]}


def load_quantized(place: Place, bits: Bits, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the dense model at `place`, frozen, the linears of its blocks in `bits` bits, everything else in `dtype`.

    Raises InputError as `load_model` does.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    integers = BitsAndBytesConfig(load_in_8bit=True)
    floats = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = load_model(place, str(device), dtype, integers if bits == 8 else floats)
    frozen: nn.Module = model
    for module in frozen.requires_grad_(False).modules():
        if isinstance(module, Linear4bit):  # a CPU would pack it again, which rounds scales to bfloat16 and
            module.support_avx512bf16_for_cpu = False  # fails unless rows are a multiple of 32 and columns of 64
    return model


@contextmanager
def silence_bitsandbytes() -> Iterator[None]:
    """Silence within the context the warning of bitsandbytes, at every product in 8 bits, that inputs are rounded."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
