"""Verification of a checkpoint: its files, its tensors, its logits, its distance to the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import NumericsError
from llmcompress.evaluation.evaluate import Evaluation, Scoring, evaluate
from llmcompress.evaluation.logits import open_model
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.config import context_length
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.skeleton import check_causal, is_causal
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files.checkpoint import MANIFEST, check_manifest, manifest
from llmcompress.models.files.compressed import check_kind
from llmcompress.models.files.integrity import weight_files
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.progress import progress_lines
from llmcompress.weight.modules import compressed_modules, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNCHECKED = f"there is no {MANIFEST}, so only the weights could be checked, not the files beside them"


@dataclass(frozen=True)
class Verification(JsonRecord):
    """Findings on a valid checkpoint. `kl`, `top1_agreement`: None where no dense model was given."""

    files: int
    layers: int
    bytes: int
    perplexity: float | None  # None for a model that does not predict the next token
    tokens: int
    kl: float | None
    top1_agreement: float | None
    notes: tuple[str, ...] = ()


@fast_float32()
def verify(
    folder: str | Path,
    against: str | None = None,
    text: Path | None = None,
    windows: int = 4,
    length: int = 512,
    device: str = "cpu",
    progress: Scoring | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Check a compressed checkpoint from its files to its logits.

    Args:
        folder: a checkpoint of compress or `save_pretrained`.
        against: the dense model that KL and top-1 agreement are measured from; None for neither.
        text: UTF-8 text to read, or files of documents; documentation of Python by default.
        windows: how many windows of it.
        length: tokens of a window, at most the context of the model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives what is being read, how much is done, and how much there is; None for a line in a notebook.
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        Counts of files and layers, bytes, perplexity, and the distance to `against`.

    Raises:
        InputError: for damaged, missing or unexpected files, and for an `against` with another vocabulary.
        MemoryLimitError: for models that do not fit into this machine together.
        NumericsError: for NaN in what the model computes.
    """
    progress = progress or progress_lines()
    folder = Path(folder)
    check_kind(folder)
    notes = () if check_manifest(folder) else (UNCHECKED,)
    references = [] if against is None else [locate(against, trust_remote_code=trust_remote_code)]
    places = [Place(str(folder), folder, trust_remote_code=trust_remote_code), *references]
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_vocabularies(places)
    evaluation_windows(tokenizer, Protocol(text, windows, 2))  # a text that cannot be read, before models are loaded
    check_fits(device, "reading text with it", passing=places)
    model = load_model(places[0], device)
    if references:
        check_causal(model.config, "measuring a distance to another model")
    teacher = open_model(references[0], device) if references else None
    protocol = Protocol(text, windows, min(length, context_length(model.config) or length))
    files, scores = weight_files(folder), None
    if is_causal(model.config):
        scores = evaluate(model, tokenizer, protocol, against=teacher, progress=progress)
    if scores is None:
        tokens = _read_windows(model, evaluation_windows(tokenizer, protocol))
    else:
        tokens = scores.perplexity.tokens
    return Verification(
        files=len(manifest(folder) or files),
        layers=len(compressed_modules(model)),
        bytes=sum(path.stat().st_size for path in files),
        tokens=tokens,
        notes=notes,
        **_score_fields(scores),
    )


def _score_fields(scores: Evaluation | None) -> dict[str, Any]:
    """Return the fields of a `Verification` on scores."""
    distance = None if scores is None else scores.distance
    return {
        "perplexity": None if scores is None else scores.perplexity.value,
        "kl": None if distance is None else distance.kl,
        "top1_agreement": None if distance is None else distance.top1_agreement,
    }


@torch.no_grad()
def _read_windows(model: PreTrainedModel, windows: Tensor) -> int:
    """Run a model that does not predict the next token on `windows [n, length]`; return the number of tokens.

    Raises NumericsError if its outputs are not finite.
    """
    with decoded(model):
        for ids in windows.to(model.device).split(1):
            if not bool(model(input_ids=ids)[0].isfinite().all()):
                raise NumericsError(f"a {type(model).__name__} gives NaN or infinite numbers for the evaluation text")
    return windows.numel()
