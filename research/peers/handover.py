"""The part that the peers' scripts share: what they are given and the folder that they hand over to score.py.

It runs in every peer's environment, so it needs torch, transformers and safetensors, and nothing of llmcompress. The
folder is an ordinary dense Hugging Face folder in float32, the decoder's linears being what the peer's codes are worth
and all else as it was but for scales that the peer moved into norms, with a `peer.json` beside the weights: what it is,
its true bits, time and memory, versions.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

Found = TypeVar("Found")
WEIGHTS = "model.safetensors"


def parser(about: str | None, arms: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of every peer."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    found.add_argument("--tokens", type=Path, required=True, help="safetensors with `sequences` [n, length] int64")
    found.add_argument("--arm", choices=list(arms), required=True)
    found.add_argument("--out", type=Path, required=True, help="folder to write")
    found.add_argument("--threads", type=int, default=1)
    return found


def loaded(given: argparse.Namespace, dtype: str) -> Any:
    """The dense model in evaluation mode; torch is told the number of threads."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    chosen = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(given.model, dtype=chosen, local_files_only=True).eval()


def sequences(given: argparse.Namespace) -> Tensor:
    """The calibration tokens [n, length], int64."""
    from safetensors.torch import load_file

    return load_file(given.tokens)["sequences"]


def decoder_linears(model: nn.Module) -> dict[str, Any]:
    """The linears of the decoder's blocks by module path; embedding and head stay as they are."""
    return {name: part for name, part in model.named_modules() if name.endswith("_proj")}


def timed(work: Callable[[], Found]) -> tuple[Found, dict[str, Any]]:
    """Return the result of `work`, its wall time, its processor time and the process's peak memory up to its end."""
    begun, cpu_begun = time.monotonic(), time.process_time()
    found = work()
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu_begun
    return found, {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes() -> int:
    """Largest resident size so far. VmHWM starts afresh at exec; ru_maxrss, the fallback, keeps the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hand_over(
    given: argparse.Namespace,
    tool: str,
    packages: Iterable[str],
    weights: dict[str, Tensor],
    facts: dict[str, Any],
    vectors: dict[str, Tensor] | None = None,
) -> None:
    """Writes the folder and prints its peer.json as one line, the last of standard output.

    `weights`: module path -> dense [out, in], for every linear of the decoder. `facts` holds the `bits` of them all and
    what `timed` found. `vectors`: norms and biases that the peer has changed too, by their names in the file. Raises
    ValueError for tensors that are not those of the model.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.float() for name, tensor in load_file(given.model / WEIGHTS).items()}
    expected = {name for name in tensors if name.endswith("_proj.weight")}
    dense = {
        f"{name}.weight": weight.detach().to("cpu", torch.float32).contiguous() for name, weight in weights.items()
    }
    if dense.keys() != expected or any(dense[name].shape != tensors[name].shape for name in expected):
        raise ValueError(f"these are not exactly the decoder's linears, as the model has them: {sorted(dense)}")
    moved = {name: vector.detach().to("cpu", torch.float32) for name, vector in (vectors or {}).items()}
    if strange := [name for name in moved if name not in tensors or moved[name].shape != tensors[name].shape]:
        raise ValueError(f"the model has no {strange[0]} of this shape")
    copy_texts(given)
    config = given.out / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    save_file(tensors | moved | dense, given.out / WEIGHTS, {"format": "pt"})
    count = sum(tensor.numel() for tensor in dense.values())
    size = {"weights": count, "bits": facts["bits"], "bpw": facts["bits"] / count, "bytes": facts["bits"] / 8}
    versions = {name: metadata.version(name) for name in ("torch", *packages)}
    report = {"tool": tool, "arm": given.arm} | facts | size | {"threads": torch.get_num_threads()}
    line = json.dumps(report | {"versions": versions})
    (given.out / "peer.json").write_text(line + "\n")
    print(line, flush=True)


def copy_texts(given: argparse.Namespace) -> None:
    """Copies config and tokenizer into the folder that is handed over."""
    given.out.mkdir(parents=True, exist_ok=True)
    for file in given.model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json"):
            shutil.copy(file, given.out)


def grouped_bits(weights: Iterable[Tensor], code: int, group: int, beside: int) -> int:
    """Bits of codes of `code` bits, and `beside` bits for each group of columns; a row's last group may be short."""
    return sum(rows * (code * columns + beside * -(-columns // group)) for rows, columns in (w.shape for w in weights))
