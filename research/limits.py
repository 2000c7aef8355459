"""A model larger than memory: every command under a limit that the kernel enforces, with its peak and its time.

    python research/limits.py --folder FOLDER [--blocks 32] [--gigabytes 6] [--jsonl FILE] [STAGE ...]

Writes a Llama of random weights (width 4096, 12 GB with 32 blocks) into FOLDER unless it is there. Each stage runs in a
control group of its own whose memory ends at the limit; page cache counts, as it does in a container. Needs Linux and
the right to make a group (version 1 or 2). A stage that is killed, or fails, ends the program with 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from records import Record, append, provenance

WIDTH, INNER, HEADS, HEAD = 4096, 11008, 32, 128
GROUPS = Path("/sys/fs/cgroup")
TEXT = ("calibration.dataset=builtin", "calibration.samples=4", "calibration.length=64", "calibration.held_out=1")
GRIDS = {
    "version": 1,
    "name": "grids",
    "calibration": {"dataset": "builtin", "samples": 4, "length": 64, "held_out": 1},
    "rules": [],
    "target": {"bpw": 3.5},
    "options": [[{"method": "rtn", "bits": bits, "group_size": 64}] for bits in (2, 3, 4)],
}
GENERATE = """
import sys
import llmcompress
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
print(tokenizer.decode(model.generate(**tokenizer("The goose", return_tensors="pt"), max_new_tokens=4)[0]))
"""
WINDOWS = ("--windows", "1", "--length", "128")


def main() -> None:
    """Run the stages, and print a line on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="those to run; all of them otherwise")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--jsonl", type=Path)
    options = parser.parse_args()
    model = options.folder / f"llama-{options.blocks}"
    if not (model / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, "-c", MAKE, str(model), str(options.blocks)], check=True)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    stages = commands(model, options.folder)
    limit = int(options.gigabytes * 1e9)
    failed = False
    for name in options.stages or stages:
        numbers, code = limited(stages[name], limit)
        failed |= code != 0
        print(f"{name}: exit {code}, peak {numbers['peak_gigabytes']:.2f} GB, {numbers['minutes']:.1f} min", flush=True)
        if options.jsonl and code == 0:
            append(options.jsonl, _record(name, numbers, size, options))
    raise SystemExit(failed)


def _record(name: str, numbers: Record, size: int, options: argparse.Namespace) -> Record:
    model = f"a Llama of {options.blocks} blocks, width {WIDTH}, {size / 1e9:.1f} GB, random weights"
    command = f"python research/limits.py --blocks {options.blocks} --gigabytes {options.gigabytes:g} {name}"
    place = {"table": "limits", "arm": name, "command": command, "model": model, "text": None, "calibration": None}
    return {**place, "numbers": numbers | {"limit_gigabytes": options.gigabytes}, **provenance()}


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """Return the command line of each stage by its name, in the order that they build on each other."""
    asked, small = folder / "grids.json", folder / "small"
    asked.write_text(json.dumps(GRIDS))
    settings = [word for setting in TEXT for word in ("--set", setting)]
    lines = {
        "plan": ["plan", str(model), "gptq-4-g64"],
        "eval": ["eval", str(model), *WINDOWS],
        "compress by a recipe": ["compress", str(model), "gptq-4-g64", "-o", str(folder / "gptq"), *settings],
        "compress to 3.5 bits": ["compress", str(model), str(asked), "-o", str(small)],
        "eval beside the dense model": ["eval", str(small), "--against", str(model), *WINDOWS],
        "verify": ["verify", str(small), "--against", str(model), *WINDOWS],
    }
    whole = {name: [sys.executable, "-m", "llmcompress", *words] for name, words in lines.items()}
    return whole | {"load and generate": [sys.executable, "-c", GENERATE, str(small)]}


def limited(words: list[str], limit: int) -> tuple[Record, int]:
    """Run a command with at most `limit` bytes of memory; return its peak and its time, and its exit code."""
    started = time.monotonic()
    with group(limit) as (processes, peak):
        enter = f'echo $$ > {processes} && exec "$@"'
        code = subprocess.run(["bash", "-c", enter, "-", *words], stdout=subprocess.DEVNULL).returncode
        most = int(peak.read_text())
    return {"peak_gigabytes": most / 1e9, "minutes": (time.monotonic() - started) / 60}, code


@contextmanager
def group(limit: int) -> Iterator[tuple[Path, Path]]:
    """Make a control group for as long as the context lasts; yield the files of its processes and of its peak."""
    old = GROUPS / "memory"
    place = (old if old.is_dir() else GROUPS) / "llmcompress-limits"
    try:
        place.mkdir(exist_ok=True)
        (place / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"{place} cannot be made ({error}); run this where control groups can be written") from error
    try:
        yield place / "cgroup.procs", place / ("memory.max_usage_in_bytes" if old.is_dir() else "memory.peak")
    finally:
        place.rmdir()


MAKE = f"""
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig
from llmcompress.models.dense.locate import locate
folder, blocks = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(locate("smollm2").folder)
tokenizer.save_pretrained(folder)
sizes = dict(hidden_size={WIDTH}, intermediate_size={INNER}, num_attention_heads={HEADS}, head_dim={HEAD},
             num_key_value_heads={HEADS // 4}, num_hidden_layers=blocks, vocab_size=len(tokenizer))
LlamaConfig(**sizes, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
shapes = {{"self_attn.q_proj": ({WIDTH}, {WIDTH}), "self_attn.k_proj": ({WIDTH // 4}, {WIDTH}),
          "self_attn.v_proj": ({WIDTH // 4}, {WIDTH}), "self_attn.o_proj": ({WIDTH}, {WIDTH}),
          "mlp.gate_proj": ({INNER}, {WIDTH}), "mlp.up_proj": ({INNER}, {WIDTH}), "mlp.down_proj": ({WIDTH}, {INNER})}}
norms = ("input_layernorm", "post_attention_layernorm")
files = {{}}
def write(name, tensors):
    save_file(tensors, folder / name, metadata={{"format": "pt"}})
    files.update(dict.fromkeys(tensors, name))
def matrix(out, width):
    return (torch.randn(out, width) * 0.7 / width**0.5).bfloat16()
torch.manual_seed(0)
for block in range(blocks):
    path = f"model.layers.{{block}}"
    tensors = {{f"{{path}}.{{name}}.weight": matrix(*shape) for name, shape in shapes.items()}}
    tensors |= {{f"{{path}}.{{name}}.weight": torch.ones({WIDTH}).bfloat16() for name in norms}}
    write(f"block-{{block:05}}.safetensors", tensors)
tables = {{"model.embed_tokens.weight": torch.randn(len(tokenizer), {WIDTH}).bfloat16()}}
tables |= {{"lm_head.weight": matrix(len(tokenizer), {WIDTH}), "model.norm.weight": torch.ones({WIDTH}).bfloat16()}}
write("tables.safetensors", tables)
(folder / "model.safetensors.index.json").write_text(json.dumps({{"metadata": {{}}, "weight_map": files}}))
"""


if __name__ == "__main__":
    main()
