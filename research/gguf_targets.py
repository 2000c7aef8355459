"""Is a file whose types are chosen by price nearer to the model than llama.cpp's own mixture of the same size?

    python research/gguf_targets.py --data DATA [--model NAME=MODEL] [--jsonl FILE] [MIXTURE[/TABLE] ...]

A mixture is what `llama-quantize` makes of a dense model of a Llama's linears under that name, with an importance
matrix of the linears; `/TABLE` is its option for the type of a tied token table. Its file is counted, and
`compress --for llama.cpp --size` gets as many bytes. Both are filled on the first 16 windows of 1024 tokens of
WikiText-2 validation, read by the `gguf` package, run as float32 in transformers, and scored on the first `--windows`
of its test split. The last column is ours over llama.cpp's.

The models' channels are scaled first, as in `gguf_types.py`; `--as-stored` leaves them.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gguf_types import Matrices, calibration_sequences, read_matrices, scale_channels, spread
from llama_quantizer import BASE, choose_type, linears, measure_importance, quantize
from records import append, provenance, read_records
from rows import calibration
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.allocation.gguf_sizes import GGUFSizes
from llmcompress.cli.compress import DEFAULT
from llmcompress.compression.job import prepare
from llmcompress.evaluation.distance import Distance, distance
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.formats.gguf.head import pad
from llmcompress.methods.grids.gguf import fitting
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.pipeline.engines import compress_for
from llmcompress.recipe.read import read_recipe
from llmcompress.runtime.precision import fast_float32

TABLE, HEAD = "model.embed_tokens", "lm_head"
MIXTURES = ("Q2_K", "IQ2_M", "IQ3_M", "Q3_K_M", "Q4_K_M")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixtures", nargs="*", help=f"of {', '.join(MIXTURES)} (default: all)")
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--model", default="smollm2=smollm2", metavar="NAME=MODEL")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--as-stored", action="store_true", help="do not scale channels")
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row, and skips those that it has")
    options = parser.parse_args()
    model, _, options.source = options.model.partition("=")
    mixtures = options.mixtures or list(MIXTURES)
    if unknown := {each.partition("/")[0] for each in mixtures} - set(MIXTURES):
        parser.error(f"{', '.join(sorted(unknown))} is not known; choose among {', '.join(MIXTURES)}")
    done = {row["arm"] for row in read_records(options.jsonl)} if options.jsonl else set()
    print(f"| mixture | bytes | types | theirs | ours | seconds | over theirs |\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as place, fast_float32():
        bench = Bench(options, Path(place))
        for mixture in mixtures:
            name = f"{model} {mixture}{' as stored' * options.as_stored}"
            if name in done:
                continue
            record = bench.record(mixture) | {"arm": name, "model": model}
            if options.jsonl:
                append(options.jsonl, record)
            n = record["numbers"]
            print(
                f"| {name} | {n['bytes']:,} and {n['bytes_ours']:,} | {record['types_ours']} | {n['kl_theirs']:.4f} ± "
                f"{n['kl_theirs_stderr']:.4f} | {n['kl_ours']:.4f} ± {n['kl_ours_stderr']:.4f} | {n['seconds']:.0f} | "
                f"{n['kl_ours'] / n['kl_theirs']:.3f} |",
                flush=True,
            )


class Bench:
    """The dense model, the text, and what llama.cpp's importance matrix holds."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        source = locate(options.source).folder
        self.options, self.place = options, place
        self.dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        if not options.as_stored:
            scale_channels(self.dense)
        for parameter in self.dense.parameters():  # both start from what is stored
            parameter.data = parameter.data.bfloat16().float()
        copy.deepcopy(self.dense).to(torch.bfloat16).save_pretrained(place / "dense")
        tokenizer.save_pretrained(place / "dense")
        self.student = copy.deepcopy(self.dense)
        self.text = calibration(options.data) | {"bos": "auto"}
        self.importance = measure_importance(self.dense, calibration_sequences(tokenizer, self.text))
        heads = () if self.dense.config.tie_word_embeddings else (HEAD,)
        self.names = (*linears(self.dense), TABLE, *heads)
        protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows)
        self.windows = evaluation_windows(tokenizer, protocol, self.dense.config)

    def record(self, mixture: str) -> dict[str, Any]:
        """Measure a row."""
        theirs, size = self.mixed(*mixture.partition("/")[::2])
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self.place) as folder:
            target = {"bytes": size, "engine": "llama.cpp"}
            recipe = read_recipe(DEFAULT | {"calibration": self.text, "target": target})
            made = compress_for("llama.cpp", self.place / "dense", recipe, Path(folder) / "out")
            seconds, ours = time.monotonic() - started, self.read(Path(folder) / "out" / "model.gguf")
        found = {"theirs": self.distances(theirs), "ours": self.distances(ours)}
        numbers: dict[str, Any] = {"bytes": size, "bytes_ours": made.report.bytes, "seconds": seconds}
        for name, each in found.items():
            numbers |= spread(f"kl_{name}", [one.kl for one in each])
        types = {name: Counter(kind for kind, _, _ in each.values()) for name, each in (("", theirs), ("_ours", ours))}
        return {
            "table": "gguf_targets",
            **{f"types{name}": ", ".join(f"{n} {kind}" for kind, n in each.items()) for name, each in types.items()},
            "command": f"python research/gguf_targets.py --data DATA --model NAME=MODEL {mixture}",
            "text": "wikitext2-test.raw",
            "windows": self.options.windows,
            "calibration": self.text | {"dataset": Path(self.text["dataset"]).name},
            **provenance(),
            "numbers": numbers,
        }

    def mixed(self, mixture: str, table: str) -> tuple[Matrices, int]:
        """Return what llama.cpp makes of the matrices, and the bytes of its file."""
        config, found = self.dense.config, Matrices()
        heads, width = config.num_attention_heads // config.num_key_value_heads, config.hidden_size
        for name, linear in linears(self.dense).items():
            block, leaf = int(name.split(".")[2]), name.rpartition(".")[2]
            wanted = choose_type(mixture, leaf, block, config.num_hidden_layers, heads)
            kind = fitting(wanted, linear.in_features)  # type: ignore[arg-type]
            found[name] = quantize(linear.weight.data, kind, self.importance[name])
        output = "Q8_0" if width % 256 else "Q5_K" if mixture.startswith("IQ2") else "Q6_K"
        if HEAD in self.names:
            found[HEAD] = quantize(self.dense.get_submodule(HEAD).weight.data, output)
            output = fitting("IQ3_S" if mixture == "IQ2_M" else BASE.get(mixture, mixture), width)  # type: ignore[arg-type]
        found[TABLE] = quantize(self.dense.get_submodule(TABLE).weight.data, table or output)
        job = prepare(resolve(str(self.place / "dense")), read_recipe(DEFAULT | {"target": {"bytes": 10**12}}))
        around = GGUFSizes(job).around(found.keys())
        return found, around + sum(pad(size) for _, size, _ in found.values())

    def read(self, path: Path) -> Matrices:
        """Return the matrices of a file."""
        return read_matrices(path, self.place / "dense", self.names)

    def distances(self, matrices: Matrices) -> list[Distance]:
        """Return the distance from the dense model in each window, with these matrices in place of its own."""
        for name, (_, _, values) in matrices.items():
            self.student.get_submodule(name).weight.data.copy_(values)
        return [distance(self.dense, self.student, window[None]) for window in self.windows]


if __name__ == "__main__":
    main()
