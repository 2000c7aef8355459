"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` loads compressed checkpoints.

It works once llmcompress was imported. A checkpoint's config lists every compressed linear with the layout of its
payload. `CompressedLinear`s replace those modules on the meta device before weights are read, so the dense model is
never in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.errors import InputError
from llmcompress.models.dense.config import check_entries, check_numbers
from llmcompress.models.dense.experts import unfuse
from llmcompress.models.dense.skeleton import check_buffers
from llmcompress.models.files.checkpoint import FORMAT_VERSION, check_config
from llmcompress.models.files.identity import check_binding, saved_binding
from llmcompress.models.files.integrity import (
    MENDING,
    RANK,
    TensorSpec,
    check_tensors,
    digests,
    size_level,
)
from llmcompress.models.transformers.dequantize import dequantize, own_sizes, skeleton
from llmcompress.models.transformers.resize import resize
from llmcompress.weight.algebra import truncate_low_rank
from llmcompress.weight.layout import PART, Layout, payload_texts, pieces
from llmcompress.weight.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedModule,
    TiedMatrix,
    add_module,
    compressed_modules,
    put,
    tie,
    with_weight,
)
from llmcompress.weight.rows import has_rows, row_scale
from llmcompress.weight.schema import LARGEST

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")
STORED = {torch.uint8: "U8", torch.bool: "BOOL", torch.int32: "I32", torch.int64: "I64"}  # the last two: buffers
NAME = "llmcompress"
PARTS = rf"\.{PART}\d+$"  # of names of tensors that a smaller size leaves in the files


class LLMCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint.

    layers: the index in `layouts` of each compressed module; transformers copies its configs dozens of times while it
    loads, so every layout is listed once. sizes: `[out, in]` of dense linears that differ from the rest of config.json.
    ties: for each linear that shares a matrix, the name of that matrix, one of `layers` but no module of the dense
    model. rank: the components of low-rank terms to keep in a load, None for all. nested: the `layouts` of smaller
    sizes by their components, of which files hold a piece each (`weight.layout.pieces`).
    """

    def __init__(
        self,
        layers: dict[str, int] | None = None,
        layouts: list[dict[str, Any]] | None = None,
        sizes: dict[str, list[int]] | None = None,
        ties: dict[str, str] | None = None,
        rank: int | None = None,
        nested: dict[str, list[dict[str, Any]]] | None = None,
        format_version: int = FORMAT_VERSION,
        **more: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"this checkpoint has format version {format_version}, this llmcompress reads {FORMAT_VERSION}; "
                f"install the version of llmcompress that wrote it"
            )
        self.quant_method = NAME  # type: ignore[assignment]  # an enum of the built-in methods; a string works
        self.format_version = format_version
        self.layers: dict[str, int] = _copy_entry("layers", layers, dict)
        self.sizes: dict[str, list[int]] = _copy_entry("sizes", sizes, dict)
        self.layouts: list[dict[str, Any]] = _copy_entry("layouts", layouts, list)
        self.ties: dict[str, str] = _copy_entry("ties", ties, dict)
        for name, base in self.ties.items():
            if name not in self.layers or not isinstance(base, str) or base not in self.layers or base in self.ties:
                raise InputError(f"config.json ties {name} to {str(base)[:50]}, which is no matrix of it; {MENDING}")
        for name, size in self.sizes.items():
            if not _is_size(size):
                raise InputError(f"config.json gives {name} the size {str(size)[:50]}, which is none; {MENDING}")
        self.versions = more.get("versions", {})
        if rank is not None and (type(rank) is not int or rank < 0):
            raise InputError(f"rank: {str(rank)[:50]} is no number of components; give 0 or more")
        self.rank = rank
        self.nested: dict[str, list[dict[str, Any]]] = _copy_entry("nested", nested, dict)
        for size, entries in self.nested.items():
            _copy_entry(f"the size {size[:50]}", entries, list)
        size_level(self.nested, rank)  # raises for a size that is none

    def table(self) -> dict[str, Layout]:
        """Return every module's layout, at the size that `rank` needs. Raises InputError for an unreadable entry."""
        return self.levels()[-1]

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry, as transformers reads the config of a model that is loaded."""
        return getattr(self, key, default)

    def levels(self) -> list[dict[str, Layout]]:
        """Return a table for each size in the files, from the smallest to the one that `rank` needs."""
        return list(self.tables().values())[: size_level(self.nested, self.rank) + 1]

    def tables(self) -> dict[int | None, dict[str, Layout]]:
        """Return the table of each size by its components, from the smallest to the whole, None."""
        sizes: dict[int | None, dict[str, Layout]] = {}
        for size in sorted(self.nested, key=int):
            sizes[int(size)] = self._table(self.nested[size])
        return sizes | {None: self._table(self.layouts)}

    def _table(self, layouts: list[dict[str, Any]]) -> dict[str, Layout]:
        known: dict[int, Layout] = {}
        for name, number in self.layers.items():
            try:
                if type(number) is not int or not 0 <= number < len(layouts):
                    raise ValueError(f"it has the layout {str(number)[:50]} of {len(layouts)}")
                if number not in known:
                    known[number] = Layout.from_json(layouts[number])
            except ValueError as error:
                raise InputError(
                    f"config.json describes {name} in a way that cannot be read ({error}); {MENDING}"
                ) from error
        table = {name: known[number] for name, number in self.layers.items()}
        for name, base in self.ties.items():
            if table[name].size != table[base].size:
                raise InputError(f"config.json ties {name} to {base}, which has another size; {MENDING}")
        return table


def _copy_entry(name: str, value: Any, kind: type) -> Any:
    """Return a copy of an entry of the config. Raises InputError for a value of another kind."""
    if value is not None and not isinstance(value, kind):
        raise InputError(f"config.json has no {kind.__name__} of {name} in its quantization_config; {MENDING}")
    return kind(value or ())


def _is_size(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(type(count) is int and 0 < count <= LARGEST for count in value)


def table_entry(
    table: Mapping[str, Layout],
    sizes: Mapping[str, Sequence[int]] | None = None,
    ties: Mapping[str, str] | None = None,
    nested: Mapping[int, Mapping[str, Layout]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint; `table`: layouts by module name, `nested`: of smaller sizes."""
    numbers: dict[str, int] = {}
    kinds: list[list[dict[str, Any]]] = []
    layers = {}
    for name, layout in table.items():
        kind = [each.to_json() for each in (layout, *(smaller[name] for smaller in nested.values()))]
        key = json.dumps(kind)
        if key not in numbers:
            numbers[key] = len(kinds)
            kinds.append(kind)
        layers[name] = numbers[key]
    layouts, *others = zip(*kinds, strict=True) if kinds else [()]
    entry = {"quant_method": NAME, "format_version": FORMAT_VERSION, "layouts": list(layouts), "layers": layers}
    entry |= {"ties": dict(ties)} if ties else {}
    entry |= {"nested": {str(rank): list(each) for rank, each in zip(nested, others, strict=True)}} if nested else {}
    return entry | ({"sizes": {name: list(size) for name, size in sizes.items()}} if sizes else {})


