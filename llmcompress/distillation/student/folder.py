"""A student's folder: what identifies it, and the same folder written with learned weights in place of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.dense.config import MODEL, needs_code, packing_entry, public_entries
from llmcompress.models.dense.experts import experts_of, holder
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import DenseModel, open_source
from llmcompress.models.dense.packed import packing_method
from llmcompress.models.dense.sizes import own_sizes
from llmcompress.models.dense.skeleton import dense_skeleton
from llmcompress.models.dense.stored_names import hub_names
from llmcompress.models.files.checkpoint import PART, Writer
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.integrity import digest
from llmcompress.models.files.reading import read_json
from llmcompress.models.files.tensor_files import shards
from llmcompress.models.transformers.hf_quantizer import NAME, table_entry
from llmcompress.runtime.facts import versions
from llmcompress.weight.layout import Layout, pack_nested, payload_texts, pieces
from llmcompress.weight.modules import Multiplying


class CompressedStudent:
    """A checkpoint that `compress` wrote: `store` writes the same expressions at the same bytes.

    `nested`: the components of smaller sizes, whose bytes come first (`weight.layout.pack_nested`).
    """

    def __init__(self, opened: CompressedCheckpoint, nested: Sequence[int] = ()) -> None:
        self.opened, self.folder, self.bytes, self.ranks = opened, opened.folder, opened.bytes, sorted(nested)
        self.digests, self.layouts = opened.digests, opened.stored_layouts

    def store(self, linears: Mapping[str, Multiplying], dense: Mapping[str, Tensor], writer: Writer) -> None:
        """Write weights and config.json, with the learned `linears`, which are compressed, and `dense` tensors."""
        opened, ranks = self.opened, self.ranks
        levels = {name: [layout] * (len(ranks) + 1) for name, layout in self.layouts.items()}
        in_common: list[tuple[list[str], list[str]]] = [(list(opened.tied), [])] if opened.tied else []
        for layers, others in (*opened.parts(), *in_common):
            tensors: dict[str, Tensor] = {name: opened.read(name) for name in others}
            tensors |= {name: dense[name].to(tensors[name].dtype) for name in others if name in dense}
            for name in layers:
                learned, stored = linears.get(name), f"{name}.weight"
                if learned is None:
                    tensors[stored] = opened.read(stored)
                    continue
                inputs = learned.layout.inputs
                sizes = pack_nested(learned.expression(), ranks, inputs) if ranks else [learned.packed_weight()]
                levels[name], payload = [each.layout for each in sizes], sizes[-1].payload
                tensors |= {f"{name}.{own.name}": payload[own.start : own.stop] for own in pieces(levels[name])}
            writer.add(tensors, payload_texts({name: levels[name] for name in layers}))
        table, *smaller = ({name: each[place] for name, each in levels.items()} for place in range(-1, len(ranks)))
        entry = table_entry(table, opened.sizes, opened.ties, dict(zip(ranks, smaller))) | {"versions": versions()}
        writer.write("config.json", json.dumps(opened.config | {"quantization_config": entry}, indent=1))


class DenseStudent:
    """A dense checkpoint: `store` writes the same tensors in their dtypes, by the names that they have on the Hub."""

    def __init__(self, source: DenseModel) -> None:
        self.source, self.folder, self.bytes = source, source.folder, source.bytes
        self.layouts: dict[str, Layout] = {}

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digests by tensor; reads all tensors."""
        return {name: digest(self.source.read(name)) for name in sorted(self.source.tensors)}

    def store(self, linears: Mapping[str, Multiplying], dense: Mapping[str, Tensor], writer: Writer) -> None:
        """Write weights and config.json, with the learned `dense` tensors; no linear of it is compressed."""
        source, experts = self.source, experts_of(self.source.skeleton())
        plain = dense_skeleton(source.config, source.folder, False, source.trust_remote_code)
        together: dict[str, list[str]] = {}  # several names may have one tensor in the files
        for name, header in source.tensors.items():
            together.setdefault(holder(name.rpartition(".")[0], experts) or header.key, []).append(name)
        sizes = {key: sum(source.tensors[name].bytes for name in names) for key, names in together.items()}
        for keys in shards(sizes, PART):
            tensors = {name: source.read(name) for key in keys for name in together[key]}
            tensors |= {name: dense[name].to(value.dtype) for name, value in tensors.items() if name in dense}
            writer.add(hub_names(plain, experts, tensors))
        text = (self.folder / "config.json").read_text(encoding="utf-8")
        entries = json.loads(text)
        published = public_entries(entries, needs_code(self.folder, MODEL))
        source.origin.write(writer)
        writer.write("config.json", text if published == entries else json.dumps(published, indent=1))


StudentFolder = CompressedStudent | DenseStudent


def open_folder(place: Place, nested: Sequence[int] = ()) -> StudentFolder:
    """Open the folder of a compressed model of ours, or of a dense one. Raises InputError for any other.

    `nested`: as of `CompressedStudent`.
    """
    try:
        entries = read_json(place.folder / "config.json")
        kind = (packing_entry(entries) or {}).get("quant_method")
    except (OSError, ValueError, AttributeError):  # `open_source` reports the fault
        kind = None
    if kind is not None and packing_method(entries) is not None:
        raise InputError(
            f"{place.name} is stored by {kind}, which training would not keep; compress it, then distil that"
        )
    if kind != NAME or own_sizes(entries):
        return DenseStudent(open_source(place))
    return CompressedStudent(CompressedCheckpoint(place.folder, place.trust_remote_code), nested)
