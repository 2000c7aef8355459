"""Compress a dense model, and the same model as a mixture: does working expert by expert cost quality?

    python research/upcycled.py --data DATA [--experts 4] [--windows 16] [--jsonl FILE]

SmolLM2 becomes a Mixtral whose every expert is a copy of the block's MLP, two of them a token, chosen by a random
router. It predicts what SmolLM2 predicts, so each KL is from equal predictions. MLPs and experts alone are compressed,
to 4 bits in groups of 64, on the same tokens of WikiText-2's validation text; each expert has only its own tokens.
Scored on WikiText-2's test text; rounding stands beside GPTQ. DATA holds both files.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from records import append, provenance
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import llmcompress as lc
from llmcompress.models.dense.locate import locate

METHODS = ("gptq", "rtn")
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
ROUTER = 0.5  # standard deviation of its weights: choices differ from token to token


def main() -> None:
    """Compress and score the four arms, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows, length=1024)
    calibration = {"dataset": str(options.data / "wikitext2-valid.txt"), "samples": 16, "length": 1024, "held_out": 0}
    print("| arm | KL | perplexity |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        mixture = Path(place) / "mixture"
        upcycle(locate("smollm2").folder, mixture, options.experts)
        for shape, model, match in (("dense", "smollm2", "*.mlp.*"), ("mixture", str(mixture), "*.experts.*")):
            for method in METHODS:
                step = {"method": method, "bits": 4, "group_size": 64}
                recipe = {"version": 1, "rules": [{"match": match, "steps": [step]}], "calibration": calibration}
                made = Path(place) / f"{shape}-{method}"
                lc.compress(model, recipe, made)
                found = lc.score(str(made), protocol, against=model)
                arm = f"{shape}, {method}"
                print("| {} | {kl:.4f} ± {kl_stderr:.4f} | {perplexity:.3f} |".format(arm, **found), flush=True)
                if options.jsonl:
                    append(options.jsonl, record(arm, found, calibration, options))


def upcycle(dense: Path, folder: Path, experts: int, anew: float = 0.0) -> None:
    """Write a mixture that predicts what a dense Llama predicts; weights of the two chosen experts add up to one.

    `anew`: share of the neurons of each expert, other ones in each, that are drawn again with the mean and the spread
    of their matrices (2502.19261), so that experts differ before they learn.
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    shared = {name: getattr(model.config, name) for name in SHARED}
    config = MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None)
    torch.manual_seed(0)
    drawn = torch.Generator().manual_seed(1)  # apart, so that routers do not depend on what is drawn again
    mixture = MixtralForCausalLM(config).bfloat16()
    mixture.load_state_dict(model.state_dict(), strict=False)
    for old, new in zip(model.model.layers, mixture.model.layers, strict=True):
        joined = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
        with torch.no_grad():
            new.mlp.experts.gate_up_proj.copy_(joined.expand_as(new.mlp.experts.gate_up_proj))
            new.mlp.experts.down_proj.copy_(old.mlp.down_proj.weight.expand_as(new.mlp.experts.down_proj))
            new.mlp.gate.weight.normal_(std=ROUTER)
            for gate_up, down in zip(new.mlp.experts.gate_up_proj, new.mlp.experts.down_proj, strict=True):
                neurons = torch.randperm(down.shape[1], generator=drawn)[: round(anew * down.shape[1])]
                for matrix in (*gate_up.chunk(2), down.T):
                    matrix[neurons] = matrix[neurons].normal_(matrix.mean(), matrix.std(), generator=drawn)
    mixture.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


def record(arm: str, found: dict[str, Any], calibration: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of an arm."""
    said = f"--data DATA --experts {options.experts} --windows {options.windows}"
    return {
        "table": "upcycled",
        "arm": arm,
        "command": f"python research/upcycled.py {said}",
        "model": f"smollm2, and as {options.experts} equal experts, two a token",
        "text": f"WikiText-2 test, {options.windows} windows of 1024",
        "calibration": calibration | {"dataset": "wikitext2-valid.txt"},
        "numbers": {name: found[name] for name in ("kl", "kl_stderr", "perplexity")},
        **provenance(),
    }


if __name__ == "__main__":
    main()
