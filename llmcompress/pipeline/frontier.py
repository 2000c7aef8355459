"""A sweep of one model over budgets: prices once, then for each a plan, a checkpoint and scores; a table and a plot.

    OUT/prices.json                   the cost of every option, measured once for all budgets
    OUT/bpw-1.25, OUT/bpw-2, ...      ordinary checkpoints, each with its plan and its scores
    OUT/frontier.json, .md, .png, .svg

With several recipes, prices and checkpoints lie in OUT/<name of the recipe>, but for a recipe that was alone there
before. Finished parts of an earlier sweep stay: the next one with the same recipe, model, text and versions does not
repeat them, and its table and plot have their points, too.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.allocation.allocate import Allocation, PriceList, reachable_choices
from llmcompress.allocation.choices import Choices
from llmcompress.allocation.file_sizes import SIZED
from llmcompress.allocation.price_file import check_prices, price_list
from llmcompress.compression.job import Job, prepare
from llmcompress.compression.run import check_ranks
from llmcompress.errors import DiskError, InputError, RecipeError, Termination
from llmcompress.evaluation.distance import Distance
from llmcompress.evaluation.evaluate import Evaluation, TextScores, evaluate
from llmcompress.evaluation.logits import OnDisk
from llmcompress.evaluation.perplexity import describe_protocol, evaluation_windows
from llmcompress.evaluation.protocol import STANDARD, Protocol
from llmcompress.evaluation.score import size_of
from llmcompress.evaluation.tasks import find_tasks
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file, has_file, write_files
from llmcompress.models.files.output import lock_output
from llmcompress.models.files.reading import read_json
from llmcompress.pipeline import quality_check
from llmcompress.pipeline.compress import completed_result, compress_job, record_allocation
from llmcompress.pipeline.frontier_inputs import Budget, Peer
from llmcompress.recipe.compression import Recipe
from llmcompress.reporting import report as reports
from llmcompress.reporting.plots import check_matplotlib, frontier_pictures, main_metric
from llmcompress.reporting.tables import frontier_markdown
from llmcompress.runtime.devices import as_current, device_of
from llmcompress.runtime.facts import versions
from llmcompress.runtime.json_values import replace_nonfinite
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.ranks import ALONE, Ranks, join_ranks

FILE = "frontier.json"
TABLE = "frontier.md"
PRICES = "prices.json"
PICTURE = "frontier"  # .png and .svg
FOLDER_NAME = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True)
class SweepCallbacks:
    """Functions that a sweep reports to: `stage(sentence)` receives the next stage, the others as in `compress`."""

    stage: Callable[[str], None] | None = None
    pricing: Callable[[int, int, float], None] | None = None
    progress: Callable[[int, int, float], None] | None = None
    training: Callable[[int, int, float, float, float], None] | None = None

    def report_stage(self, sentence: str) -> None:
        """Report the next stage."""
        if self.stage is not None:
            self.stage(sentence)


SILENT = SweepCallbacks()


@dataclass(frozen=True)
class Line:
    """One recipe of a sweep, laid over the model, and the folder of its checkpoints."""

    job: Job
    choices: Choices
    folder: Path


@fast_float32()
def frontier(
    model: str | Path,
    recipes: Sequence[Recipe],
    sizes: Sequence[Budget],
    output: Path,
    protocol: Protocol = STANDARD,
    *,
    peers: Sequence[Peer] = (),
    revision: str | None = None,
    device: str = "cpu",
    callbacks: SweepCallbacks = SILENT,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compress `model` by each recipe to each size, and score every checkpoint by `protocol`.

    A recipe's own target is ignored. `output` is a new folder or that of an earlier sweep, whose finished parts stay.
    Returns the contents of its frontier.json. `trust_remote_code`: as in `compress`. Processes that a launcher started
    share pricing and compressing; every one has to call this, and the first one scores and writes. Raises an
    LLMCompressError, in one sentence, for whatever is wrong; sizes out of reach are found from headers alone.
    """
    device_of(device)  # before a model is looked at
    with join_ranks(device) as ranks, as_current(device_of(ranks.device)):
        with ranks.agree_on_errors():
            dense = resolve(model, revision, trust_remote_code)
            _check_recipes(recipes)
            companions(dense.folder, trust_remote_code)  # raises any fault in them before work starts
        return sweep(dense, recipes, sizes, output, protocol, peers, callbacks, ranks)


