"""The ways in which processes hold the models that train: whole and alone, whole in each of several, or in shares.

- alone: nothing is wrapped.
- data parallel (DDP): every process has all; gradients are averaged over processes.
- sharded (FSDP2): every process has a share of each parameter, of the student, of the frozen teacher, and of what the
  optimizer remembers of it. Decoder blocks are gathered one at a time while they run. What is outside of them (tables,
  last norms, heads) is gathered for the length of a forward and its backward, so that heads can be used in any way.
  Buffers are not shared out: the packed numbers of a relaxed layer that do not train are in every process, at the bits
  they are stored with, and so is a compressed head, decoded. The first process reads the models into the host's memory,
  and the others get their shares from it (`fsdp_shards`).
- partitioned (DeepSpeed): every process has whole models, and a share of the optimizer's state (`zero`).

A state is one file with whole tensors, whatever the number of processes and the way they hold the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.optimizers import moments, put_moments
from llmcompress.distillation.parallel.deepspeed import ZeroPartition
from llmcompress.distillation.parallel.fsdp_shards import share_out, taken_whole
from llmcompress.distillation.parallel.launch import is_given, partitioned, sharded
from llmcompress.distillation.resume import Progress, last_state, save_state
from llmcompress.distillation.student.model import PROJECTIONS, Student
from llmcompress.distillation.student.oscillation import Freezer
from llmcompress.errors import InputError
from llmcompress.models.files.store import Store
from llmcompress.recipe.sections import Freezing
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Root(nn.Module):
    """The models that are prepared together.

    Its forward runs a function, while what is sharded outside of blocks is gathered.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # where Accelerate looks for the names of blocks' classes
        self._no_split_modules = sorted(_block_classes(self))

    def forward(self, run: Callable[[], T]) -> T:
        """Return what `run` does; every process has to run the same blocks in the same order."""
        return run()


