"""Is a GGUF type better filled by our feedback than by llama.cpp's own quantizer? KL from the dense model, equal bytes.

    python research/gguf_types.py --data DATA [--jsonl FILE] [TYPE ...]

All linears of SmolLM2 become one type (those that it does not fit, the type that llama.cpp takes instead), or with
`TYPE:down_proj` those whose names end so; the rest stays. Four arms of the same type in every matrix: ours; the same
without calibration, which is plain rounding with our search of scales; llama.cpp's; llama.cpp's with an importance
matrix. Ours go through the exported file. All are read by the `gguf` package and run as float32 in transformers.
Calibrated, as the importance matrix is, on the first 16 windows of 1024 tokens of WikiText-2 validation; scored on the
first `--windows` of its test split. The last column is what ours has above the better of llama.cpp's, window by window.

The package's SmolLM2 was stored as Q4_1, which flatters types of 4 bits; so its input channels are scaled first, by
random factors that its norms and the rows before take back: the same model, but no longer on a grid. `--as-stored`
leaves them. `--jsonl` collects a record of each row, and skips those that it has.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama_quantizer import linears, measure_importance, quantize
from records import Record, append, provenance, read_records
from rows import calibration
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.data.calibration import calibration_tokens
from llmcompress.evaluation.distance import Distance, distance
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.formats.export import export
from llmcompress.formats.gguf.model import gguf_model
from llmcompress.methods.grids.gguf import FORMS, fitting
from llmcompress.models.dense.locate import locate
from llmcompress.recipe.calibration import Calibration
from llmcompress.runtime.precision import fast_float32
from llmcompress.weight.superblocks import LAYOUTS

INPUTS = {  # linears of a block that read one input, and what is before it
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
TYPES = (*FORMS, *sorted(LAYOUTS.keys() - FORMS.keys()))
ARMS = ("ours", "rounded", "llama", "llama_importance")
Matrices = dict[str, tuple[str, int, Tensor]]  # linear -> its type, its bytes, what they say


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="GGUF types (default: all)")
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--as-stored", action="store_true", help="do not scale channels")
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row")
    options = parser.parse_args()
    kinds = options.types or list(TYPES)
    if unknown := {kind.partition(":")[0] for kind in kinds} - set(TYPES):
        parser.error(f"{', '.join(sorted(unknown))} cannot be filled; choose among {', '.join(TYPES)}")
    done = {row["arm"] for row in read_records(options.jsonl)} if options.jsonl else set()
    print(f"| type | matrices | bytes | {' | '.join(ARMS)} | ours above llama.cpp's better |\n|{'---|' * 8}")
    with tempfile.TemporaryDirectory() as place, fast_float32():
        bench = Bench(options, Path(place))
        for kind in kinds:
            if arm(kind, options) not in done:
                record = bench.record(kind)
                if options.jsonl:
                    append(options.jsonl, record)
                print(line(record), flush=True)


def arm(kind: str, options: argparse.Namespace) -> str:
    """Return the name of a row."""
    name, _, only = kind.partition(":")
    return name + (f", {only} alone" if only else "") + (", as stored" if options.as_stored else "")


class Bench:
    """The dense model, the text, and what llama.cpp's importance matrix holds."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        source = locate("smollm2").folder
        self.options, self.folder = options, place / "dense"
        self.dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        if not options.as_stored:
            scale_channels(self.dense)
        self.dense.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        self.student = copy.deepcopy(self.dense)
        self.text = calibration(options.data)
        self.importance = measure_importance(self.dense, calibration_sequences(tokenizer, self.text))
        protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows)
        self.windows = evaluation_windows(tokenizer, protocol, self.dense.config)

    def record(self, kind: str) -> Record:
        """Measure the arms of a row. Raises RuntimeError where they do not have the same types and bytes."""
        name, _, only = kind.partition(":")
        chosen = {path: child.weight.data for path, child in linears(self.dense).items() if path.endswith(only)}
        made = {
            "ours": self.exported(name, only, self.text),
            "rounded": self.exported(name, only, None),
            "llama": quantized(chosen, name, None),
            "llama_importance": quantized(chosen, name, self.importance),
        }
        layouts = [{path: found[:2] for path, found in matrices.items()} for matrices in made.values()]
        if any(layout != layouts[0] for layout in layouts):
            raise RuntimeError(f"the files of {kind} do not have the same types and bytes")
        types = Counter(found for found, _ in layouts[0].values())
        numbers: dict[str, Any] = {"bytes": sum(size for _, size in layouts[0].values())}
        return {
            "table": "gguf_types",
            "arm": arm(kind, self.options),
            "types": ", ".join(f"{count} {found}" for found, count in types.most_common()),
            "command": f"python research/gguf_types.py --data DATA --windows {self.options.windows}"
            + f"{' --as-stored' if self.options.as_stored else ''} {kind}",
            "model": "smollm2",
            "text": "wikitext2-test.raw",
            "windows": self.options.windows,
            "calibration": self.text | {"dataset": Path(self.text["dataset"]).name},
            **provenance(),
            "tools": {package: version(package) for package in ("gguf", "xllamacpp")},
            "numbers": numbers | compared({each: self.distances(found) for each, found in made.items()}),
        }

    def exported(self, kind: str, only: str, text: dict[str, Any] | None) -> Matrices:
        """Return what our file of a type says, compressed with or without calibration."""
        recipe = {"version": 1, "rules": [{"match": f"*{only}", "steps": [{"method": "gguf", "type": kind}]}]}
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as place:
            made = lc.compress(str(self.folder), recipe | ({"calibration": text} if text else {}), Path(place) / "made")
            export(made.folder, Path(place) / "file", "gguf")
            [path] = (Path(place) / "file").rglob("model.gguf")
            return self.read(path, only)

    def read(self, path: Path, only: str) -> Matrices:
        """Return the matrices of some linears in a file."""
        return read_matrices(path, self.folder, [name for name in linears(self.dense) if name.endswith(only)])

    def distances(self, matrices: Matrices) -> list[Distance]:
        """Return the distance from the dense model in each window, with these matrices in place of its own."""
        self.student.load_state_dict(self.dense.state_dict())
        for name, child in linears(self.student).items():
            if name in matrices:
                child.weight.data.copy_(matrices[name][2])
        return [distance(self.dense, self.student, window[None]) for window in self.windows]


