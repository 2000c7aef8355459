"""The passport of a compressed model: the worth on it of LoRA adapters that were trained on the dense model.

An adapter gains some nats per token on its kind of text, and the compressed model keeps a share of that gain. Beside
the share stand the KL between both adapted models, the correlation of gains over tokens, and the diversity of what they
write, as the share of distinct pairs of tokens (distinct-n, arXiv 1510.03055): of the dense model, the compressed one,
and the compressed one after the dense one's first tokens, which hand its style over (after arXiv 2503.10637).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmcompress.data.generate import NOTHING, continue_sequences, end_tokens
from llmcompress.errors import InputError, RecipeError, check_several, first_line
from llmcompress.evaluation.distance import kl_divergence
from llmcompress.evaluation.logits import Counting
from llmcompress.evaluation.perplexity import describe_protocol, evaluation_windows, log_probability_chunks
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.uncertainty import mean, paired_difference
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import locate, public_name
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import fast_float32
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BRIEF = Protocol(windows=8, length=256)
PROMPT, OVER, LENGTH = 16, 8, 64  # tokens of a text that are given, that the dense model writes first, and in all
REFUSED = (KeyError, OSError, RuntimeError, TypeError, ValueError)  # by PEFT, of an adapter that does not fit


@dataclass(frozen=True)
class AdapterTransfer(JsonRecord):
    """The worth of an adapter. `gain_dense`, `gain`: nats per token on the dense model and on the compressed one;
    `kept`: the share of the gain, with its standard error, None if the dense model gains nothing beyond noise; `kl`:
    between both models with the adapter; `alike`: the correlation of gains over tokens, None without any; `distinct`:
    shares of distinct pairs of tokens in {dense, compressed, handed_over} texts."""

    adapter: str
    gain_dense: float
    gain: float
    kept: float | None
    kept_stderr: float | None
    kl: float
    alike: float | None
    distinct: dict[str, float]


@dataclass(frozen=True)
class Passport(JsonRecord):
    """The adapters of a passport, and the text that they were judged on."""

    model: str
    against: str
    protocol: dict[str, Any]
    adapters: tuple[AdapterTransfer, ...]


@dataclass(frozen=True, eq=False)
class _Read:
    """Log-probabilities of the next tokens by window, `[length - 1]` each, without the adapter and with it."""

    plain: list[Tensor]
    adapted: list[Tensor]

    def gains(self) -> list[Tensor]:
        """Return what each token gains, by window."""
        return [after - before for before, after in zip(self.plain, self.adapted, strict=True)]


@fast_float32()
@torch.no_grad()
def passport(
    model: str | Path,
    adapters: Sequence[str | Path],
    against: str | Path,
    protocol: Protocol = BRIEF,
    *,
    device: str = "cpu",
    progress: Counting | None = None,
    trust_remote_code: bool = False,
) -> Passport:
    """Measure the worth on a compressed `model` of adapters that were trained on `against`, its dense original.

    Args:
        model: a folder that compress wrote, or a Hub id.
        adapters: folders or Hub ids of PEFT adapters, one or more.
        against: the dense model that they were trained on.
        protocol: the text, which should be of the kind that the adapters are for; tasks are left aside.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (adapters that are done, adapters).
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        The share of its gain that each adapter keeps, and how alike both models are with it.

    Raises:
        RecipeError: without adapters, or where PEFT is not installed.
        InputError: for a model or an adapter that cannot be loaded, for models that have different vocabularies, and
            for a text that is too short.
        MemoryLimitError: for models that do not fit into this machine together.
    """
    if find_spec("peft") is None:
        raise RecipeError("adapters need the package peft; install llmcompress[distill]")
    check_several(adapters, "adapters")
    adapters = [os.path.expanduser(adapter) for adapter in adapters]
    if not adapters:
        raise RecipeError("a passport is about adapters; give one or more folders or Hub ids of them")
    for adapter in adapters:
        _check_adapter(str(adapter))
    places = [locate(one, trust_remote_code=trust_remote_code) for one in (against, model)]
    check_vocabularies(places)
    tokenizer = load_tokenizer(places[0].folder, trust_remote_code)
    evaluation_windows(tokenizer, protocol)  # a text is missed before models are loaded
    check_fits(device, "comparing", places, [])
    dense, small = (load_model(place, device) for place in places)
    ids = evaluation_windows(tokenizer, protocol, dense.config, small.config)
    transfers = []
    for number, adapter in enumerate(adapters, start=1):
        transfers.append(_measure_adapter(str(adapter), dense, small, tokenizer, ids))
        if progress is not None:
            progress(number, len(adapters))
    return Passport(
        places[1].public_name,
        places[0].public_name,
        describe_protocol(tokenizer, protocol),
        tuple(transfers),
    )


def _check_adapter(adapter: str) -> None:
    """Raise InputError for what PEFT does not know as an adapter, before models are loaded."""
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(adapter)
    except REFUSED as error:
        raise InputError(f"{adapter} is no adapter ({first_line(error)}); give the folder or Hub id of one") from error


def _measure_adapter(
    adapter: str, dense: PreTrainedModel, small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> AdapterTransfer:
    """Return the worth of one adapter; both models are unchanged afterwards."""
    with decoded(small), _with_adapter(dense, adapter) as first, _with_adapter(small, adapter) as second:
        reads, kls = _read(first, second, ids)
        texts = _write_texts(first, second, ids, end_tokens(dense, tokenizer))
    gains, small_gains = ([float(gain.mean()) for gain in read.gains()] for read in reads)
    share, error = kept_share(gains, small_gains)
    tokens = [torch.cat(read.gains()) for read in reads]
    return AdapterTransfer(
        public_name(adapter, None if Path(adapter).is_dir() else adapter),
        mean(gains),
        mean(small_gains),
        share,
        error,
        mean(kls),
        float(torch.corrcoef(torch.stack(tokens))[0, 1]) if all(len(each.unique()) > 1 for each in tokens) else None,
        {name: distinct_share(rows, 2) for name, rows in texts.items()},
    )


def kept_share(dense: Sequence[float], small: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the share of a gain that is kept, from the gains of windows, and its standard error, that of a ratio of
    means by linearization. None if the dense model gains nothing beyond noise."""
    if not paired_difference([0.0] * len(dense), dense).beyond_noise or mean(dense) <= 0:
        return None, None
    share = mean(small) / mean(dense)
    residuals = [gain - share * wanted for gain, wanted in zip(small, dense, strict=True)]
    count = len(residuals)
    return share, math.sqrt(math.fsum(value**2 for value in residuals) / (count * (count - 1))) / mean(dense)