@dataclass(frozen=True, eq=False)
class Engine:
    """A student that trains, its objective and its optimizer, as the processes of `accelerator` hold them."""

    accelerator: Accelerator
    student: Student
    optimizer: torch.optim.Optimizer
    objective: nn.Module  # to call; wrapped by DDP where that averages gradients
    freezer: Freezer  # of codes that oscillate
    root: Root | None = None  # of what is sharded
    zero: ZeroPartition | None = None  # where the optimizer's part is partitioned

    @staticmethod
    def of(
        accelerator: Accelerator,
        student: Student,
        teacher: PreTrainedModel,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        freezing: Freezing | None = None,
    ) -> Engine:
        """Wrap or shard, according to the launcher. `objective` holds the student but not the teacher.

        Sharding replaces the parameters of the models, of `student` and of `optimizer`; partitioning those of
        `optimizer` alone.
        """

        def freezer() -> Freezer:
            return Freezer.of(freezing, student.relaxed)

        if sharded(accelerator):
            root = Root(objective, teacher)
            whole = taken_whole(accelerator, root)
            accelerator.prepare(root, optimizer)
            share_out(accelerator, root, whole)
            student.rebind_parameters()
            return Engine(accelerator, student, optimizer, objective, freezer(), root)
        if partitioned(accelerator):
            zero = ZeroPartition.of(accelerator, Root(objective), optimizer)
            return Engine(accelerator, student, optimizer, objective, freezer(), zero=zero)
        if accelerator.num_processes > 1:
            objective = accelerator.prepare(objective)
        return Engine(accelerator, student, optimizer, objective, freezer())

    def within(self, run: Callable[[], T]) -> T:
        """Return what `run` does, which uses the models in any way that needs no gradient."""
        if self.root is None:
            return run()
        with torch.no_grad():
            found: T = self.root(run)
        cast(FSDPModule, self.root).reshard()
        return found

    def measure(self, batch: Batch, weights: list[float]) -> tuple[Tensor, Tensor]:
        """Return the objective's (total, report), with gradient if that is on."""

        def run() -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.objective(batch, weights)
            return found

        if self.zero is not None:
            return self.zero.forward(run)
        return run() if self.root is None else cast(tuple[Tensor, Tensor], self.root(run))

    def backward(self, total: Tensor) -> None:
        """Add the gradients of a share of the objective; they are sums over processes, which wrappers average."""
        total = total * self.accelerator.num_processes
        if self.zero is None:
            total.backward()
        else:
            self.zero.backward(total)

    def no_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for one part of a step; processes exchange gradients after the `last` part only."""
        if self.root is not None:
            cast(FSDPModule, self.root).set_requires_gradient_sync(last)
            return nullcontext()
        if self.zero is not None:
            self.zero.no_sync(last)
            return nullcontext()
        if last or self.accelerator.num_processes == 1:
            return nullcontext()
        waiting: AbstractContextManager[None] = self.accelerator.no_sync(self.objective)
        return waiting

    def gradient_norm(self) -> float:
        """Return the norm of the gradients that are there, over all parameters, and remove them; not where they are
        partitioned."""
        norm = self._clipped(math.inf)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def step(self, most: float) -> float:
        """Step the optimizer, with gradients scaled so that their norm over all parameters is at most `most`.

        Returns the norm before scaling, without gradients of frozen codes. If it is not finite, nothing moves.
        """
        if self.zero is not None:
            return self.zero.step(most)
        norm = self._clipped(most)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clipped(self, most: float) -> float:
        """Scale gradients so that their norm is at most `most`, and return it as it was; those of frozen codes go."""
        self.freezer.hold()
        return float(_whole(torch.nn.utils.clip_grad_norm_(self.student.named().values(), most)))

    def update(self, done: float) -> dict[str, int]:
        """Update the codes after a step, when a share `done` of all steps is done.

        Where oscillating codes are frozen: how many codes changed, turned and are frozen, over all processes.
        """
        self.student.settle()
        counts = self.freezer.watch(done)
        if self.zero is not None:
            self.zero.take_up()
        if self.freezer.asked is None:
            return {}
        if self.root is not None:
            counts = self.accelerator.reduce(counts.to(self.accelerator.device), "sum")
        return dict(zip(("changed", "turned", "frozen"), counts.tolist(), strict=True))

    def save(self, store: Store, progress: Progress) -> None:
        """Keep the state, by the first process. Raises DiskError where it cannot be written."""
        tensors, habits = {}, self.freezer.state()
        for name, parameter in self.student.named().items():
            known = {**self._moments(parameter), **habits.get(name, {})}
            for key, value in {"value": parameter.detach(), **known}.items():
                found = _whole(value)
                if self.accelerator.is_main_process:
                    tensors[f"{key}.{name}"] = found.cpu().contiguous()
        if self.accelerator.is_main_process:
            save_state(store, progress, tensors)

    def load(self, store: Store) -> Progress:
        """Put the last state back, which the first process reads; a new `Progress` where there is none.

        Raises InputError for another run's, or damage, in every process.
        """
        found: list[Any] = [Progress(), {}]
        tensors: dict[str, Tensor] = {}
        if self.accelerator.is_main_process:
            try:
                found[0], tensors = last_state(store)
            except InputError as error:
                found[0] = error
            for whole, tensor in tensors.items():
                key, _, name = whole.partition(".")
                found[1].setdefault(name, {})[key] = torch.empty_like(tensor, device="meta")
        broadcast_object_list(found)
        progress, kept = found
        if isinstance(progress, InputError):
            raise progress
        habits = self.freezer.state()
        for name, parameter in self.student.named().items() if progress.step else ():
            forms = kept[name].items()
            shares = {key: self._share(parameter, form, tensors.get(f"{key}.{name}")) for key, form in forms}
            with torch.no_grad():
                parameter.copy_(shares.pop("value"))
                for key, value in habits.get(name, {}).items():
                    value.copy_(shares.pop(key))
            self._put_moments(parameter, shares)
        if self.zero is not None:
            self.zero.take_up()
        return progress

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what the optimizer remembers of a parameter, shaped and shared out as that is."""
        if self.zero is None or parameter not in self.zero.pieces:  # as scales that follow their latents
            return moments(self.optimizer, parameter)
        pieces = moments(self.optimizer, self.zero.pieces[parameter])
        return {key: self.zero.whole(value, parameter) if value.ndim else value for key, value in pieces.items()}

    def _put_moments(self, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Put saved `_moments` of a parameter back."""
        if self.zero is None or parameter not in self.zero.pieces:
            put_moments(self.optimizer, parameter, saved)
            return
        pieces = {key: self.zero.piece(value, parameter) if value.ndim else value for key, value in saved.items()}
        put_moments(self.optimizer, self.zero.pieces[parameter], pieces)

    def gather(self) -> None:
        """Make the student's parameters whole after the last step, in the host's memory if they were sharded.

        Sharded models cannot run any more afterwards. They become whole in the first process, and zeros elsewhere.
        """
        if self.zero is not None:
            self.zero.end()
        if self.root is None:
            return
        student = self.student
        trained = [name for kind, values in student.trained.items() if kind != PROJECTIONS for name in values]
        inside = tuple(f"{name}." for name in student.relaxed)
        frozen = [name for name, _ in student.model.named_parameters() if name.startswith(inside)]
        for name in dict.fromkeys([*trained, *frozen]):
            found = _whole(student.model.get_parameter(name).detach())
            holder, _, leaf = name.rpartition(".")
            kept = torch.zeros(found.shape, dtype=found.dtype) if is_given(self.accelerator) else found.cpu()
            whole = nn.Parameter(kept, requires_grad=False)
            student.model.get_submodule(holder).register_parameter(leaf, whole)
        for module in student.relaxed.values():
            module.cpu()
        student.rebind_parameters()

    def _share(self, like: Tensor, form: Tensor, whole: Tensor | None) -> Tensor:
        """Return the share of `whole` that this process holds where `like` is shared out; the first process has it, and
        all know its `form`. A count of steps is in the host's memory."""
        device = self.accelerator.device
        there = torch.empty_like(form, device=device) if whole is None else whole.to(device)
        if self.accelerator.num_processes > 1:
            there = broadcast(there)
        if not there.ndim:
            return there.cpu()
        if isinstance(like, DTensor):
            return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
        return there


@contextmanager
def held_decoded(accelerator: Accelerator, student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[None]:
    """Keep compressed linears that do not train decoded: all of them, or where models are sharded the heads alone.

    Around `Engine.of`. Blocks of a compressed teacher that is sharded are decoded whenever they run.
    """
    models: list[nn.Module] = [student, teacher]
    if sharded(accelerator):
        models = [model.get_output_embeddings() for model in (student, teacher)]
    with decoded(models[0]), decoded(models[1]):
        yield


def _block_classes(module: nn.Module) -> set[str]:
    """Return the class names of decoder blocks in the models inside `module`, as transformers lists them."""
    found = list(module.modules())
    named = {name for each in found for name in getattr(each, "_no_split_modules", None) or ()}
    return named & {type(each).__name__ for each in found}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
