"""Compare sizes that were trained together with sizes cut afterwards, and with models made for one size.

    python research/nested.py --data DATA --out OUT [--steps 24] [--memory 10] [--windows 8] [--only ARM ...]
        [--model smollm2] [--records FILE]

The student is `base-and-terms`: trellises of 2 bits, and low-rank terms of 64 components. It is distilled whole, and
with `nested: [32, 0]`, on the same tokens; both are then shrunk to 32 components and to none. Beside them, each size
was shrunk first and distilled alone, and a model without terms was made for 2.5 bits. All are scored on WikiText-2's
test split; what was trained reads its validation split. DATA holds both texts. What OUT has is not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from records import Record, append, provenance, recipe_path
from three_models import run_command

RANKS = (32, 0)
TEXT = "wikitext2-test.raw"
MADE = "2.5 bits alone"
RATES = {"scales": 3e-3, "norms": 3e-3, "codes": 3e-3}  # codes are those of the terms, as streams of trellises stay


def main() -> None:
    """Make, distil, shrink and score what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with wikitext2-valid.txt and wikitext2-test.raw"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--memory", type=int, default=10, help="of the trellises; 12 is that of the recipe")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="arms, by their names")
    parser.add_argument("--records", type=Path, help="collects a record of each row")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    students = make_students(options)
    for arm, (student, nested) in {
        "whole": (students["64"], ()),
        "nested": (students["64"], RANKS),
        "32 alone": (students["32"], ()),
        "0 alone": (students["0"], ()),
        MADE: (students.get("made", students["0"]), ()),
    }.items():
        if options.only is None or arm in options.only:
            taught = distilled(arm, student, nested, options)
            show(f"{arm}", taught, options)
            for rank in RANKS if student == students["64"] else ():
                show(f"{arm}, cut to {rank}", shrunk(taught, rank), options)


def make_students(options: argparse.Namespace) -> dict[str, Path]:
    """Return the students by their components, and the model made for one size; each is scored before it learns."""
    recipe = yaml.safe_load(recipe_path("base-and-terms").read_text())
    text = {"dataset": str(options.data / "wikitext2-valid.txt"), "bos": False, "eos": False, "shuffle": False}
    recipe["calibration"] |= text
    steps = recipe["rules"][0]["steps"]
    steps[1]["memory"] = options.memory
    students = {"64": compressed("64", recipe, options)}
    if options.only is None or MADE in options.only:
        steps[1] |= {"bits": 2.5, "memory": max(options.memory, 10)}  # streams of 2.5 bits have no shorter one
        del steps[-1]
        students["made"] = compressed("made", recipe, options)
    students |= {str(rank): shrunk(students["64"], rank) for rank in RANKS}
    for name, folder in students.items():
        show(f"{name}, as compressed", folder, options)
    return students


def compressed(name: str, recipe: Record, options: argparse.Namespace) -> Path:
    """Return the folder of the model compressed by a recipe."""
    out, file = options.out / name, options.out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    if not out.exists():
        run_command(["compress", options.model, str(file), "-o", str(out)])
    return out


def shrunk(folder: Path, rank: int) -> Path:
    """Return the folder with fewer components beside `folder`."""
    out = folder.with_name(f"{folder.name}-{rank}")
    if not out.exists():
        run_command(["shrink", str(folder), "--rank", str(rank), "-o", str(out)])
    return out


def distilled(arm: str, student: Path, nested: tuple[int, ...], options: argparse.Namespace) -> Path:
    """Return the folder of a student after the steps of an arm."""
    out, file = options.out / arm.replace(" ", "-"), options.out / f"{arm.replace(' ', '-')}.yaml"
    data = {"dataset": str(options.data / "wikitext2-valid.txt"), "bos": False, "eos": False}
    data |= {"samples": 6 * options.steps + 8, "length": 256, "held_out": 8}
    settings = {"version": 1, "name": arm, "data": data, "rates": RATES, "batch": 6, "micro_batch": 2}
    settings |= {"steps": options.steps, "evaluate_every": options.steps, "nested": list(nested)}
    file.write_text(yaml.safe_dump(settings))
    if not out.exists():
        run_command(["distill", str(student), str(file), "--teacher", options.model, "-o", str(out)])
    return out


def show(arm: str, folder: Path, options: argparse.Namespace) -> None:
    """Score a model, unless it was, and print its row."""
    saved = options.out / f"{folder.name}.scores.json"
    if not saved.exists():
        text = ["--text", str(options.data / TEXT), "--windows", str(options.windows), "--length", "512"]
        saved.write_text(json.dumps(run_command(["eval", str(folder), "--against", options.model, *text])))
    scores = json.loads(saved.read_text())
    numbers = {name: scores[name] for name in ("bytes", "bpw", "perplexity", "kl", "kl_stderr")}
    numbers["files"] = len(list(folder.glob("*.safetensors")))
    history = folder / "distillation.json"
    if history.is_file():
        numbers["seconds"] = json.loads(history.read_text())["seconds"]
    print(arm, json.dumps(numbers), flush=True)
    if options.records:
        command = f"python research/nested.py --data DATA --out OUT --steps {options.steps} --memory {options.memory}"
        record: Record = {"table": "nested", "arm": arm, "model": options.model, "command": command, "text": TEXT}
        calibration = "wikitext2-valid.txt"
        append(options.records, record | {"calibration": calibration, **provenance(), "numbers": numbers})


if __name__ == "__main__":
    main()
