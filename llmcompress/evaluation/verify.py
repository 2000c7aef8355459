"""Verification of a checkpoint: its files, its tensors, its logits, its distance to the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.errors import NumericsError
from llmcompress.evaluation.logits import opened
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.scores import Scoring, evaluate
from llmcompress.models.dense.config import context_length
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.skeleton import check_causal, is_causal
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files.checkpoint import MANIFEST, check_manifest, manifest
from llmcompress.models.files.compressed import check_kind
from llmcompress.models.files.integrity import weight_files
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.notebook import progress_lines
from llmcompress.runtime.precision import fast_float32
from llmcompress.weight.modules import compressed_modules, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNCHECKED = f"there is no {MANIFEST}, so only the weights could be checked, not the files beside them"


@dataclass(frozen=True)
class Verified(JsonRecord):
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
) -> Verified:
    """Check a compressed checkpoint from its files to its logits.

    Args:
        folder: what compress or `save_pretrained` wrote.
        against: the dense model that KL and top-1 agreement are measured from; None for neither.
        text: UTF-8 text to read; documentation of Python by default.
        windows: how many windows of it.
        length: tokens of a window; less where the model reads less.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives what is being read, how much is done, and how much there is; None for a line in a notebook.
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        Counts of files and layers, bytes, perplexity, and the distance to `against`.

    Raises:
        InputError: for whatever is damaged, missing or too much, and for an `against` with another vocabulary.
        MemoryLimitError: for models that do not fit into this machine together.
        NumericsError: for a model that computes NaN.
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
    teacher = opened(references[0], device) if references else None
    length = min(length, context_length(model.config) or length)
    protocol, files, found = Protocol(text, windows, length), weight_files(folder), None
    if is_causal(model.config):
        found = evaluate(model, tokenizer, protocol, against=teacher, progress=progress)
    distance = None if found is None else found.distance
    tokens = _run(model, evaluation_windows(tokenizer, protocol)) if found is None else found.perplexity.tokens
    return Verified(
        files=len(manifest(folder) or files),
        layers=len(compressed_modules(model)),
        bytes=sum(path.stat().st_size for path in files),
        perplexity=None if found is None else found.perplexity.value,
        tokens=tokens,
        kl=None if distance is None else distance.kl,
        top1_agreement=None if distance is None else distance.top1_agreement,
        notes=notes,
    )


@torch.no_grad()
def _run(model: PreTrainedModel, windows: Tensor) -> int:
    """Let a model that does not predict the next token read `windows [n, length]`, and return the count of tokens.

    Raises NumericsError if what it gives is not finite.
    """
    with decoded(model):
        for ids in windows.to(model.device).split(1):
            if not bool(model(input_ids=ids)[0].isfinite().all()):
                raise NumericsError(f"a {type(model).__name__} gives NaN or infinite numbers for the evaluation text")
    return windows.numel()