def sweep(
    dense: DenseModel,
    recipes: Sequence[Recipe],
    sizes: Sequence[Budget],
    output: Path,
    protocol: Protocol = STANDARD,
    peers: Sequence[Peer] = (),
    callbacks: SweepCallbacks = SILENT,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run `frontier` on an opened model, in each of the processes `ranks`."""
    ranks.first(partial(_check_output, output))
    with ranks.agree_on_errors():
        folders = [_folder_of(recipe.name, output, len(recipes) == 1) for recipe in recipes]
        lines = [_line(dense, recipe, sizes, folder) for recipe, folder in zip(recipes, folders, strict=True)]
        for line in lines:
            check_ranks(line.job, ranks, output)
        judge = Judge.of(dense, protocol, ranks.device)
    ranks.compare(_identity(judge, recipes, sizes))
    for line in lines:
        ranks.first(partial(check_prices, line.folder / PRICES, line.job))
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(lock_output(output, "output folder")))
        try:
            return _run_sweep(lines, sizes, output, judge, peers, callbacks, ranks)
        except (KeyboardInterrupt, Termination) as stop:
            if ranks.rank > 0:
                raise
            raise type(stop)(f"{output} keeps what is finished, and the same command resumes from there") from stop


def _check_recipes(recipes: Sequence[Recipe]) -> None:
    """Raise RecipeError if lines cannot be told apart or drawn."""
    check_matplotlib()
    names = [recipe.name for recipe in recipes]
    for name in names if len(names) > 1 else ():
        if names.count(name) > 1:
            raise RecipeError(f"two recipes are named {name!r}; give each a name of its own")
        if not FOLDER_NAME.fullmatch(name):
            raise RecipeError(f"the recipe's name {name!r} cannot name a folder; use letters, digits and . + - _")


def _check_output(output: Path) -> None:
    """Raise DiskError for a folder with other contents, InputError for the damaged record of a sweep."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / FILE).is_file())):
        raise DiskError(f"{output} exists and is not an earlier sweep; remove it or choose another output folder")
    if (output / FILE).is_file():
        read_json(output / FILE, "remove that file, or choose another output folder")


def _folder_of(recipe: str, output: Path, is_alone: bool) -> Path:
    """Return the folder of a recipe's prices and checkpoints, where an earlier sweep has put them if one has."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # no file, or a damaged one: `check_prices` tells of it
        if read_json(output / PRICES)["recipe"]["name"] == recipe:
            return output
    return output if is_alone and not (output / recipe / PRICES).is_file() else output / recipe


def _identity(judge: Judge, recipes: Sequence[Recipe], sizes: Sequence[Budget]) -> dict[str, Any]:
    """Return what must be equal in all processes, by the name that an error gives it."""
    return {
        "recipes": [recipe.model_dump(mode="json") for recipe in recipes],
        "budgets": [budget.name for budget in sizes],
        "text or tasks": {key: value for key, value in judge.settings.items() if key != "versions"},
        "versions": versions(),
        **judge.dense.content(),
    }


def _line(dense: DenseModel, recipe: Recipe, sizes: Sequence[Budget], folder: Path) -> Line:
    """Lay a recipe over the model. Raises RecipeError for any fault in recipe or sizes."""
    try:
        engine = None if recipe.target is None else recipe.target.engine
        job = prepare(dense, recipe.model_copy(update={"target": sizes[0].target.for_engine(engine)}))
        choices = reachable_choices(job, [budget.target for budget in sizes])
    except RecipeError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error
    return Line(job, choices, folder)


def _run_sweep(
    lines: Sequence[Line],
    sizes: Sequence[Budget],
    output: Path,
    judge: Judge,
    peers: Sequence[Peer],
    callbacks: SweepCallbacks,
    ranks: Ranks,
) -> dict[str, Any]:
    """Return the result of the sweep, which is rewritten after every point."""
    source = judge.dense
    callbacks.report_stage(f"scoring {source.name}")
    dense = ranks.first(lambda: judge.of_dense(line.folder / budget.name for line in lines for budget in sizes))
    result: dict[str, Any] = {
        "model": source.public_name,
        "revision": source.revision,
        "axis": "bytes" if sizes[0].target.bpw is None else "bpw",
        "protocol": {key: value for key, value in judge.settings.items() if key not in ("digest", "versions")},
        "versions": versions(),
        "dense": dense | asdict(size_of(source.place)),
        "series": [],
        "peers": [_with_ratio(_as_point(peer, dense), dense) for peer in peers],
    }
    ranks.first(lambda: None if (output / FILE).is_file() else write_files(output, {FILE: _json(result)}))
    result["series"] = ranks.first(partial(_earlier_series, output, result, lines, sizes))
    for line in lines:
        recipe = line.job.recipe.name
        callbacks.report_stage(f"{recipe}: prices for {len(sizes)} budgets")
        prices = price_list(line.folder / PRICES, line.job, line.choices, ranks.device, callbacks.pricing, ranks)
        seconds = ranks.first(lambda: prices.seconds)  # noqa: B023 - called at once
        points = [point for each in result["series"] if each["recipe"] == recipe for point in each["points"]]
        series: dict[str, Any] = {"recipe": recipe, "pricing_seconds": seconds, "points": points}
        result["series"] = [*(each for each in result["series"] if each["recipe"] != recipe), series]
        for number, budget in enumerate(sizes, start=1):
            callbacks.report_stage(f"{recipe}: {budget.name}, {number} of {len(sizes)}")
            folder = line.folder / budget.name
            plan = _compress_budget(folder, budget, prices, callbacks, ranks)
            series["points"].append(ranks.first(partial(_point, folder, budget, plan, judge, dense, callbacks)))
            series["points"].sort(key=lambda point: point["bytes"])
            ranks.first(partial(_publish, output, result))
    return result


def _earlier_series(
    output: Path, result: dict[str, Any], lines: Sequence[Line], sizes: Sequence[Budget]
) -> list[dict[str, Any]]:
    """Return the points of a comparable earlier sweep that are still there and not asked for."""
    before, now = read_json(output / FILE), json.loads(_json(result))
    same = all(before.get(key) == value for key, value in now.items() if key not in ("series", "peers"))
    asked = {(line.job.recipe.name, budget.name) for line in lines for budget in sizes}
    series = []
    for each in before["series"] if same else ():
        name, folder = each["recipe"], _folder_of(each["recipe"], output, len(lines) == 1)
        points = [point for point in each["points"] if (name, point["budget"]) not in asked]
        points = [point for point in points if (folder / PRICES).is_file() and (folder / point["folder"]).is_dir()]
        series += [each | {"points": points}] if points else []
    return series


def _compress_budget(
    folder: Path, budget: Budget, prices: PriceList, callbacks: SweepCallbacks, ranks: Ranks
) -> Allocation:
    """Return a budget's plan; compress its checkpoint unless an earlier sweep has."""
    with ranks.agree_on_errors():
        plan = prices.reaching(budget.target)
    job = plan.settled
    if ranks.first(lambda: completed_result(folder, job, ranks.requested_device) is None):
        progress, training = callbacks.progress, callbacks.training
        compress_job(job, folder, device=ranks.device, progress=progress, training=training, ranks=ranks)
    return plan


def _point(
    folder: Path, budget: Budget, plan: Allocation, judge: Judge, dense: dict[str, Any], callbacks: SweepCallbacks
) -> dict[str, Any]:
    """Return a budget's point: its checkpoint's sizes and scores, which are measured unless the checkpoint has them."""
    stored = reports.read_allocation(folder) if has_file(folder, file_names.ALLOCATION) else None
    allocation = record_allocation(plan, folder, judge.device) if stored is None else stored
    quality_check.judge(plan.settled, folder, judge.device, plan=plan)
    callbacks.report_stage(f"scoring {folder.name}")
    report, distillation = reports.read(folder), reports.read_distillation(folder)
    target, size, bpw = plan.job.recipe.target, report.bytes, report.bpw
    if target is not None and target.engine in SIZED:
        size, bpw = plan.choices.size(plan.chosen), plan.choices.bpw(plan.chosen) or bpw
    sizes = {
        "budget": budget.name,
        "folder": folder.name,
        "bytes": size,
        "bpw": bpw,
        "model_bpw": size * 8 / report.parameters,
        "predicted_kl": allocation["predicted_kl"],
        "measured_kl": allocation["measured_kl"],
        "seconds": report.seconds + (0.0 if distillation is None else distillation["seconds"]),
    }
    return _with_ratio(sizes | judge.scores(folder, dense), dense)


def _with_ratio(point: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Return the point with `ratio`, its perplexity over the dense model's, and `gap`, the logarithm of that."""
    ratio = point["perplexity"] / dense["perplexity"]
    return point | {"ratio": ratio, "gap": math.log(ratio)}


def _as_point(peer: Peer, dense: dict[str, Any]) -> dict[str, Any]:
    """Return a peer in the form of a sweep's points; its score in a task stands for the metric that is drawn."""
    tasks = {task: {main_metric(dense["tasks"].get(task, {})) or "score": value} for task, value in peer.tasks.items()}
    return peer.model_dump(mode="json") | {"tasks": tasks}


def _publish(output: Path, result: dict[str, Any]) -> None:
    """Write numbers, table and pictures."""
    pictures = {f"{PICTURE}.{kind}": picture for kind, picture in frontier_pictures(result).items()}
    write_files(output, {FILE: _json(result), TABLE: frontier_markdown(result).encode()} | pictures)


def _json(result: dict[str, Any]) -> bytes:
    return json.dumps(replace_nonfinite(result), indent=2).encode()


@dataclass(frozen=True)
class Judge:
    """A scorer of models against `dense`. `settings`: plain values that two comparable scores must share."""

    dense: DenseModel
    protocol: Protocol
    device: str
    settings: dict[str, Any]

    @staticmethod
    def of(dense: DenseModel, protocol: Protocol, device: str) -> Judge:
        """Prepare a judge.

        Raises InputError for a text that is too short or cannot be read, RecipeError for too long windows and unknown
        tasks.
        """
        tokenizer = dense.tokenizer()
        ids = evaluation_windows(tokenizer, protocol, dense.config)
        find_tasks(tokenizer, protocol)
        settings = describe_protocol(tokenizer, protocol) | {
            "digest": _digest(ids, protocol.tasks),
            "versions": versions(),
        }
        return Judge(dense, protocol, device, json.loads(json.dumps(settings)))

    def _stored_entries(self, folder: Path) -> dict[str, Any] | None:
        """Return the entries {"dense", "compressed", ...} that a checkpoint has for the same protocol, if any."""
        if not has_file(folder, file_names.SCORES):
            return None
        entries = read_json(folder / file_names.SCORES)
        same = all(entries.get(key) == value for key, value in self.settings.items())
        return entries if same and "dense" in entries else None

    def of_dense(self, folders: Iterable[Path]) -> dict[str, Any]:
        """Return the dense model's scores: from the first checkpoint that has them, else measured."""
        for folder in folders:
            if (entries := self._stored_entries(folder)) is not None:
                scores: dict[str, Any] = entries["dense"]
                return scores
        measured = _check_complete(evaluate(OnDisk(self.dense, self.device), self.dense.tokenizer(), self.protocol))
        own = {name: TextScores.of(Distance.to_itself(scores.perplexity)) for name, scores in measured.texts.items()}
        return Evaluation(measured.tasks, own).to_json()

    def scores(self, folder: Path, dense: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of the checkpoint in `folder`, and store them there. `dense`: the dense model's scores.

        Raises DiskError if the folder cannot be written to.
        """
        entries = self._stored_entries(folder)
        if entries is None:
            teacher = OnDisk(self.dense, self.device)
            place = locate(str(folder), trust_remote_code=self.dense.trust_remote_code)
            student = load_model(place, self.device)
            measured = _check_complete(evaluate(student, self.dense.tokenizer(), self.protocol, against=teacher))
            entries = self.settings | {"dense": dense, "compressed": measured.to_json()}
            add_file(folder, file_names.SCORES, json.dumps(entries, indent=2))
        scores: dict[str, Any] = entries["compressed"]
        return scores


def _check_complete(scores: Evaluation) -> Evaluation:
    """Return scores that may be stored. Raises InputError if tasks are missing."""
    if scores.tasks.failure is not None:
        raise InputError(scores.tasks.failure)
    return scores


def _digest(windows: Tensor, tasks: Iterable[str]) -> str:
    """Return the digest of the tokens and of the files among the tasks."""
    digest = sha256(windows.numpy().tobytes())
    for path in (Path(os.path.expanduser(task)) for task in tasks):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()
