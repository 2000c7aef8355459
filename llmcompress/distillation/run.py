"""From a student's folder and its dense teacher to a recovered folder of the same format and size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn

from llmcompress.data.distillation import Data, read_data
from llmcompress.distillation.check_fused import check_fused, fused_into
from llmcompress.distillation.context import Report, TrainContext
from llmcompress.distillation.controls import measured_controls
from llmcompress.distillation.metrics import start_trackers, term_names
from llmcompress.distillation.objective.early_exits import Exits
from llmcompress.distillation.parallel.launch import is_given, launched_accelerator
from llmcompress.distillation.phases import Learned, lacking
from llmcompress.distillation.ready import memory_advice
from llmcompress.distillation.resume import METRICS
from llmcompress.distillation.setup import DistillationJob, check_outputs, learned_from, load_pair, taught
from llmcompress.distillation.student.folder import StudentFolder, open_folder
from llmcompress.distillation.teacher.cached import remove_cache
from llmcompress.distillation.teacher.quantized import check_teacher, without_remarks
from llmcompress.models.dense.companions import Companions, companions
from llmcompress.models.dense.config import code_files
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import make_checkpoint
from llmcompress.models.files.compressed import check_written
from llmcompress.models.files.identity import binding, content_digest, teacher_digest, tokenizer_digest
from llmcompress.models.files.output import check_writable, claim_folder, lock_output
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import dump, hide_folders, read_as
from llmcompress.reporting import report as reports
from llmcompress.reporting.plots import distillation_png
from llmcompress.reporting.report import GateReport, measured_gates
from llmcompress.runtime.facts import versions
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.memory import keeping_freed_memory
from llmcompress.runtime.notebook import progress_line
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.ranks import Ranks, join_ranks
from llmcompress.weight.expression import bits, describe
from llmcompress.weight.layout import Layout
from llmcompress.weight.modules import CompressedLinear, Multiplying, base_of, compressed_modules, describe_beside_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINING = ".training"  # follows the name of the output folder: the state of an interrupted run
COMPRESSED_TEACHER = "the teacher is compressed too, so what it lost the student does not learn"


@dataclass(frozen=True)
class Distilled(JsonRecord):
    """The output and the measurements of a distillation.

    `history`: KL to the teacher and perplexities on the held-out sequences, from before the first step to after the
    last; `steps`, and `tokens` predicted in them: end to end; `bytes_before`, `bytes_after`: of all compressed weights,
    which added low-rank terms make larger; `phases`: {kind, steps, seconds, frozen: the number of codes that
    oscillated} of each, and {before, after, step, frozen} of every block of a blockwise one: its held-out errors and
    its best step; `losses`: the weight of each, end to end; `teacher_id`: its Hub id, if it has one; `plot`: the file
    of its curve, None if matplotlib is missing; `cache_bias`: the bias of a cached teacher; `quantized_teacher`:
    {bits, kl, perplexity} of a teacher that was quantized, on the held-out sequences, with kl from its dense form;
    `controls`: the last look of each control at the held-out sequences, or why it failed, see `measured_controls`.
    """

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
    phases: list[dict[str, Any]]
    losses: Mapping[str, float | str]
    teacher_id: str | None = None
    plot: str | None = None
    warnings: tuple[str, ...] = ()
    cache_bias: dict[str, dict[str, float]] | None = None  # before and after, see `kept.measured_bias`
    quantized_teacher: dict[str, float] | None = None
    controls: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@fast_float32()
def distill(
    student: str | Path,
    teacher: str | Path,
    recipe: Distillation | str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    device: str = "cpu",
    progress: Report | None = None,
    trust_remote_code: bool = False,
) -> Distilled:
    """Train what `recipe` names in the model `student` towards `teacher`, and write the result as a new folder.

    Of a compressed student these are the same expressions at the same bytes, and the low-rank terms that the recipe
    asks for besides; of a dense one the same tensors in the same dtypes. An interrupted run resumes from the last state
    in `<output>.training`.

    Args:
        student: a folder that compress wrote, or a dense model: a folder, a Hub id or `smollm2`.
        teacher: the dense model that it was made from.
        recipe: a `Distillation`, the path of a YAML file or the name of one that comes along, or plain values.
        output: a new or empty folder.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (step, steps, loss, tokens per second, held-out KL); None for a line in a notebook.
        trust_remote_code: True to run the Python code that both bring along, if transformers lacks their classes.

    Returns:
        The distances to the teacher before and after, the steps, and what they cost.

    Raises:
        LLMCompressError: in one sentence, for whatever is wrong.
    """
    progress = progress or progress_line("step", "loss", "tokens/s", "held-out KL")
    asked, target = read_as(Distillation, recipe), Path(output)
    accelerator = launched_accelerator(device, asked, target)
    with join_ranks("cpu") as ranks, lock_output(target, "output folder") if ranks.rank == 0 else nullcontext():
        with ranks.agree_on_errors():
            pupil, place = (locate(model, trust_remote_code=trust_remote_code) for model in (student, teacher))
        done = _distilled(pupil, place, asked, target, accelerator, ranks, progress)
    accelerator.end_training()
    return done


def _distilled(
    pupil: Place,
    place: Place,
    asked: Distillation,
    target: Path,
    accelerator: Accelerator,
    ranks: Ranks,
    progress: Report | None,
) -> Distilled:
    """Distil the model at `pupil` as `distill` says, towards that at `place`, while no other process writes the
    output."""
    folder = pupil.folder
    with ranks.agree_on_errors():
        check_fused(fused_into(folder), asked)
        opened, beside = open_folder(pupil), companions(folder, pupil.trust_remote_code)
        recipe_text = dump(hide_folders(asked))
        check_writable(target, opened.bytes)
        check_vocabularies((pupil, place))
        tokenizer = load_tokenizer(folder, pupil.trust_remote_code)
        pair = load_pair(pupil, place, asked, accelerator)
        check_teacher(pair[1], asked.teacher.bits)
    data = _read(asked, tokenizer, pair[1], ranks)
    training = target.with_name(target.name + TRAINING)
    identity = _identity(asked, data, opened, place)
    ranks.compare(identity)
    if ranks.rank == 0:
        claim_folder(training)
    store = Store(training, identity)
    job = DistillationJob(pupil, place, asked, target, data, store, accelerator, ranks)
    with ranks.agree_on_errors():
        run = job.context(pair)
        if not is_given(accelerator):  # in such a process it has another precision
            check_outputs(pair, data)
        Exits.of(pair[0], asked.losses)  # refuses a missing exit before a teacher is cached
    warnings: tuple[str, ...] = () if not compressed_modules(pair[1]) else (COMPRESSED_TEACHER,)
    start_trackers(asked, accelerator)
    with memory_advice(asked), without_remarks(), keeping_freed_memory():
        run, cost = taught(run, place, target)
        del pair  # so that a teacher which the run does not need is gone
        learned, bias = learned_from(run, progress)
        done, metrics = _result(run, learned, target, place, opened.layouts), run.metrics.path
        del run
        controls = measured_controls(job, progress)
    warnings += lacking(done.trained)
    done = replace(done, warnings=warnings, cache_bias=bias, quantized_teacher=cost, controls=controls)
    if accelerator.is_main_process:
        _write(opened, beside, learned, recipe_text, done, target, metrics)
        store.clear()
        if asked.teacher.kind == "cached":
            remove_cache(asked.teacher, target)
    return done


def _read(recipe: Distillation, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, ranks: Ranks) -> Data:
    """Return the data; text that the teacher has to write is written on its device."""
    return ranks.first(partial(read_data, recipe.data, tokenizer, lambda: teacher, teacher.config))


def _identity(recipe: Distillation, data: Data, opened: StudentFolder, teacher: Place) -> dict[str, Any]:
    """Return what a state depends on: one continues the other where all of this is equal. Models count by content."""
    digests = sha256(json.dumps(opened.digests, sort_keys=True).encode()).hexdigest()
    config = [opened.folder / name for name in ("config.json", *code_files(opened.folder))]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": data.hash,
        "student": [digests, content_digest(config), tokenizer_digest(opened.folder)],
        "teacher": teacher_digest(teacher.folder),
        "versions": versions(),
    }


def _result(
    run: TrainContext, learned: Learned, output: Path, teacher: Place, before: Mapping[str, Layout]
) -> Distilled:
    after = {**before, **{name: layer.layout for name, layer in learned.linears.items()}}
    return Distilled(
        output=str(output),
        teacher=teacher.public_name,
        steps=learned.steps,
        tokens=learned.tokens,
        seconds=learned.seconds,
        bytes_before=sum(layout.bytes() for layout in before.values()),
        bytes_after=sum(layout.bytes() for layout in after.values()),
        trained=learned.trained,
        data=run.data.report,
        history=learned.history,
        phases=learned.phases,
        losses={
            name: term.weight_in_words()
            for name, term in zip(term_names(run.recipe.losses), run.recipe.losses, strict=True)
        },
        teacher_id=teacher.hub_id,
        plot=file_names.DISTILLATION_PLOT if find_spec("matplotlib") else None,
    )


def _write(
    opened: StudentFolder,
    beside: Companions,
    learned: Learned,
    recipe: str,
    done: Distilled,
    output: Path,
    metrics: Path,
) -> None:
    """Write the student's folder with the learned weights in place of its own, and with the measurements."""
    with make_checkpoint(output) as writer:
        beside.copy(writer.folder)
        opened.store(learned.linears, learned.dense, writer)
        compressed = bool(opened.layouts)
        size = writer.close(binding(writer.folder) if compressed else None)
        if (opened.folder / file_names.REPORT).is_file():  # not beside what save_pretrained wrote
            after = _recounted(reports.read(opened.folder), learned.linears, size, done)
            writer.write(file_names.REPORT, json.dumps(after.to_json(), indent=2))
            writer.write(file_names.RECIPE, (opened.folder / file_names.RECIPE).read_text(encoding="utf-8"))
        writer.write(file_names.DISTILLATION_RECIPE, recipe)
        writer.write(METRICS, metrics.read_text(encoding="utf-8"))
        writer.write(file_names.DISTILLATION, json.dumps(done.to_json() | {"output": output.name}, indent=2))
        if done.plot is not None:
            (writer.folder / done.plot).write_bytes(distillation_png(done.history))
        if compressed:
            check_written(writer.folder, bool(beside.code))


