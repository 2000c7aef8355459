"""Checkpoints of ours in the formats of other engines, one file each."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.compressed_tensors import kv_scales, model_obstacle, to_compressed_tensors
from llmcompress.formats.dense import to_dense
from llmcompress.formats.engine_configs import EXL3, MLX, readable_entries
from llmcompress.formats.engine_files import ExportReport
from llmcompress.formats.exl3 import to_exl3
from llmcompress.formats.gguf.head import FileOrigin, read_head
from llmcompress.formats.gguf.write import to_gguf
from llmcompress.formats.mlx import to_mlx
from llmcompress.formats.peft import to_peft
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.skeleton import check_causal, folder_skeleton
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.output import check_outside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READERS = {"mlx": MLX, "exl3": EXL3}  # what their engines read of config.json
VLLM_MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # whose experts were tried with its loader
INSTALL = 'run pip install "llmcompress[export]"'
FORMATS = ("dense", "compressed-tensors", "peft", "gguf", "mlx", "exl3")


def export(
    folder: str | Path,
    output: str | Path,
    to: str,
    allow_dense: bool = False,
    round_to: str | None = None,
    trust_remote_code: bool = False,
    rank: int | None = None,
) -> ExportReport:
    """Write a compressed checkpoint in a format that other engines read.

    Args:
        folder: a compressed checkpoint.
        output: a new or empty folder.
        to: dense, compressed-tensors, peft, gguf, mlx or exl3.
        allow_dense: True to store matrices that compressed-tensors, GGUF, MLX or EXL3 cannot hold in 16-bit floats.
        round_to: a type of GGUF to round them to instead, where it fits: Q8_0, Q5_0 or Q4_0.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.
        rank: components of low-rank terms to export, as `shrink` leaves them; None for all. Of a checkpoint of `nested`
            sizes, only the files that hold these are read.

    Returns:
        The sizes, and sentences on losses.

    Raises:
        RecipeError: for an unknown format or type, or a format whose package is missing.
        InputError: for a damaged checkpoint, or one that the format cannot hold.
        DiskError: for an output that cannot be written.
    """
    if round_to is not None and to != "gguf":
        raise RecipeError(f"only the export to gguf rounds to a type, not that to {to}; leave round_to out")
    if to not in FORMATS:
        raise RecipeError(f"there is no export to {to!r}; choose one of {', '.join(FORMATS)}")
    opened, target = CompressedCheckpoint(Path(folder).expanduser(), trust_remote_code, rank), Path(output)
    check_outside(target)
    if to != "dense":
        _check_form(opened, to)
    if to == "compressed-tensors":
        return to_compressed_tensors(opened, target, allow_dense)
    done = _write(opened, target, to, allow_dense, round_to)
    rounded = [name for name, layout in opened.layouts.items() if layout.inputs is not None]
    if kv_scales(opened.folder):
        done = replace(done, changed=(*done.changed, "scales of keys and values are left out"))
    if rounded:
        done = replace(done, changed=(*done.changed, f"inputs of {len(rounded)} matrices are no longer rounded"))
    return done


def _write(
    opened: CompressedCheckpoint, target: Path, to: str, allow_dense: bool, round_to: str | None
) -> ExportReport:
    match to:
        case "peft":
            return to_peft(opened, target)
        case "gguf":
            return to_gguf(opened, target, allow_dense, round_to)
        case "mlx":
            return to_mlx(opened, target, allow_dense)
        case "exl3":
            return to_exl3(opened, target, allow_dense)
    return to_dense(opened, target)


def check_model(folder: Path, config: dict[str, Any], to: str, trust_remote_code: bool = False) -> None:
    """Raise InputError if no compression of the model in `folder` could go to a format: a family or a tokenizer that
    its engine reads otherwise, or a kind of model; RecipeError if a package is missing."""
    model = folder_skeleton(folder, trust_remote_code=trust_remote_code)
    _check_kind(model, folder, to)
    if to == "compressed-tensors" and (why := model_obstacle(model.config)) is not None:
        raise InputError(f"vLLM does not load {folder}: {why}; leave the engine out")
    if to == "compressed-tensors" and find_spec("compressed_tensors") is None:
        raise RecipeError(f"{to} is the package that reads what this writes, and is missing; {INSTALL}")
    if to == "gguf":
        read_head(folder, config, FileOrigin(folder.name, None, None))
    elif to in READERS:
        readable_entries(folder, config, READERS[to])


def _check_form(opened: CompressedCheckpoint, to: str) -> None:
    """Raise InputError for blocks with widths of their own, and for kinds of models that a format does not hold."""
    if opened.sizes:
        raise InputError(
            f"blocks of {opened.folder} have widths of their own, which {to} has no place for; export it to dense, "
            f"which fills them up, or load it with transformers as it is"
        )
    _check_kind(opened.skeleton, opened.folder, to)


def _check_kind(model: PreTrainedModel, folder: Path, to: str) -> None:
    """Raise InputError for models that are not causal, and for mixtures of experts where readers would initialise them
    randomly."""
    check_causal(model.config, f"the export to {to}")
    experts = {} if to == "gguf" else experts_of(model)
    if experts and not (to == "compressed-tensors" and model.config.model_type in VLLM_MIXTURES):
        raise InputError(
            f"{folder} is a mixture of experts ({next(iter(experts))}), which cannot go to {to} yet; export it to "
            f"dense, or load it with transformers as it is"
        )
