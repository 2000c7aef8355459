"""Work of each process of `tests/distillation/test_processes.py`: the jobs of a file, one distillation after another.

    torchrun ... launched.py JOBS ANSWERS

JOBS: a JSON list of {student, teacher, recipe, output, a free port, and optionally stop: [process, step]}; the student
may be a list with one for each process.
Each process writes what came of each job into the folder ANSWERS, how much it held of the models, and how much memory
of its own it took until they were loaded.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llmcompress.distillation import train
from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.objective import chunked_loss
from llmcompress.distillation.parallel.strategy import Strategy
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.model import Student
from llmcompress.errors import LLMCompressError, Termination

RANK = int(os.environ.get("RANK", "0"))
CLOCK = SimpleNamespace(monotonic=lambda: time.monotonic() * 10 ** (8 * RANK))  # the second process's runs ahead
PARTITIONED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
# DeepSpeed remembers the process groups that it made, so they stay for all jobs
ONE_GROUP = mock.patch.object(PartialState, "destroy_process_group") if PARTITIONED else nullcontext()


def partition() -> None:
    """Has DeepSpeed run here: Accelerate takes it on GPUs only, and on CPUs it would compile a way to share memory."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    PartialState(cpu=True)
    Accelerator()


# below those that the system gives to connections, of which one might take a port before its turn comes
PORTS = iter(random.sample(range(20000, 32000), 1000))


def free_port() -> int:
    """A port that nobody listens on, another at every call."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("every port that was tried is taken")


def shares(parameters: Iterable[torch.Tensor]) -> dict[str, int]:
    """Count the numbers, those of them that are here, and the parameters that are not sharded."""
    found = list(parameters)
    here = [value.to_local() if isinstance(value, DTensor) else value for value in found]
    whole = sum(not isinstance(value, DTensor) for value in found)
    return {"all": sum(map(torch.numel, found)), "here": sum(map(torch.numel, here)), "whole": whole}


def digest(*models: torch.nn.Module) -> str:
    """The digest of all parameters and buffers, gathered where they are shared out: equal for equal bits."""
    found = sha256()
    for model in models:
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            found.update(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Memory(threading.Thread):
    """Watches the memory that this process shares with nobody, in bytes: what it has written, and no mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = self.now()
        self.ends = threading.Event()

    @staticmethod
    def now() -> int:
        """The bytes at this moment; 0 where the system does not say."""
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        """Look, until it ends."""
        while not self.ends.wait(0.005):
            self.most = max(self.most, self.now())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job and return what came of it in this process."""
    runs: list[TrainContext] = []
    held: dict[str, Any] = {}
    seen: list[int] = []
    memory = Memory()
    memory.start()
    look, choose = train.evaluate_held_out, train.choose_strategy

    def beginning(accelerator: Accelerator) -> Callable[..., Strategy]:
        def begin(_: Accelerator, student: Student, teacher: Any, *more: Any) -> Strategy:
            memory.ends.set()
            parts = [*student.model.parameters(), *student.model.buffers(), *teacher.parameters()]
            held["bytes"] = sum(value.numel() * value.element_size() for value in parts)
            strategy = choose(accelerator)(accelerator, student, teacher, *more)
            held.setdefault("digest", digest(student.model, teacher))
            return strategy

        return begin

    def remembering(given: TrainContext, step: int) -> dict[str, float]:
        runs.append(given)
        return look(given, step)

    def progress(done: int, *_: Any) -> None:
        seen.append(done)
        if runs:
            student, teacher = runs[-1].student.model, runs[-1].teacher
            held["student"], held["teacher"] = shares(student.parameters()), shares(teacher.parameters())
            held["payloads"] = shares(value for value in student.parameters() if value.dtype == torch.uint8)
            if PARTITIONED:
                groups = runs[-1].accelerator.deepspeed_engine_wrapped.engine.optimizer.param_groups
                held["pieces"] = sum(piece.numel() for group in groups for piece in group["params"])
            held["blocks"] = [sum(isinstance(m, FSDPModule) for m in model.modules()) for model in (student, teacher)]
        if job.get("stop") == [RANK, done]:
            os.kill(os.getpid(), signal.SIGTERM)

    if "RANK" in os.environ:  # a process group of its own for every job
        os.environ.update(MASTER_PORT=str(job["port"]), TORCHELASTIC_USE_AGENT_STORE="False")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # Accelerate shards on GPUs only, FSDP2 itself anywhere
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    if PARTITIONED:
        partition()
    try:
        chunked = mock.patch.object(chunked_loss, "LOGITS_ON_CPU", 2**12)  # so that heads work on several chunks
        with (
            chunked,
            ONE_GROUP,
            mock.patch.object(train, "evaluate_held_out", remembering),
            mock.patch.object(train, "choose_strategy", beginning),
            mock.patch.object(train, "time", CLOCK),
        ):
            student = job["student"] if isinstance(job["student"], str) else job["student"][RANK]
            done = distill(student, job["teacher"], job["recipe"], job["output"], progress=progress)
        found = done.to_json()
    except (LLMCompressError, Termination) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    if torch.distributed.is_initialized() and not PARTITIONED:
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    memory.ends.set()
    return {**found, "held": {**held, "memory": memory.most - memory.before}, "seen": seen}


if __name__ == "__main__":
    results = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    (Path(sys.argv[2]) / f"{RANK}.json").write_text(json.dumps(results))
    os._exit(0)  # stores of earlier groups would wait for each other at the end of the interpreter