class LLMCompressQuantizer(HfQuantizer):
    """Put compressed linears into a model that transformers is about to load."""

    quantization_config: LLMCompressConfig
    requires_calibration = True  # refuses from_pretrained(dense, quantization_config=...): compress first

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Refuse sizes that no model has, and say which is wanted: transformers calls this before it fetches one."""
        entries = config.to_dict()  # a config with a number for each layer refuses to be asked for one
        check_entries(entries, "config.json")
        check_numbers(lambda key: entries.get(config.attribute_map.get(key, key)), "config.json")
        RANK.set(self.quantization_config.rank)
        return config

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:  # 5.17 does not give the model
        """Return no conversions: our files have the model's own names, and a tensor for each matrix of its experts."""
        return []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config, whole = self.quantization_config, model
        if (kind := _causal(model)) is not None:  # the files hold a model with another head, or with one
            whole = skeleton(kind, model.config)
            prepare(whole, config)
            config = within(model, config)
            self.quantization_config = model.config.quantization_config = config
        prepare(model, config)
        files = [Path(name) for name in kwargs.get("checkpoint_files") or ()]  # none where tensors were passed
        if files and config.nested:
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), PARTS}
        if files:
            check_buffers(model, "config.json", sum(path.stat().st_size for path in files))
            check_tensors(files, tensor_specs(whole), whole.all_tied_weights_keys)
            check_config(files[0].parent)
            check_binding(files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from llmcompress.kernels.accelerate import accelerate_loaded  # a compiler is for those who run a model

        for name, layer in compressed_modules(model).items():
            layer.requires_grad_(False)  # transformers asks for gradients of every float it loads
            if layer.levels:
                layer.join_pieces()
            _check_payload(name, layer)
        if (config := self.quantization_config).rank is not None or config.nested:
            self.quantization_config = model.config.quantization_config = truncate_ranks(model, config)
        accelerate_loaded(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: `save_pretrained` writes the payload unchanged."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the tensors that `save_pretrained` is to write, and their digests for the header."""
        if getattr(model, "_hf_peft_config_loaded", False):  # an adapter is written, without the model
            return None, {}
        written = separate(model, model.state_dict())
        tensors: Mapping[str, Tensor] = written
        if any(tensor.is_meta for tensor in tensors.values()):
            tensors = get_state_dict_offloaded_model(model)
        known = digests(tensors, payload_texts(layouts_of(model)))
        return written, known | saved_binding(model.config, known)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes its config's, which `save_pretrained` makes a word
        named: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return dequantize(model, named)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove the config after `dequantize`, unless the model needs it for its widths by block."""
        if sizes := own_sizes(model):
            self.quantization_config = model.config.quantization_config = LLMCompressConfig(**table_entry({}, sizes))
        else:
            super().remove_quantization_config(model)

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on top."""
        return True


def prepare(model: PreTrainedModel, config: LLMCompressConfig) -> None:
    """Put empty compressed modules into a model on meta, one for each matrix of its experts."""
    unfuse(model)
    levels, bases = config.levels(), set(config.ties.values())
    table = levels[-1]
    resize(model, config.sizes | {name: list(layout.size) for name, layout in table.items() if name not in bases})
    for name, layout in table.items():
        if name in bases:
            add_module(model, name, TiedMatrix(layout, _empty_payload(layout)))
        else:
            module = _empty(name, model.get_submodule(name), layout)
            put(model, name, module)
            if len(pieces(sizes := [each[name] for each in levels])) > 1:
                module.expect_pieces(sizes)
    tie(model, config.ties)
    tie_head(model)


def _causal(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """Return the class of the causal language model in the files, if `model` is another class on top of its blocks."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    kind = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(model.config), None) if kind is None else kind
    written = model.config.architectures or []
    return None if kind is None or isinstance(model, kind) or type(model).__name__ in written else kind


def within(model: PreTrainedModel, config: LLMCompressConfig) -> LLMCompressConfig:
    """Return the config for the part that `model` shares with its causal language model, by the names it has there."""
    start = f"{model.base_model_prefix}."
    own = "" if hasattr(model, model.base_model_prefix) else start  # of the blocks alone, names begin below

    def inside(entries: Mapping[str, T]) -> dict[str, T]:
        return {name.removeprefix(own): each for name, each in entries.items() if name.startswith(start)}

    tables = {size: inside(table) for size, table in config.tables().items()}
    ties = {name.removeprefix(own): base.removeprefix(own) for name, base in config.ties.items()}
    smaller = {size: table for size, table in tables.items() if size is not None}
    entry = table_entry(tables[None], inside(config.sizes), ties, smaller)
    return LLMCompressConfig(**entry, rank=config.rank, versions=config.versions)


def tensor_specs(model: nn.Module) -> dict[str, TensorSpec]:
    """Return the requirements of a prepared model by tensor name: payloads are bytes, dense floats of any type."""
    specs = {name: _tensor_spec(value) for name, value in model.state_dict().items()}
    for name, module in compressed_modules(model).items():
        for piece in module.pieces():
            size = (piece.stop - piece.start,)
            specs[f"{name}.{piece.name}"] = TensorSpec(size, STORED[torch.uint8], piece.floats(), piece.layout.text)
    return specs


def _tensor_spec(value: Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), None if value.is_floating_point() else STORED[value.dtype])


def truncate_ranks(model: PreTrainedModel, config: LLMCompressConfig) -> LLMCompressConfig:
    """Keep the first `config.rank` components of low-rank terms of a loaded model; return its config, of one size.

    A head that is tied to a table is cut with it.

    Raises InputError for weights that are not in memory, for matrices in common, and as `truncate_low_rank` does.
    """
    rank, modules, table = config.rank, compressed_modules(model), config.table()
    if config.ties or any(module.get_parameter("weight").is_meta for module in modules.values()):
        raise InputError("rank: terms of matrices in common, or offloaded ones, cannot be cut while a model is loaded")
    if rank is not None:
        for name in table:
            layer: Any = model.get_submodule(name)
            if (first := truncate_low_rank(whole := layer.expression(), rank)) is not whole:
                put(model, name, layer := with_weight(layer, first))
            table[name] = layer.layout
        tie_head(model)
        model.tie_weights(recompute_mapping=False)
    return LLMCompressConfig(**table_entry(table, config.sizes), versions=config.versions)


def tie_head(model: PreTrainedModel) -> None:
    """Make the output head read the payload of the compressed embedding that it is tied to, if any."""
    modules = compressed_modules(model)
    for alias, origin in model.all_tied_weights_keys.items():
        head, table = alias.rpartition(".")[0], modules.get(origin.rpartition(".")[0])
        if isinstance(table, CompressedEmbedding):
            put(model, head, CompressedLinear(table.layout, _empty_payload(table.layout)))


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Return the layout of every compressed module, by each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module.layout for name, module in modules if isinstance(module, CompressedModule)}


def separate(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model; those that share memory without a tie in config.json are copied."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    seen: dict[int, str] = {}
    found = {}
    for name, tensor in tensors.items():
        first = seen.setdefault(tensor.data_ptr(), name) if tensor.numel() and not tensor.is_meta else name
        is_copy = first == name or tied.get(name, name) == tied.get(first, first)
        found[name] = tensor if is_copy else tensor.clone()
    return found


def _empty(name: str, dense: nn.Module, layout: Layout) -> CompressedLinear | CompressedEmbedding:
    """Return the compressed module, on meta, that replaces a dense one. Raises InputError for a table without rows."""
    if isinstance(dense, nn.Embedding):
        if not has_rows(layout.header):
            raise InputError(f"config.json describes {name} in a form whose rows cannot be looked up; {MENDING}")
        dtype = torch.get_default_dtype()
        return CompressedEmbedding(layout, _empty_payload(layout), dtype, row_scale(dense), dense.padding_idx)
    return CompressedLinear(layout, _empty_payload(layout), getattr(dense, "bias", None))


def _check_payload(name: str, module: CompressedModule) -> None:
    """Raise InputError unless a payload, where it is in memory, can be decoded."""
    payload = module.get_parameter("weight")
    if payload.is_meta:
        return
    try:
        module.layout.check(payload.detach())
    except ValueError as error:
        raise InputError(f"the payload of {name} is damaged ({error}); {MENDING}") from error


def _empty_payload(layout: Layout) -> Tensor:
    return torch.empty(layout.bytes(), dtype=torch.uint8, device="meta")


AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = LLMCompressConfig  # in the place that `autoload` keeps
AUTO_QUANTIZER_MAPPING[NAME] = LLMCompressQuantizer