@contextmanager
def _with_adapter(model: PreTrainedModel, adapter: str) -> Iterator[PeftModel]:
    """Yield a model with an adapter, which is taken off again. Raises InputError for one that does not fit."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    except REFUSED as error:
        raise InputError(f"the adapter {adapter} does not fit {model.name_or_path}: {first_line(error)}") from error
    try:
        yield adapted
    finally:
        adapted.unload()


def _read(dense: PeftModel, small: PeftModel, ids: Tensor) -> tuple[tuple[_Read, _Read], list[float]]:
    """Return what both models predict in windows `ids` [n, length], and the KL with the adapter in each."""
    reads, kls = (_Read([], []), _Read([], [])), []
    for window in ids:
        with dense.disable_adapter(), small.disable_adapter():
            for model, read in zip((dense, small), reads, strict=True):
                read.plain.append(_target_scores(_logits(model, window), window))
        first, second = _logits(dense, window), _logits(small, window)
        for logits, read in zip((first, second), reads, strict=True):
            read.adapted.append(_target_scores(logits, window))
        chunks = zip(log_probability_chunks(first, window), log_probability_chunks(second, window))
        parts = [kl_divergence(p, q) for (p, _), (q, _) in chunks]
        kls.append(float(torch.cat(parts).double().mean()))
    return reads, kls


def _logits(model: PeftModel, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[0].float().cpu()
    return logits


def _target_scores(logits: Tensor, window: Tensor) -> Tensor:
    """Return the log-probability of each next token, `[length - 1]`."""
    chunks = log_probability_chunks(logits, window)
    return torch.cat([log_p.gather(-1, targets[:, None])[:, 0] for log_p, targets in chunks]).double()


def _write_texts(dense: PeftModel, small: PeftModel, ids: Tensor, ends: set[int]) -> dict[str, list[list[int]]]:
    """Return the texts that both models write with the adapter after the first tokens of each window, and those of the
    compressed one after the dense one's first tokens."""
    width = min(LENGTH, ids.shape[1])
    begun, prompts = ids[:, :width], torch.full((len(ids),), min(PROMPT, width - 1))
    sampling: dict[str, Any] = {
        "ends": ends,
        "temperature": 1.0,
        "seeds": [f"passport/{row}" for row in range(len(ids))],
    }
    first, second = (cast("PreTrainedModel", model) for model in (dense, small))  # which they stand for
    by_dense, by_small = (continue_sequences(model, begun, prompts, **sampling) for model in (first, second))
    over = (prompts + OVER).clamp(max=width - 1)
    handed = continue_sequences(second, by_dense.where(by_dense != NOTHING, begun), over, **sampling)
    texts = {"dense": by_dense, "compressed": by_small, "handed_over": handed}
    return {name: [row[int(prompts[0]) :].tolist() for row in rows] for name, rows in texts.items()}


def distinct_share(rows: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of distinct runs among all runs of `n` tokens in texts; 0 without any."""
    texts = [[token for token in row if token != NOTHING] for row in rows]
    runs = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def save_passport(folder: Path, result: Passport) -> None:
    """Add a passport to the compressed checkpoint, for its card. Raises DiskError."""
    add_file(folder, file_names.PASSPORT, json.dumps(result.to_json(), indent=2))
