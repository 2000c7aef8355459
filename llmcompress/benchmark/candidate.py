"""The models of a measurement before any is loaded: place, sizes, limits, and the bytes that a token reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmcompress.benchmark.protocol import SpeedProtocol
from llmcompress.errors import InputError, RecipeError, check_several
from llmcompress.evaluation.score import open_stored, size_of
from llmcompress.models.dense.config import MODEL, context_length, read_entries
from llmcompress.models.dense.experts import expert_share, experts_of
from llmcompress.models.dense.headers import FLOATS, Header
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.packed import packing_method
from llmcompress.models.dense.sizes import is_dense
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.models.dense.tokenizer import check_vocabularies
from llmcompress.models.files import file_names
from llmcompress.models.files.gguf_header import read_gguf_header
from llmcompress.models.files.reading import MENDING
from llmcompress.reporting.report import read_optional
from llmcompress.runtime.engines import check_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTIPLIED = (None, "bitsandbytes")  # packings that are not unpacked here before anything is measured
SCORES = ("perplexity", "kl", "top1_agreement")  # copied from the file of `eval --save`


@dataclass(frozen=True)
class Candidate:
    """One model to measure. `kind`: dense, compressed or gguf; `token_bytes`: of weights, read for each token."""

    name: str
    kind: str
    path: Path
    bytes: int
    bpw: float | None
    model_bpw: float | None
    token_bytes: int
    vocabulary: int
    context: int | None
    dtype: str | None = None  # to load it in; None: the model's own
    scores: dict[str, Any] | None = None  # with their protocol
    notes: tuple[str, ...] = ()
    trust_remote_code: bool = False

    @property
    def engine(self) -> str:
        """The program that runs the model."""
        return "llama.cpp" if self.kind == "gguf" else "transformers"


def find_candidates(
    models: Sequence[str | Path],
    ggufs: Sequence[str | Path],
    protocol: SpeedProtocol,
    against: str | None,
    trust_remote_code: bool = False,
) -> list[Candidate]:
    """Return the models, `against` first unless it is among them, then the GGUF files.

    Raises InputError for a model that is missing, unreadable, or of another vocabulary than `against`; RecipeError for
    a name given twice or for a list, a turn longer than a model's context, and GGUF files without their package.
    """
    check_several(models, "models")
    check_several(ggufs, "ggufs")
    names, files = list(map(str, models)), [Path(file).expanduser() for file in ggufs]
    if against is not None and against not in names:
        names.insert(0, against)
    if files:
        check_engine("llama.cpp")
    given = [*names, *map(str, files)]
    if twice := [name for name in given if given.count(name) > 1]:
        raise RecipeError(f"{twice[0]} is named twice; name every model once")
    places = [locate(name, trust_remote_code=trust_remote_code) for name in names]
    if adapted := [place.name for place in places if place.adapter is not None]:
        raise InputError(f"{adapted[0]} is an adapter, and speed is that of whole models; merge it with PEFT first")
    if against is not None:
        reference = places[names.index(against)]
        check_vocabularies([reference, *(place for place in places if place is not reference)], predictions=False)
    folders = [replace(describe_folder(place, protocol.dtype), name=name) for name, place in zip(names, places)]
    candidates = [*folders, *map(_describe_gguf, files)]
    for model in candidates:
        if model.context is not None and protocol.context > model.context:
            raise RecipeError(
                f"{model.name} reads {model.context} tokens at most, not {protocol.context}: a prompt of "
                f"{protocol.prompt} and {protocol.tokens + 1} more; give a lower --prompt or --tokens"
            )
    return candidates


def describe_folder(place: Place, dtype: str) -> Candidate:
    """Return a model in a folder; `dtype`: to load a dense one in. Raises InputError for one that cannot be read."""
    if place.file is not None:
        raise InputError(f"{place.name} is in GGUF, which llama.cpp runs; give the file by --gguf")
    entries = read_entries(place.folder / MODEL, place.folder)
    dense, method = is_dense(entries), packing_method(entries)
    if method not in MULTIPLIED:
        raise InputError(
            f"{place.name} is stored by {method}, whose codes transformers does not multiply on a processor; measure "
            f"it in its engine"
        )
    skeleton, stored = open_stored(place)
    check_causal(skeleton.config, "measuring how fast text is generated")
    size = size_of(place)
    return Candidate(
        name=place.name,
        kind="dense" if dense else "compressed",
        path=place.folder,
        bytes=size.bytes,
        bpw=size.bpw,
        model_bpw=size.model_bpw,
        token_bytes=token_bytes(skeleton, stored, getattr(torch, dtype) if dense else None),
        vocabulary=len(skeleton.get_input_embeddings().get_parameter("weight")),
        context=context_length(skeleton.config),
        dtype=dtype if dense else None,
        scores=_scores(place.folder),
        notes=place.notes,
        trust_remote_code=place.trust_remote_code,
    )


def _describe_gguf(path: Path) -> Candidate:
    header = read_gguf_header(path)
    return Candidate(
        name=path.name,
        kind="gguf",
        path=path,
        bytes=header.bytes,
        bpw=None,
        model_bpw=None,
        token_bytes=header.token_bytes,
        vocabulary=header.vocabulary,
        context=header.context,
    )


def token_bytes(skeleton: PreTrainedModel, stored: Mapping[str, Header], dtype: torch.dtype | None) -> int:
    """Return the bytes of weights that are read for each token: everything, but one row only of a table without ties,
    and of experts as many as a token is given.

    `stored`: headers by the skeleton's names. `dtype`: of floats in memory, None for that on disk.
    """
    sizes = {name: _bytes(header, dtype) for name, header in stored.items()}
    ties = skeleton.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    for name, module in skeleton.named_modules():
        table = f"{name}.weight"
        if isinstance(module, nn.Embedding) and table in sizes and table not in tied:
            sizes[table] = -(-sizes[table] // module.num_embeddings)
    for path, experts in experts_of(skeleton).items():
        share = expert_share(skeleton.config, experts.num_experts)
        sizes |= {name: round(share * size) for name, size in sizes.items() if name.startswith(f"{path}.")}
    return sum(sizes.values())


def _bytes(header: Header, dtype: torch.dtype | None) -> int:
    return header.bytes if dtype is None or header.dtype not in FLOATS else prod(header.shape) * dtype.itemsize


def _scores(folder: Path) -> dict[str, Any] | None:
    """Return the scores of a compressed model that `eval --save` wrote, and their protocol; None without them.

    Raises InputError for a damaged file.
    """
    path = folder / file_names.SCORES
    if (entries := read_optional(path)) is None:
        return None
    try:
        scores = {name: entries["compressed"][name] for name in SCORES}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error
    results = ("dense", "compressed", "differences", "versions", "digest")
    return scores | {"protocol": {name: value for name, value in entries.items() if name not in results}}


def draw_prompt(models: Sequence[Candidate], length: int, seed: int) -> list[int]:
    """Return `length` random tokens that every model knows."""
    generator = torch.Generator().manual_seed(seed)
    least = min(model.vocabulary for model in models)
    tokens: list[int] = torch.randint(least, (length,), generator=generator).tolist()
    return tokens
