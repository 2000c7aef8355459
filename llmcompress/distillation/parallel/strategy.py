"""The ways in which processes hold the models that train.

- `Strategy`: a process alone, or data parallel (DDP): every process has all; gradients are averaged over processes.
- `ShardedStrategy` (`fsdp.py`): every process has a share of the models and of the optimizer's state.
- `PartitionedStrategy` (`deepspeed.py`): every process has whole models, and a share of the optimizer's state.

A state is one file with whole tensors, whatever the number of processes and the strategy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.optimizers import moments, put_moments
from llmcompress.distillation.parallel.launch import is_sharded
from llmcompress.distillation.resume import Progress, last_state, save_state
from llmcompress.distillation.student.model import Student
from llmcompress.distillation.student.oscillation import Freezer
from llmcompress.errors import InputError
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.skeleton import MULTIMODAL, auto_name
from llmcompress.models.files.store import Store
from llmcompress.recipe.sections import Freezing
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Root(nn.Module):
    """The models that are prepared together. Its forward runs a function, while whatever is outside of blocks is
    whole."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # where Accelerate looks for the names of blocks' classes
        self._no_split_modules = sorted(_block_classes(self))

    def forward(self, run: Callable[[], T]) -> T:
        """Return the result of `run`. Every process has to run the same blocks in the same order."""
        return run()


def _block_classes(module: nn.Module) -> set[str]:
    """Return the class names of decoder blocks in the models inside `module`, as transformers lists them."""
    inside = list(module.modules())
    named = {name for each in inside for name in getattr(each, "_no_split_modules", None) or ()}
    return named & {type(each).__name__ for each in inside}


class Strategy:
    """A student that trains, its objective and its optimizer, in one process or whole in each of several.

    `objective` holds the student but not the teacher; `freezer`: of codes that oscillate.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        teacher: PreTrainedModel,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        freezing: Freezing | None = None,
    ) -> None:
        self.accelerator, self.student, self.optimizer = accelerator, student, optimizer
        self.objective = objective
        self.wrap(teacher)
        self.freezer = Freezer.of(freezing, student.relaxed)

    def wrap(self, teacher: PreTrainedModel) -> None:
        """Wrap the objective, or distribute the models, over the processes."""
        if self.accelerator.num_processes > 1:
            if self.accelerator.ddp_handler is not None:  # a step of text may leave experts out, and what sees images
                model = self.student.model
                partial = bool(experts_of(model)) or auto_name(model.config) == MULTIMODAL
                self.accelerator.ddp_handler.find_unused_parameters = partial
            self.objective = self.accelerator.prepare(self.objective)

    def evaluate(self, run: Callable[[], T]) -> T:
        """Return the result of `run`, which uses the models in any way that needs no gradient."""
        return run()

    def measure(self, batch: Batch, weights: list[float]) -> tuple[Tensor, Tensor]:
        """Return the objective's (total, report), with gradient if that is on."""
        result: tuple[Tensor, Tensor] = self.objective(batch, weights)
        return result

    def backward(self, total: Tensor) -> None:
        """Add the gradients of a share of the objective; they are sums over processes, which wrappers average."""
        total = total * self.accelerator.num_processes
        total.backward()

    def no_sync(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for one part of a step; processes exchange gradients after the `last` part only."""
        if last or self.accelerator.num_processes == 1:
            return nullcontext()
        waiting: AbstractContextManager[None] = self.accelerator.no_sync(self.objective)
        return waiting

    def gradient_norm(self) -> float:
        """Return the norm of the current gradients over all parameters, and remove them."""
        norm = self._clip_gradients(math.inf)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def step(self, most: float) -> float:
        """Step the optimizer, with gradients scaled so that their norm over all parameters is at most `most`.

        Returns the norm before scaling, without gradients of frozen codes. If it is not finite, nothing moves.
        """
        norm = self._clip_gradients(most)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip_gradients(self, most: float) -> float:
        self.freezer.hold()
        parameters = self.student.named_parameters().values()
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, most)))

    def update(self, done: float) -> dict[str, int]:
        """Update the codes after a step, when a share `done` of all steps is done.

        If oscillating codes are frozen, returns how many codes changed, turned and are frozen, over all processes.
        """
        self.student.settle()
        counts = self.freezer.watch(done)
        if self.freezer.settings is None:
            return {}
        return dict(zip(("changed", "turned", "frozen"), self.sum_counts(counts).tolist(), strict=True))

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Return the counts of codes over all processes."""
        return counts

    def save(self, store: Store, progress: Progress) -> None:
        """Save the state, in the first process. Raises DiskError if it cannot be written."""
        tensors, histories = {}, self.freezer.state()
        for name, parameter in self.student.named_parameters().items():
            state = {**self.moments(parameter), **histories.get(name, {})}
            for key, value in {"value": parameter.detach(), **state}.items():
                whole = full_tensor(value)
                if self.accelerator.is_main_process:
                    tensors[f"{key}.{name}"] = whole.cpu().contiguous()
        if self.accelerator.is_main_process:
            save_state(store, progress, tensors)

    def load(self, store: Store) -> Progress:
        """Put the last state back, which the first process reads. Returns a new `Progress` if there is none.

        Raises InputError, in every process, for the state of another run or a damaged one.
        """
        message: list[Any] = [Progress(), {}]  # and the form of each tensor, by key and the parameter's name
        tensors: dict[str, Tensor] = {}
        if self.accelerator.is_main_process:
            try:
                message[0], tensors = last_state(store)
            except InputError as error:
                message[0] = error
            for full_name, tensor in tensors.items():
                key, _, name = full_name.partition(".")
                message[1].setdefault(name, {})[key] = torch.empty_like(tensor, device="meta")
        broadcast_object_list(message)
        progress, forms = message
        if isinstance(progress, InputError):
            raise progress
        histories = self.freezer.state()
        for name, parameter in self.student.named_parameters().items() if progress.step else ():
            state = {
                key: self._share(parameter, form, tensors.get(f"{key}.{name}")) for key, form in forms[name].items()
            }
            with torch.no_grad():
                parameter.copy_(state.pop("value"))
                for key, value in histories.get(name, {}).items():
                    value.copy_(state.pop(key))
            self.put_moments(parameter, state)
        return progress

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer's state of a parameter, shaped and shared out as that is."""
        return moments(self.optimizer, parameter)

    def put_moments(self, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Put saved `moments` of a parameter back."""
        put_moments(self.optimizer, parameter, saved)

    def gather(self) -> None:
        """Make the student's parameters whole after the last step, and let go of what wraps them."""

    def _share(self, like: Tensor, form: Tensor, whole: Tensor | None) -> Tensor:
        """Return this process's share of `whole`, which the first process has, distributed as `like`.

        `form`: without values. A count of steps is in the host's memory.
        """
        device = self.accelerator.device
        value = torch.empty_like(form, device=device) if whole is None else whole.to(device)
        if self.accelerator.num_processes > 1:
            value = broadcast(value)
        if not value.ndim:
            return value.cpu()
        if isinstance(like, DTensor):
            return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return value


@contextmanager
def hold_decoded(accelerator: Accelerator, student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[None]:
    """Hold compressed linears that do not train decoded: all of them, or of sharded models the heads alone.

    Enter it before the strategy starts. Blocks of a compressed teacher that is sharded are decoded whenever they run.
    """
    models: list[nn.Module] = [student, teacher]
    if is_sharded(accelerator):
        models = [model.get_output_embeddings() for model in (student, teacher)]
    with decoded(models[0]), decoded(models[1]):
        yield


def full_tensor(value: Tensor) -> Tensor:
    """Return the whole of a tensor, which may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
