"""`save_pretrained` of a compressed model writes what a load gives back, or nothing.

The config is made to describe the model's modules as they are now. Then the model that a load would build from that
config is built without weights, and compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.models.dense.config import config_errors
from llmcompress.models.dense.experts import unfuse
from llmcompress.models.files.checkpoint import NEXT_MANIFEST
from llmcompress.models.files.file_names import (
    ALLOCATION,
    DISTILLATION,
    GENERATIONS,
    MANIFEST,
    PASSPORT,
    REPORT,
    SCORES,
)
from llmcompress.models.files.integrity import EXPONENTS, INDEX, MENDING, SINGLE, all_finite, weight_map
from llmcompress.models.files.reading import error_text
from llmcompress.models.transformers.dequantize import skeleton
from llmcompress.models.transformers.hf_quantizer import (
    STORED,
    LLMCompressConfig,
    LLMCompressQuantizer,
    layouts_of,
    prepare,
    table_entry,
    tensor_specs,
)
from llmcompress.weight.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedModule,
    compressed_modules,
    ties_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS = (REPORT, SCORES, ALLOCATION, DISTILLATION, GENERATIONS, PASSPORT)  # what was measured of a checkpoint
PLAIN: dict[type, tuple[type, ...]] = {  # the modules that compressed ones stand for
    CompressedLinear: (nn.Linear, Conv1D),
    CompressedEmbedding: (nn.Embedding,),
}


@contextmanager
def describe_while_saving(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the config of a compressed model describe it, and its quantizer save it, inside the context.

    Raises InputError for a model that a load would not give back, and unless tensors that were `given` are its own.
    """
    config = _check_model(model, given)
    held = vars(model).get("hf_quantizer")
    known = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = config
    if held is not None:  # the whole model, which goes on with what it is now
        held.quantization_config = config
        yield
        return
    vars(model)["hf_quantizer"] = LLMCompressQuantizer(config)  # a part of one, as `model.base_model`
    try:
        yield
    finally:
        del vars(model)["hf_quantizer"]
        model.config.quantization_config = known


def remove_stale_files(folder: Path) -> None:
    """Remove what a save has left of another checkpoint in its folder, which a load would take for a part of this."""
    results = RESULTS if (folder / MANIFEST).is_file() else ()  # of other weights from now on
    stale = [folder / name for name in (MANIFEST, NEXT_MANIFEST, *results)]
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        is_whole = all((folder / name).is_file() for name in weight_map(index).values())  # else transformers cleared it
        stale.append(single if is_whole and single.stat().st_mtime_ns <= index.stat().st_mtime_ns else index)
    for path in stale:
        if path.is_file():
            path.unlink()


def describe_modules(model: PreTrainedModel) -> LLMCompressConfig:
    """Return the `quantization_config` for the modules of a model. Raises InputError if its config describes none."""
    return _describe(model, _plain(model))


