"""Compare what students learn by and from, at equal tokens or in equal minutes, over several seeds.

    python research/lessons.py STUDENT... --data DATA --out OUT [--arms FILE] [--only NAME...] [--steps 24]
        [--seeds 0] [--minutes] [--device cuda] [--records FILE]

Arms are declared in a file (lessons.yaml, codes.yaml or terms.yaml). Beside the package's losses and teachers they know
those of candidate_losses.py and candidate_teachers.py. DATA holds `wikitext2-valid.txt`, `wikitext2-test.raw` and, for
minimal pairs, the folder `blimp`: the first 10 pairs of each of its files are asked. Every student learns by every arm;
what OUT holds already is not run again, so the table grows from run to run, and several processes may fill one OUT.
Scored on Python's documentation and WikiText-2 test, whose kinds were trained on, and on the source code of IDLE, whose
kind was not: 8x512 tokens of each. With --minutes an arm that takes over 5 % more or less time than forward KL is run
once more with as many steps as fit into forward KL's time, unless it is slower and behind already. --records adds each
row to a file of docs/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import candidate_losses
import candidate_teachers
import yaml
from columns import ARENA
from extracted import chats, nearness
from filelock import FileLock, Timeout
from idle import idle_source
from prototypes import embeddings, oddness, pieces_of
from records import Record, append, provenance
from tables import cell

import llmcompress as lc
from llmcompress.data.builtin import stdlib_text
from llmcompress.distillation.run import distill
from llmcompress.evaluation.evaluate import evaluate
from llmcompress.evaluation.logits import open_model
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.uncertainty import mean, paired_difference
from llmcompress.models.dense.load import is_dense, load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.reading import read_json
from llmcompress.runtime.precision import fast_float32
from llmcompress.surgery.drop import drop_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TEACHER = "smollm2"
CONTROL = "forward_kl"
ARMS = Path(__file__).with_suffix(".yaml")
PAIRS = 10  # of each file
READ = 32  # pieces of each text that chats are compared with
HELD = 8  # sequences of each text, at least as many as are held out
NUMBERS = {heading: form for heading, form in ARENA.items() if heading not in ("student", "arm")}
COLUMNS = ("arm", *NUMBERS)

Row = dict[str, Any]


@dataclass(frozen=True)
class Arena:
    """The common part of all arms: their file, texts to learn from, texts to score, the folder of rows, the device."""

    asked: Row
    training: dict[str, Path]
    scored: tuple[Protocol, ...]
    out: Path
    device: str = "cpu"

    @property
    def rows(self) -> Path:
        """The file of all rows so far."""
        return self.out / "rows.jsonl"

    def known(self) -> list[Row]:
        """Return the rows so far."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()] if self.rows.exists() else []


