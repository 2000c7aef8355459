"""From a compressed folder and its dense teacher to a recovered folder of the same format and size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from llmcompress import report as reports
from llmcompress.blocks import product_dtype
from llmcompress.checkpoint import check_output, writing
from llmcompress.distill.adapt import adapt, rounded
from llmcompress.distill.loop import Report, Run, look, train
from llmcompress.distill.objective import check_head, check_pair
from llmcompress.distill.recipe import Distillation
from llmcompress.distill.state import Keeper, Progress
from llmcompress.distill.student import Student, relaxed_student
from llmcompress.driver import copy_companions
from llmcompress.errors import InputError, RecipeError
from llmcompress.export.opened import Opened
from llmcompress.hf import table_entry
from llmcompress.locate import Place, locate
from llmcompress.modules import CompressedLinear, Layout, payload_texts, put
from llmcompress.recipe import dump, read_as
from llmcompress.source import load_model, load_tokenizer
from llmcompress.tokens import CalibrationTokens, calibration_tokens
from llmcompress.weight import bits, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "distillation.json"
RECIPE = "distillation.yaml"


@dataclass(frozen=True)
class Distilled:
    """What a distillation wrote and measured. `history`: KL to the teacher and perplexities on the held-out sequences,
    from before the first step to after the last; `tokens`: predicted while training; `bytes_before`, `bytes_after`: of
    all compressed weights, which low-rank terms that were added make larger."""

    output: str
    teacher: str
    steps: int
    tokens: int
    seconds: float
    bytes_before: int
    bytes_after: int
    trained: Mapping[str, int]  # how many numbers of each kind
    data: dict[str, Any]
    history: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, keys as in the fields."""
        return vars(self)


def distill(
    student: str | Path,
    teacher: str | Path,
    recipe: Distillation | str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    device: str = "cpu",
    progress: Report | None = None,
) -> Distilled:
    """Trains what `recipe` names in the compressed folder `student` towards `teacher`, and writes the new folder
    `output`: the same expressions at the same bytes, and the low-rank terms that it asks for besides.

    A run that was cut goes on from the last state in `<output>.training`. Raises an LLMCompressError, in one sentence,
    for whatever is wrong.
    """
    asked = read_as(Distillation, recipe)
    accelerator = _accelerator(device, asked)
    folder, target = locate(str(student)).folder, Path(output)
    opened = Opened(folder)
    check_output(target, opened.bytes)
    place = locate(str(teacher))
    tokenizer = load_tokenizer(folder)
    where = str(accelerator.device)
    pair = load_model(Place(str(student), folder), where), load_model(place, where)
    check_pair(*pair, [tokenizer.get_vocab(), load_tokenizer(place.folder).get_vocab()])
    tokens = calibration_tokens(asked.data, tokenizer, partial(load_model, place), pair[1].config)
    adapted = () if asked.adapt is None else adapt(pair[0], asked.adapt, pair[1], asked.seed)
    learning = relaxed_student(pair[0], asked.rates, asked.estimator, pair[1] if asked.latents == "teacher" else None)
    keeper = Keeper(target.with_name(target.name + ".training"), _identity(asked, tokens, opened, place))
    run = _run(asked, learning, pair[1], tokens, keeper, accelerator)
    for model in pair:
        check_head(model, run.held_out)
    measured = train(run, progress)
    layers = _settled(run, measured, adapted)
    done = _result(run, measured, tokens, target, place, opened.layouts, layers)
    if accelerator.is_main_process:
        _write(opened, layers, learning.norms(), asked, done, target)
        keeper.remove()
    accelerator.end_training()
    return done


def _accelerator(device: str, recipe: Distillation) -> Accelerator:
    """The processes that a launcher started, or this one. Raises RecipeError where a batch cannot be shared by them."""
    frozen = DistributedDataParallelKwargs(broadcast_buffers=False)  # packed codes are equal from the start
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", kwargs_handlers=[frozen])
    if recipe.batch % (recipe.micro_batch * accelerator.num_processes):
        raise RecipeError(
            f"batch {recipe.batch} cannot be shared by {accelerator.num_processes} processes in parts of "
            f"micro_batch {recipe.micro_batch}; choose a multiple of their product"
        )
    return accelerator


