"""Measure what keys and values in few bits cost a model: perplexity through a cache, and the bytes that it holds.

    python research/kv_cache.py --data DATA [--chunk 128] [--residuals 32 128] [--jsonl FILE]

Windows of `wikitext2-test.raw` are read together, in chunks of `--chunk` tokens; what a chunk sees of earlier ones
comes from the cache. With chunks of one token, that is the way of generation. The arm of 16 bits is transformers'
own cache, in the dtype of the model. `--jsonl` collects a record of each arm, and skips those that it has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from records import Record, append, provenance, read_records
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmcompress.evaluation.perplexity import Perplexity, negative_log_likelihood, reliability, text_windows
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.transformers.kv_cache import cache, held_bytes

DENSE = 16


def main() -> None:
    """Measure every arm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of model and cache")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--residuals", type=int, nargs="+", default=[128])
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    place = locate(options.model)
    model = load_model(place, dtype=getattr(torch, options.dtype))
    text = (options.data / "wikitext2-test.raw").read_text(encoding="utf-8")
    ids = text_windows(load_tokenizer(place.folder), text, options.windows, options.length, model.config)
    done = [row["settings"] for row in read_records(options.jsonl)] if options.jsonl else []
    print(
        "| dtype | bits | group | residual | chunk | perplexity | bytes | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for one in arms(options):
        if one not in done:
            record = measured(model, ids, one, options)
            if options.jsonl:
                append(options.jsonl, record)
            print(line(record), flush=True)


def arms(options: argparse.Namespace) -> list[Record]:
    """Return what is measured; a cache in 16 bits has neither groups nor a residual."""
    shared = {"dtype": options.dtype, "chunk": options.chunk, "windows": options.windows, "length": options.length}
    found = []
    for bits in options.bits:
        for residual in options.residuals if bits < DENSE else [None]:
            group = options.group_size if bits < DENSE else None
            found.append({"bits": bits, "group_size": group, "residual": residual, **shared})
    return found


def name(arm: Record) -> str:
    """Return what a table calls an arm."""
    if arm["residual"] is None:
        return f"{arm['dtype']}, not quantized"
    return f"{arm['bits']} bits, groups of {arm['group_size']}, the last {arm['residual']} tokens in {arm['dtype']}"


def measured(model: PreTrainedModel, ids: Tensor, arm: Record, options: argparse.Namespace) -> Record:
    """Return the record of one arm."""
    given = {} if arm["residual"] is None else {"group_size": arm["group_size"], "residual": arm["residual"]}
    past = cache(model, arm["bits"], **given) if given else DynamicCache(config=model.config)
    start = time.perf_counter()
    found = perplexity(model, ids, past, arm["chunk"])
    words = f"--dtype {arm['dtype']} --bits {arm['bits']} --chunk {arm['chunk']} --windows {arm['windows']}"
    if given:
        words += f" --group-size {arm['group_size']} --residuals {arm['residual']}"
    return {
        "table": "kv_cache",
        "arm": name(arm),
        "settings": arm,
        "command": f"python research/kv_cache.py --data DATA {words}",
        "model": options.model,
        "text": "wikitext2-test.raw",
        "calibration": None,
        **provenance(),
        "numbers": {
            "perplexity": found.value,
            "nll": found.nll,
            "nll_windows": list(found.windows),
            "tokens": found.tokens,
            "cache_bytes": held_bytes(past),
            "seconds": round(time.perf_counter() - start, 1),
        },
    }


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, past: Any, chunk: int) -> Perplexity:
    """Return the perplexity of windows [n, length] read together, chunk by chunk, through a cache."""
    sums, bins = [0.0] * len(ids), []
    targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)  # the last one's is not counted
    for first in range(0, ids.shape[1], chunk):
        last = min(first + chunk, ids.shape[1])
        logits = model(ids[:, first:last], past_key_values=past).logits
        counted = min(last, ids.shape[1] - 1) - first
        for window in range(len(ids)):
            likely = logits[window, :counted].float().log_softmax(-1)
            following = targets[window, first : first + counted]
            sums[window] += negative_log_likelihood(likely, following)
            bins.append(reliability(likely, following))
    return Perplexity.of([total / (ids.shape[1] - 1) for total in sums], bins, ids.shape[0] * (ids.shape[1] - 1))


def line(record: Record) -> str:
    """Return one line of the table."""
    arm, numbers = record["settings"], record["numbers"]
    form = " | ".join(str(arm[key] if arm[key] is not None else "–") for key in ("bits", "group_size", "residual"))
    found = f"{numbers['perplexity']:.3f} | {numbers['cache_bytes']} | {numbers['seconds']:.0f}"
    return f"| {arm['dtype']} | {form} | {arm['chunk']} | {found} |"


if __name__ == "__main__":
    main()