def _recounted(
    before: reports.Report, linears: Mapping[str, Multiplying], size: int, done: Distilled
) -> reports.Report:
    """Return the student's report, updated to the weights stored now, in files of `size` bytes."""
    warning = "errors of layers are those before the distillation, which moves all together"
    stored = _counted(linears)
    rows = [replace(row, **stored[row.name]) if row.name in stored else row for row in before.layers]
    counted = [row for row in rows if row.name in stored]
    gates = None if before.gates is None else _measured(done).judge(before.gates.limits)
    return before.recount(rows, counted, size, (warning, *done.warnings), gates)


def _counted(linears: Mapping[str, Multiplying]) -> dict[str, dict[str, Any]]:
    """Return the changed entries of rows, by linear; what several have in common counts in the first of them."""
    counted: set[nn.Module] = set()
    found: dict[str, dict[str, Any]] = {}
    for name, layer in linears.items():
        if isinstance(layer, CompressedLinear):
            base = base_of(layer)
            own = layer.expression() if base is None or base in counted else layer.whole()
            text = describe_beside_base(own) if base is not None and base in counted else describe(own)
            found[name] = {"bpw": bits(own) / prod(layer.layout.size), "stored": text}
            counted.add(base)
    return found


def _measured(done: Distilled) -> GateReport:
    """Return the quality after a distillation, as its own held-out text tells it."""
    last = done.history[-1]
    gap = math.log(last["perplexity"] / last["teacher_perplexity"])
    return measured_gates(last["kl"], gap, 0, "distillation")