def _run(
    recipe: Distillation,
    student: Student,
    teacher: PreTrainedModel,
    tokens: CalibrationTokens,
    keeper: Keeper,
    accelerator: Accelerator,
) -> Run:
    dtype, kind = product_dtype(recipe.compute, accelerator.device), accelerator.device.type
    cast: nn.Module = teacher.requires_grad_(False)
    cast.to(dtype)
    if recipe.checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    first = len(tokens.sequences) - tokens.held_out
    if first < recipe.batch:
        raise InputError(
            f"{first} sequences are too few for a batch of {recipe.batch}; use more data or a smaller batch"
        )
    return Run(
        recipe,
        student,
        teacher,
        tokens.sequences[:first],
        tokens.sequences[first:],
        keeper,
        accelerator,
        partial(torch.autocast, kind, dtype, enabled=dtype != torch.float32),
    )


def _identity(recipe: Distillation, tokens: CalibrationTokens, opened: Opened, teacher: Place) -> str:
    """Of a run: equal where a state of one continues the other."""
    student = json.dumps(opened.digests, sort_keys=True)
    parts = [recipe.model_dump_json(), tokens.hash, student, teacher.name, str(teacher.revision)]
    return sha256("\n".join(parts).encode()).hexdigest()


def _settled(run: Run, measured: Progress, adapted: tuple[str, ...]) -> dict[str, CompressedLinear]:
    """The student's compressed linears as they will be stored, in its model too; measured again if that rounds some."""
    layers = run.student.settle()
    found = {} if run.recipe.adapt is None else rounded(layers, adapted, run.recipe.adapt)
    for name, layer in found.items():
        put(run.student.model, name, layer)
    if found:
        measured.history.append({**look(run, measured.step), "seconds": measured.seconds})
    return layers | found


def _result(
    run: Run,
    measured: Progress,
    tokens: CalibrationTokens,
    output: Path,
    teacher: Place,
    before: Mapping[str, Layout],
    layers: Mapping[str, CompressedLinear],
) -> Distilled:
    after = {**before, **{name: layer.layout for name, layer in layers.items()}}
    return Distilled(
        output=str(output),
        teacher=teacher.name,
        steps=measured.step,
        tokens=measured.step * run.recipe.batch * (run.sequences.shape[1] - 1),
        seconds=measured.seconds,
        bytes_before=sum(layout.bytes() for layout in before.values()),
        bytes_after=sum(layout.bytes() for layout in after.values()),
        trained={kind: sum(value.numel() for value in values.values()) for kind, values in run.student.trained.items()},
        data=tokens.report(),
        history=measured.history,
    )


def _write(
    opened: Opened,
    linears: Mapping[str, CompressedLinear],
    norms: Mapping[str, Tensor],
    recipe: Distillation,
    done: Distilled,
    output: Path,
) -> None:
    """The student's folder again, with what was learned in place of what it held."""
    layouts: dict[str, Layout] = opened.layouts | {name: layer.layout for name, layer in linears.items()}
    with writing(output) as writer:
        copy_companions(opened.folder, writer.folder)
        for layers, others in opened.parts():
            tensors: dict[str, Tensor] = {name: opened.read(name) for name in others}
            tensors |= {name: norms[name].to(tensors[name].dtype) for name in others if name in norms}
            for name in layers:
                learned = linears.get(name)
                stored = opened.read(f"{name}.weight") if learned is None else learned.get_parameter("weight").detach()
                tensors[f"{name}.weight"] = stored
            writer.add(tensors, payload_texts(layouts))
        size = writer.close()
        entry = {"quantization_config": table_entry(layouts, opened.sizes) | {"versions": reports.versions()}}
        writer.write("config.json", json.dumps(opened.config | entry, indent=1))
        if (opened.folder / reports.FILE).is_file():  # not beside what save_pretrained wrote
            after = _recounted(reports.read(opened.folder), linears, size)
            writer.write(reports.FILE, json.dumps(after.to_json(), indent=2))
            writer.write(reports.RECIPE, (opened.folder / reports.RECIPE).read_text(encoding="utf-8"))
        writer.write(RECIPE, dump(recipe))
        writer.write(FILE, json.dumps(done.to_json(), indent=2))


def _recounted(before: reports.Report, linears: Mapping[str, CompressedLinear], size: int) -> reports.Report:
    """The report of the student with what is stored now, in files of `size` bytes."""
    warning = "errors of layers are those before the distillation, which moves all together"
    stored = {name: layer.expression() for name, layer in linears.items()}
    rows = [
        replace(row, bpw=bits(stored[row.name]) / prod(row.shape), stored=describe(stored[row.name]))
        if row.name in stored
        else row
        for row in before.layers
    ]
    counted = [row for row in rows if row.name in stored]
    return replace(
        before,
        bytes=size,
        bpw=sum(row.bpw * prod(row.shape) for row in counted) / sum(prod(row.shape) for row in counted),
        model_bpw=size * 8 / before.parameters,
        layers=tuple(rows),
        warnings=(*before.warnings, warning),
    )