def main() -> None:
    """Run what is missing, and print a table for each student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where texts, rows and unfinished runs are kept")
    parser.add_argument("--arms", type=Path, default=ARMS)
    parser.add_argument("--only", nargs="+", help="names of arms; forward KL is run all the same")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", action="store_true", help="also in equal time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--records", type=Path, help="a file that gets a record of each row")
    options = parser.parse_args()
    candidate_losses.register()
    arena = prepared(options.data, options.arms, options.out, options.device)
    arms = arena.asked["controls"] | arena.asked["arms"]
    if unknown := set(options.only or ()) - set(arms):
        raise SystemExit(f"no such arm: {', '.join(sorted(unknown))}; those of {options.arms}: {', '.join(arms)}")
    wanted = [name for name in arms if options.only is None or name in (CONTROL, *options.only)]
    samples = options.steps * arena.asked["common"]["batch"] + HELD
    for write, texts in ((write_halves, ("{odd}", "{typical}")), (write_chats, ("{chats}", "{near}"))):
        if any(text in str(arms[name]) for name in wanted for text in texts):
            with FileLock(options.out / f"{write.__name__}.lock"):
                write(arena, samples)
    runs = [(student, name, seed) for seed in options.seeds for student in options.students for name in wanted]
    for student in options.students:
        once(arena, student, "before", {}, 0, 0)
    for student, name, seed in runs:
        once(arena, student, name, arms[name], options.steps, seed)
    for student, name, seed in runs if options.minutes else ():
        control, row = (found(arena, student, arm, options.steps, seed) for arm in (CONTROL, name))
        again = 0 if control is None or row is None else fitting(control, row)
        if again:
            once(arena, student, name, arms[name], again, seed)
    for student in options.students:
        print("\n".join(table(arena.known(), student.name)), flush=True)
        for record in records(arena.known(), student.name) if options.records else ():
            append(options.records, record)


def prepared(data: Path, arms: Path, out: Path, device: str) -> Arena:
    """Return the arena for an arms' file; writes the texts and pairs that it needs to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    wiki, words, pairs = data / "wikitext2-valid.txt", out / "random-words.txt", out / "pairs.jsonl"
    with FileLock(out / "texts.lock"):
        if not pairs.exists():
            drawn = wiki.read_text(encoding="utf-8").split()
            Random(0).shuffle(drawn)
            words.write_text(" ".join(drawn), encoding="utf-8")
            files = sorted((data / "blimp").glob("*.jsonl"))
            lines = chain.from_iterable(islice(file.read_text(encoding="utf-8").splitlines(), PAIRS) for file in files)
            pairs.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    text = (data / "wikitext2-test.raw").read_text(encoding="utf-8")
    size: Row = {"windows": 8, "length": 512}
    scored = (Protocol(tasks=(str(pairs),), **size), Protocol(text, **size), Protocol(idle_source(), **size))
    texts = {"wiki": wiki, "random": words}
    texts |= {name: out / f"{name}.jsonl" for name in ("odd", "typical", "chats", "near")}
    return Arena(declared(arms), texts, scored, out, device)


def declared(arms: Path) -> Row:
    """Return what an arms' file says, its common part on top of that of lessons.yaml."""
    asked, first = (yaml.safe_load(file.read_text()) for file in (arms, ARMS))
    return {**asked, "common": first["common"] | asked.get("common", {})}


