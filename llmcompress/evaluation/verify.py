"""Verification of a checkpoint, or of what an engine loads: files, tensors, logits, distance to the dense model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError, NumericsError
from llmcompress.evaluation.evaluate import Evaluation, Scoring, evaluate
from llmcompress.evaluation.logits import open_model
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.config import MODEL, context_length
from llmcompress.models.dense.headers import model_files
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.model import DenseModel, open_source
from llmcompress.models.dense.skeleton import check_causal, is_causal
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files.checkpoint import check_manifest, manifest
from llmcompress.models.files.compressed import stored_by
from llmcompress.models.files.file_names import MANIFEST, REPORT, TERMS
from llmcompress.models.files.gguf_header import read_gguf_header
from llmcompress.models.files.integrity import weight_files
from llmcompress.models.files.reading import MENDING
from llmcompress.models.transformers.hf_quantizer import NAME
from llmcompress.reporting import report as reports
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.progress import count_each, progress_lines
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
    """Check a compressed checkpoint, or a model in few bits as an engine loads it, from its files to its logits.

    Args:
        folder: a checkpoint of compress or `save_pretrained`, a GGUF file, or a folder for an engine, which is not run.
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
        InputError: for damaged, missing or unexpected files, a plain model, and an `against` with another vocabulary.
        MemoryLimitError: for models that do not fit into this machine together.
        NumericsError: for NaN in what the model computes.
    """
    gguf = _gguf_files(folder := Path(folder).expanduser())
    home = folder.parent if folder.is_file() else folder
    notes = () if check_manifest(home) else (UNCHECKED,)
    if len(gguf) == 2 and gguf[1].name == TERMS:
        folder, notes = gguf[0], (*notes, f"{gguf[0].name} alone was run, without the low-rank terms of {TERMS}")
    engine = _open_for_engine(folder, bool(gguf), trust_remote_code)
    place = Place(str(folder), folder, trust_remote_code=trust_remote_code) if engine is None else engine.place
    references = [] if against is None else [locate(against, trust_remote_code=trust_remote_code)]
    tokenizer = load_tokenizer(place.folder, trust_remote_code)
    check_vocabularies([place, *references])
    evaluation_windows(tokenizer, Protocol(text, windows, 2))  # a text that cannot be read, before models are loaded
    check_fits(device, "reading text with it", passing=[place, *references])
    files = gguf or (weight_files(folder) if engine is None else model_files(folder))
    layers = None if engine is None else _read_tensors(engine, home, files)
    model: Any = load_model(place, device) if engine is None else open_model(place, device)
    if references:
        check_causal(model.config, "measuring a distance to another model")
    teacher = open_model(references[0], device) if references else None
    protocol = Protocol(text, windows, min(length, context_length(model.config) or length))
    progress, scores = progress or progress_lines(), None
    if is_causal(model.config):
        scores = evaluate(model, tokenizer, protocol, against=teacher, progress=progress)
    return Verification(
        files=len(manifest(home) or files),
        layers=len(compressed_modules(model)) if layers is None else layers,
        bytes=sum(path.stat().st_size for path in files),
        tokens=scores.perplexity.tokens if scores else _read_windows(model, evaluation_windows(tokenizer, protocol)),
        notes=notes,
        **_score_fields(scores),
    )


def _gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF files to verify, low-rank terms beside a model last. Raises InputError if nothing is there."""
    if not os.path.exists(folder):
        stored_by(folder)  # which says why
    files = [folder] if folder.is_file() else [] if (folder / MODEL).is_file() else sorted(folder.glob("[!.]*.gguf"))
    models = [path for path in files if path.name != TERMS]
    terms = [path.with_name(TERMS) for path in models if TERMS in (manifest(path.parent) or ())]
    return [*models, *terms] if len(models) == 1 else files


def _open_for_engine(folder: Path, is_gguf: bool, trust_remote_code: bool) -> DenseModel | None:
    """Return a model in few bits as an engine loads it; None for a checkpoint of llmcompress.

    Raises InputError for a plain model, and for one that cannot be read.
    """
    if not is_gguf and stored_by(folder) == NAME:
        return None
    source = open_source(locate(folder, trust_remote_code=trust_remote_code))
    if not is_gguf and not any(header.packing for header in source.tensors.values()):
        raise InputError(
            f"{folder} holds a plain model; verify takes a checkpoint of llmcompress, a GGUF file, or a folder in few "
            f"bits for vLLM, MLX or ExLlamaV3"
        )
    return source


def _read_tensors(source: DenseModel, home: Path, files: Sequence[Path]) -> int:
    """Read all tensors of a model for an engine, and return the number of matrices that are stored in few bits.

    `home`: the folder with the report, if there is one; `files`: those with the weights. Raises InputError for a tensor
    that cannot be read or is not finite, and for another size than the report's.
    """
    size = sum(path.stat().st_size for path in files)
    if (home / REPORT).is_file() and (said := reports.read(home).bytes) != size:
        raise InputError(f"{home} has {size} bytes of weights, and its {REPORT} says {said}; {MENDING}")
    for name in count_each(list(source.tensors), "tensor read"):
        if not bool(source.read(name).isfinite().all()):
            raise InputError(f"{home}: {name} holds NaN or Inf; compress or train the model again")
    if source.folder != home:
        return sum(read_gguf_header(path).packed for path in files if path.name != TERMS)
    return sum(header.packing is not None for header in source.tensors.values())


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