def read_matrices(path: Path, folder: Path, names: Iterable[str]) -> Matrices:
    """Return matrices of a file by their names, with the rows of heads in the order that transformers has them.

    `folder`: of the model with its config.json.
    """
    form = gguf_model(folder, json.loads((folder / "config.json").read_text()))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found: Matrices = {}
    for name in names:
        tensor = stored[form.name(f"{name}.weight")]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        order = form.row_order(tensor.name)
        values = values if order is None else values[order.argsort()]
        found[name] = (tensor.tensor_type.name, int(tensor.n_bytes), values)
    return found


def compared(found: dict[str, list[Distance]]) -> dict[str, float]:
    """Return KL and perplexity of each arm, and how far ours is above the better of llama.cpp's, window by window."""
    numbers = {"perplexity_dense": perplexity([each.teacher.nll for each in found["ours"]])}
    for name, each in found.items():
        numbers |= spread(f"kl_{name}", [one.kl for one in each])
        numbers[f"perplexity_{name}"] = perplexity([one.student.nll for one in each])
    best = min(("llama", "llama_importance"), key=lambda name: numbers[f"kl_{name}"])
    pairs = zip(found["ours"], found[best], strict=True)
    return numbers | spread("kl_above", [ours.kl - theirs.kl for ours, theirs in pairs])


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Return the mean and its standard error."""
    return {name: statistics.fmean(values), f"{name}_stderr": statistics.stdev(values) / len(values) ** 0.5}


def perplexity(losses: list[float]) -> float:
    """Return the perplexity of windows of as many tokens."""
    return float(np.exp(statistics.fmean(losses)))


def line(record: Record) -> str:
    """Return one line of the table."""
    numbers = record["numbers"]
    cells = [f"{numbers[f'kl_{name}']:.5f} ± {numbers[f'kl_{name}_stderr']:.5f}" for name in (*ARMS, "above")]
    return f"| {record['arm']} | {record['types']} | {numbers['bytes']:,} | {' | '.join(cells)} |"


def scale_channels(model: nn.Module) -> None:
    """Scale the inputs of linears by random factors, and what is before them by the inverse, in place."""
    random = torch.Generator().manual_seed(0)
    blocks: Any = model.get_submodule("model.layers")
    for block in blocks:
        for names, before in INPUTS.items():
            if hasattr(block, "pre_feedforward_layernorm"):  # the other one is behind attention
                before = before.replace("post_attention", "pre_feedforward")
            module = block.get_submodule(before)
            source = module.weight.data
            factors = (0.4 * torch.rand(len(source), generator=random) + 0.8).reshape(-1, *[1] * (source.dim() - 1))
            offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0  # what the norm adds to its weight
            source.add_(offset).div_(factors).sub_(offset)
            for name in names:
                block.get_submodule(name).weight.data.mul_(factors.flatten())


def calibration_sequences(tokenizer: Any, text: dict[str, Any]) -> Tensor:
    """Return the sequences of calibration `[samples, length]`, without those held out."""
    tokens = calibration_tokens(Calibration.model_validate(text), tokenizer)
    return tokens.sequences[: tokens.obtained - tokens.held_out]


def quantized(weights: dict[str, Tensor], kind: str, importance: dict[str, Tensor] | None) -> Matrices:
    """Return what llama.cpp's quantizer makes of matrices."""
    found: Matrices = {}
    for name, weight in weights.items():
        fits = fitting(kind, weight.shape[1])  # type: ignore[arg-type]
        found[name] = quantize(weight, fits, None if importance is None else importance[name])
    return found


if __name__ == "__main__":
    main()