def write_halves(arena: Arena, samples: int) -> None:
    """Write the halves of WikiText's first pieces that are farthest from and nearest to their kind, if need be."""
    odd, typical = arena.training["odd"], arena.training["typical"]
    if odd.exists():
        return
    place = locate(TEACHER)
    tokenizer = load_tokenizer(place.folder)
    text = arena.training["wiki"].read_text(encoding="utf-8")
    pieces = pieces_of(text, tokenizer, 2 * samples + samples // 8, 256)
    order = oddness(pieces, load_model(place, arena.device), tokenizer).argsort()
    for file, half in ((typical, order[: len(order) // 2]), (odd, order[len(order) // 2 :])):
        _write_pieces(file, [pieces[number] for number in sorted(half)])


def write_chats(arena: Arena, samples: int) -> None:
    """Write chats of the teacher, and the half that is nearest to pieces of the texts that arms learn from, if need
    be."""
    every, near = arena.training["chats"], arena.training["near"]
    if every.exists():
        return
    place = locate(TEACHER)
    tokenizer, model = load_tokenizer(place.folder), load_model(place, arena.device)
    texts = arena.training["wiki"].read_text(encoding="utf-8"), stdlib_text("train")
    read = [piece for text in texts for piece in pieces_of(text, tokenizer, READ, 256)]
    written = chats(model, tokenizer, 2 * samples, 256)
    alike = nearness(embeddings(written, model, tokenizer), embeddings(read, model, tokenizer))
    _write_pieces(near, [written[number] for number in sorted(alike.argsort()[samples:])])
    _write_pieces(every, written[:samples])


def _write_pieces(file: Path, pieces: Sequence[str]) -> None:
    file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


def found(arena: Arena, student: Path, arm: str, steps: int, seed: int) -> Row | None:
    """Return the row of an arm; None if there is none so far."""
    key = _key(student, arm, steps, seed)
    return next((row for row in arena.known() if row.items() >= key.items()), None)


def once(arena: Arena, student: Path, arm: str, changes: Row, steps: int, seed: int) -> None:
    """Add the row of an arm, if there is none and no other process is at it; 0 steps: of the student as it is.

    What went wrong with an arm is kept in a file, and it is not tried again while that is there.
    """
    key = _key(student, arm, steps, seed)
    folder = arena.out / "unfinished" / sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder.parent.mkdir(exist_ok=True)
    failed = folder.with_suffix(".failed")
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            if found(arena, student, arm, steps, seed) is None and not failed.exists():
                row = key | _run(arena, student, changes, steps, seed, folder)
                with arena.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                for each in (folder, folder.with_suffix(".assistant")):
                    shutil.rmtree(each, ignore_errors=True)
                print(f"{student.name}, {arm}, seed {seed}: {row['seconds']:.0f} s", flush=True)
    except Timeout:
        return
    except Exception as error:  # noqa: BLE001 (the other arms go on, whatever it is)
        failed.write_text(f"{key}\n{traceback.format_exc()}")
        print(f"{student.name}, {arm}, seed {seed}: failed, see {failed}: {error}", file=sys.stderr, flush=True)


def fitting(control: Row, row: Row) -> int:
    """Return the steps of an arm that fit into the control's time; 0 if they would tell nothing new."""
    share = control["seconds"] / row["seconds"]
    behind = mean(list(chain(*row["kl"]))) > mean(list(chain(*control["kl"])))
    return 0 if abs(1 - share) <= 0.05 or (share < 1 and behind) else round(row["steps"] * share)


def _key(student: Path, arm: str, steps: int, seed: int) -> Row:
    return {"student": student.name, "arm": arm, "steps": steps, "seed": seed}


def _run(arena: Arena, student: Path, changes: Row, steps: int, seed: int, folder: Path) -> Row:
    if not steps:
        return {"tokens": 0, "seconds": 0.0} | scores(student, arena.scored, arena.device)
    asked, teacher, own, hops = dict(changes), TEACHER, steps, []
    if "assistant" in asked:
        wanted, teacher, own = asked.pop("assistant"), str(folder.with_suffix(".assistant")), steps - steps // 2
        start = student if wanted == "itself" else made(arena, wanted)
        hop = recipe(arena, start, {}, steps // 2, seed)
        hops.append(distill(start, TEACHER, hop, teacher, device=arena.device))
    second = asked.pop("second", None)
    with candidate_teachers.beside(made(arena, second) if isinstance(second, dict) else second, arena.device):
        hops.append(distill(student, teacher, recipe(arena, student, asked, own, seed), folder, device=arena.device))
    spent = {"tokens": sum(hop.tokens for hop in hops), "seconds": sum(hop.seconds for hop in hops)}
    return spent | scores(folder, arena.scored, arena.device)


def made(arena: Arena, asked: Row) -> Path:
    """Return a model that teaches too, made once: the dense one without `blocks`, or compressed by a `recipe`."""
    folder = arena.out / "made" / sha256(json.dumps(asked).encode()).hexdigest()[:16]
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists() and "blocks" in asked:
            drop_blocks(TEACHER, asked["blocks"], folder)
        elif not folder.exists():
            lc.compress(TEACHER, asked["recipe"], folder, device=arena.device)
    return folder


def recipe(arena: Arena, student: Path, changes: Row, steps: int, seed: int) -> Row:
    """Return the distillation of an arm: samples of each text are as many as its steps may read, or with `epochs` as
    many as they read that often."""
    asked = arena.asked["common"] | changes
    kind = "dense" if is_dense(read_json(student / "config.json")) else "compressed"
    read = steps * asked["batch"]
    samples = HELD + (read // (asked.pop("epochs") * len(asked["data"])) if "epochs" in asked else read)
    data = [
        part | {"samples": samples, "dataset": part["dataset"].format_map(arena.training)} for part in asked["data"]
    ]
    own = {"data": data, "seed": seed, "steps": steps, "evaluate_every": steps, "save_every": steps}
    return {"rates": arena.asked["rates"][kind]} | asked | own


@fast_float32()
def scores(model: Path, texts: tuple[Protocol, ...], device: str) -> Row:
    """Return of each text the KL of every window and the calibration error; and the share of right pairs."""
    student, tokenizer = open_model(locate(str(model)), device, whole=True), load_tokenizer(locate(TEACHER).folder)
    found = [evaluate(student, tokenizer, protocol, against=scoring_teacher(device)) for protocol in texts]
    [pairs] = found[0].tasks.scores.values()
    return {
        "kl": [list(one.distance.kl_windows) for one in found if one.distance is not None],
        "ece": [one.perplexity.calibration_error for one in found],
        "pairs": pairs["acc,none"] if "acc,none" in pairs else pairs["acc"],
    }


@cache
def scoring_teacher(device: str) -> PreTrainedModel:
    """Return the teacher; it reads a text once for all arms of a process, whose logits take 2.4 GB."""
    return remembering(load_model(locate(TEACHER), device))


def remembering(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model keep its logits of whatever it reads, and return it."""
    known: dict[bytes, Any] = {}
    read = model.forward

    def forward(input_ids: Tensor, **options: Any) -> Any:
        key = input_ids.cpu().numpy().tobytes()
        if key not in known:
            known[key] = read(input_ids, **options)
        return known[key]

    model.forward = forward
    return model


def table(rows: list[Row], student: str) -> Iterator[str]:
    """Yield the lines of a student's table."""
    yield f"\n{student}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    for arm, numbers in summary(rows, student):
        yield f"| {' | '.join([arm, *(cell(form, numbers) for form in NUMBERS.values())])} |"


def records(rows: list[Row], student: str) -> Iterator[Record]:
    """Yield a record for each line of a student's table."""
    command = "python research/lessons.py STUDENT --data DATA --out OUT"
    common = {"table": "arena", "text": student, "command": command, "model": TEACHER, "calibration": None}
    common |= provenance()
    for arm, numbers in summary(rows, student):
        yield common | {"arm": arm, "numbers": numbers}


def summary(rows: list[Row], student: str) -> list[tuple[str, Row]]:
    """Return the arms of a student and their numbers: means over seeds; differences from forward KL are those of
    windows.

    The student as it is comes first, then forward KL, then what is nearest to the teacher. Seeds that forward KL has
    not run are left out.
    """
    groups: dict[tuple[str, bool], list[Row]] = {}
    controls = {row["seed"]: row for row in rows if row["student"] == student and row["arm"] == CONTROL}
    for row in rows:
        if row["student"] == student and row["seed"] in controls:
            timed = row["steps"] not in (0, controls[row["seed"]]["steps"])
            groups.setdefault((row["arm"] + ", in as many minutes" * timed, row["steps"] > 0), []).append(row)
    found = [
        (arm, learns, _numbers(members, controls if learns and arm != CONTROL else None))
        for (arm, learns), members in groups.items()
    ]
    found.sort(key=lambda each: (each[1], each[0] != CONTROL, -each[2].get("less", 0.0)))
    return [(arm, numbers) for arm, _, numbers in found]


def _numbers(rows: list[Row], controls: dict[int, Row] | None) -> Row:
    """Return the numbers of an arm."""
    kls = [mean([mean(row["kl"][text]) for row in rows]) for text in range(3)]
    found: Row = dict(zip(("kl_docs", "kl", "kl_code"), kls, strict=True))
    if controls is not None:
        pairs = [(list(chain(*controls[row["seed"]]["kl"])), list(chain(*row["kl"]))) for row in rows]
        known, given = ([mean(each) for each in zip(*side)] for side in zip(*pairs))
        change = paired_difference(given, known)
        found |= {"less": change.value, "less_stderr": change.stderr or 0.0}
    found |= {
        "training_tokens": mean([row["tokens"] for row in rows]),
        "minutes": mean([row["seconds"] for row in rows]) / 60,
        "calibration_error": mean([mean(row["ece"]) for row in rows]),
        "pairs": mean([row["pairs"] for row in rows]),
        "seeds": len(rows),
    }
    return found


if __name__ == "__main__":
    main()