def _check_model(model: PreTrainedModel, given: Mapping[str, Tensor]) -> LLMCompressConfig:
    plain, tensors = _plain(model), dict(model.state_dict())
    if any(tensor.is_meta for tensor in tensors.values()):
        tensors = get_state_dict_offloaded_model(model)
    for name, tensor in given.items():
        if name not in tensors or not _same(tensor, tensors[name]):
            raise _refusal(f"state_dict has another {name} than the model; put it there by model.load_state_dict first")
    for alias, origin in plain.all_tied_weights_keys.items():
        if alias in tensors and origin in tensors and not _same(tensors[alias], tensors[origin]):
            raise _refusal(
                f"{alias} is no longer {origin}, to which its config ties it; set model.config.tie_word_embeddings "
                "to False, and both are saved"
            )
    _check_modules(model, plain, set(_ties(model).values()))
    _check_types(model, plain)
    config = _describe(model, plain)
    try:
        prepare(plain, config)
    except InputError as error:
        raise _refusal(f"{str(error).removesuffix(MENDING)}put back what was there") from error
    _check_tensors(model, plain, tensors)
    return config


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model, on meta, that the config of a model describes."""
    try:
        plain = skeleton(type(model), model.config, model.dtype)
        unfuse(plain)
    except config_errors() as error:
        raise _refusal(f"its config describes no model ({error_text(error)}); undo what was changed in it") from error
    return plain


def _describe(model: PreTrainedModel, plain: PreTrainedModel) -> LLMCompressConfig:
    """Return the config for the modules of `model`. A head that is tied to a table has no entry of its own."""
    tied = plain.all_tied_weights_keys
    table = {name: layout for name, layout in layouts_of(model).items() if f"{name}.weight" not in tied}
    held = getattr(model.config, "quantization_config", None)
    known = held if isinstance(held, LLMCompressConfig) else LLMCompressConfig()
    linears = {
        name: list(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, CompressedModule)
    }
    dense = {name: list(module.weight.shape) for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    sizes = {
        name: size
        for name, size in linears.items()
        if name in known.sizes or dense.get(name, size) != size  # the others have the size that the config gives
    }
    return LLMCompressConfig(**table_entry(table, sizes, _ties(model)), versions=known.versions)


def _ties(model: PreTrainedModel) -> dict[str, str]:
    try:
        return ties_of(model)
    except KeyError as error:
        raise _refusal("a matrix that several linears have in common was taken off; load the model again") from error


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.cpu(), other.cpu())


def _check_modules(model: nn.Module, plain: nn.Module, bases: Iterable[str]) -> None:
    """Raise InputError unless a model has the modules of the one that would be loaded.

    Compressed ones may differ, and `bases`, the matrices that several linears have in common.
    """
    kinds = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    loaded_kinds = {name: type(module) for name, module in plain.named_modules(remove_duplicate=False)}
    added = {place for name in bases for place in accumulate(name.split("."), "{}.{}".format)} - loaded_kinds.keys()
    for name in dict.fromkeys((*kinds, *loaded_kinds)):
        own, loaded = kinds.get(name), loaded_kinds.get(name)
        if name in added or own is loaded or (own and loaded and issubclass(loaded, PLAIN.get(own, ()))):
            continue
        if own is not None and own.__module__.startswith("peft."):
            raise _refusal(
                f"{name} holds an adapter of PEFT; make it part of the model by llmcompress.fold, or save it alone by "
                "save_pretrained of the PEFT model"
            )
        is_now, would_be = ("missing" if kind is None else f"a {kind.__name__}" for kind in (own, loaded))
        raise _refusal(f"{name} is {is_now} where a load would make it {would_be}; put back what was there")


def _check_types(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Raise InputError for weights of another type than a load gives them: that of the model, or of the class."""
    kept = [re.escape(name).replace(r"\*", ".*") for name in model._get_dtype_plan(model.dtype)]  # in float32
    made = {name: value.dtype for name, value in plain.named_parameters(remove_duplicate=False)}
    for name, value in model.named_parameters(remove_duplicate=False):
        is_kept = any(re.search(pattern, name) for pattern in kept)
        given = torch.float32 if is_kept else made.get(name, model.dtype)
        if value.is_floating_point() and value.dtype != given:
            raise _refusal(
                f"{name} is {value.dtype}, and a load gives it {given} beside the other weights; choose one type by "
                "model.to(dtype)"
            )


def _check_tensors(model: nn.Module, plain: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError unless the tensors of a model fit the one that would be loaded."""
    wanted = tensor_specs(plain)
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            place = "is missing" if name in wanted else "has no place in the model that is loaded"
            raise _refusal(f"{name} {place}; put back what was there")
        tensor, want = tensors[name], wanted[name]
        fits = tensor.dtype in EXPONENTS if want.dtype is None else STORED.get(tensor.dtype) == want.dtype
        if tuple(tensor.shape) != want.shape or not fits:
            raise _refusal(
                f"{name} is {tensor.dtype} {list(tensor.shape)} where a load asks for {want.dtype or 'floats'} "
                f"{list(want.shape)}; put back what was there"
            )
        if not all_finite(tensor, want):
            raise _refusal(f"{name} holds NaN or Inf; go back to the state before")
    for name, module in compressed_modules(model).items():
        _check_payload(name, module, plain.get_submodule(name), tensors[f"{name}.weight"])


def _check_payload(name: str, module: CompressedModule, plain: nn.Module, payload: Tensor) -> None:
    try:
        module.layout.check(payload.detach())
    except ValueError as error:
        raise _refusal(f"the payload of {name} is damaged ({error}); load the model again") from error
    if isinstance(module, CompressedEmbedding) and module.scale != getattr(plain, "scale", None):
        raise _refusal(f"{name} multiplies rows by {module.scale}, not as its config says; put back what was there")


def _refusal(what: str) -> InputError:
    return InputError(f"the model is not saved, as a load would not give it back: {what}")
