"""No command is silent: its longest silence on a tiny model whose every piece of work takes long.

No time passes. A clock that the display reads is set forward by SLOW seconds with each piece of work: a forward or a
backward of a block, a tensor that is read, a matrix that is compressed, a file that is digested.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import llmcompress as lc
from llmcompress.benchmark import measure
from llmcompress.cli import terminal
from llmcompress.cli.app import app
from llmcompress.cli.stages import HEARTBEAT
from llmcompress.compression import layers, step_timing
from llmcompress.formats.gguf import write
from llmcompress.kernels.cpu import build
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.files import compressed, tensor_files
from llmcompress.runtime import progress
from tests.benchmark.test_bench import StandIn
from tests.formats.gguf_files import tiny_llama
from tests.tiers import tiered

SLOW = 25.0  # seconds of a piece of work
MOST = 32  # pieces of work between two counts: no more than two blocks take
WORK: list[tuple[Any, str]] = [
    (LlamaDecoderLayer, "forward"),
    (torch.autograd, "grad"),
    (torch.Tensor, "backward"),
    (DenseModel, "read"),
    (compressed.CompressedCheckpoint, "read"),
    (compressed.CompressedCheckpoint, "expression"),
    (layers, "apply_to_run"),
    (step_timing, "time_steps"),
    (build, "compile_kernel"),
    (tensor_files, "save_file"),
    (progress, "sha256"),
    (write, "pack_tensor"),
    (StandIn, "ask"),
]
TEXT = "Rain fell on the roofs of harbour {}, and boats lay still all night long.\n"
BASE = {"version": 1, "name": "one", "calibration": {"dataset": "text.txt", "samples": 12, "length": 48, "held_out": 4}}
BYTE = {"method": "rtn", "bits": 7}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"rules": [{"match": "*_proj", "steps": [BYTE]}]},
    "terms": {"rules": [{"match": "*_proj", "steps": [BYTE, {"method": "svd", "rank": 3}]}]},
    "aimed": {
        "options": [[{"method": "rtn", "bits": bits}] for bits in (2, 3, 4)],
        "token_weights": {"by": "gradient"},
    },
}
READ = ("--text", "text.txt", "--windows", "4", "--length", "48")
COMMANDS = {
    "compress": "compress dense plain.yaml -o OUT",
    "tune": "compress dense plain.yaml --tune -o OUT",
    "target": "compress dense aimed.yaml --bpw 3.2 -o OUT",
    "plan": "plan dense plain.yaml",
    "unpack": "plan gguf/model.gguf plain.yaml",
    "eval": "eval small --against dense --tasks llmcompress_pairs --limit 4 READ",
    "compare": "compare dense small READ",
    "drift": "drift small --against dense READ",
    "verify": "verify small --against dense READ",
    "inspect": "inspect small",
    "distill": "distill small scales-norms --teacher dense --quick -o OUT --set data.dataset=text.txt "
    "--set data.length=48 --set data.samples=12",
    "dense": "export small --to dense -o OUT",
    "gguf": "export small --to gguf -o OUT",
    "similarity": "drop dense --count 1 --text text.txt -o OUT",
    "damage": "drop dense --count 1 --by damage --text text.txt -o OUT",
    "narrow": "narrow dense --neurons 0.5 --text text.txt --samples 9 -o OUT",
    "shrink": "shrink terms --rank 2 -o OUT",
    "frontier": "frontier dense aimed.yaml --bpw 3.2,3.6 -o OUT READ",
    "bench": "bench dense --prompt 8 --tokens 2 --rounds 2 --threads 1",
}
FAST = ("compress",)
OFTEN = ("target", "plan", "unpack", "eval", "verify", "distill", "gguf", "damage", "bench")


class SlowClock:
    """A clock that work sets forward, and reading by a microsecond. `done`: pieces of work since the last line."""

    def __init__(self) -> None:
        self.now, self.done = time.monotonic(), 0
        self.beat: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def slow(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return the work, slowed."""

        def run(*args: Any, **settings: Any) -> Any:
            result = work(*args, **settings)
            self.now += SLOW
            self.done += 1
            self.beat()
            return result

        return run


class Pipe(io.StringIO):
    """Standard error. `silence`: the longest, in seconds; `work`: the most pieces between two lines."""

    def __init__(self, clock: SlowClock) -> None:
        super().__init__()
        self.clock, self.last, self.silence, self.work = clock, clock(), 0.0, 0

    def write(self, text: str) -> int:
        """Measure the silence that a text ends."""
        now = self.clock()
        self.silence, self.work = max(self.silence, now - self.last), max(self.work, self.clock.done)
        self.last, self.clock.done = now, 0
        return super().write(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks, a text and recipes."""
    folder = tmp_path_factory.mktemp("silence")
    tiny_llama(folder / "dense", num_hidden_layers=4, max_position_embeddings=128, dtype=torch.bfloat16)
    (folder / "text.txt").write_text("".join(map(TEXT.format, range(400))))
    for name, more in RECIPES.items():
        (folder / f"{name}.yaml").write_text(json.dumps(BASE | more))
    return folder


def make_inputs(command: str) -> None:
    """Make the checkpoints and the GGUF file that a command reads, once, in the working folder."""
    for name, recipe in (("small", "plain"), ("terms", "terms")):
        if f" {name} " in f"{command} " and not Path(name).exists():
            lc.compress("dense", f"{recipe}.yaml", name)
    if "gguf/" in command and not Path("gguf").exists():
        lc.export(lc.compress("dense", "plain.yaml", "packed").folder, "gguf", "gguf")


def run_slowly(command: str, output: Path, monkeypatch: pytest.MonkeyPatch, beats: bool) -> Pipe:
    """Run a command whose work is slow. `beats`: True if the display looks at the clock after each piece of work."""
    clock = SlowClock()

    def beating(beat: Callable[[], None]) -> AbstractContextManager[None]:
        clock.beat = beat if beats else clock.beat
        return nullcontext()

    for owner, name in WORK:
        monkeypatch.setattr(owner, name, clock.slow(getattr(owner, name)))
    monkeypatch.setattr(measure, "Worker", StandIn)
    monkeypatch.setattr(StandIn, "log", [], raising=False)
    monkeypatch.setattr(terminal, "beating", beating)
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr("sys.stderr", pipe := Pipe(clock))
    app(COMMANDS[command].replace("READ", " ".join(READ)).replace("OUT", str(output)).split(), standalone_mode=False)
    pipe.write("")  # the end
    return pipe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "beats", [pytest.param(True, id="seconds", marks=pytest.mark.nightly), pytest.param(False, id="counts")]
)
@pytest.mark.parametrize("command", tiered(COMMANDS, FAST.__contains__, slow=OFTEN.__contains__))
def test_the_longest_silence(
    command: str, beats: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a minute and a piece of work; and where the display is not woken, counts alone show that work goes on."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", str(tmp_path / "kernels"))
    make_inputs(COMMANDS[command])
    build.load_kernel.cache_clear()
    pipe = run_slowly(command, tmp_path / "out", monkeypatch, beats)
    said = pipe.getvalue()
    if beats:
        assert pipe.silence < HEARTBEAT + SLOW + 1, said
    assert pipe.work <= MOST, said
