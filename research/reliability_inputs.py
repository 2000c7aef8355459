"""Damaged checkpoints and hostile input, generated from seeds; and what the library makes of them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trials import SILENT, Outcome, tried

import llmcompress as lc
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place

HOSTILE: tuple[Any, ...] = (  # values in the place of any other
    -1,
    0,
    True,
    10**6,
    2**63,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "\x00",
    "é" * 300,
    "0x" + "f" * 5000,
    None,
    [],
    {},
    [[[[]]]],
    {"a": {"a": {"a": 1}}},
)
SLACK = 500 * 2**20  # bytes that a load may take beside twice the bytes on the disk


# --- checkpoints -----------------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_in_header(path: Path, draw: random.Random) -> None:
    """Flip one bit within the first bytes, where a header is."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(min(len(data), 2000))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    """Drop the end."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size or 1)])


def overwrite(path: Path, draw: random.Random) -> None:
    """Put noise in the place of a piece."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data) or 1)
    data[at : at + 64] = draw.randbytes(64)
    path.write_bytes(data)


def remove(path: Path, draw: random.Random) -> None:
    """Remove the file."""
    path.unlink()


def make_a_pipe(path: Path, draw: random.Random) -> None:
    """Put a pipe in the file's place, from which nothing ever comes."""
    path.unlink()
    os.mkfifo(path)


def make_a_folder(path: Path, draw: random.Random) -> None:
    """Put a folder in the file's place."""
    path.unlink()
    path.mkdir()


def change_json(path: Path, draw: random.Random) -> None:
    """Put a hostile value somewhere into a JSON file, or into the header of a weight file."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(_changed(json.loads(data[8 : 8 + size]), draw)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    else:
        path.write_text(json.dumps(_changed(json.loads(path.read_text()), draw)))


def nest(path: Path, draw: random.Random) -> None:
    """Write JSON that is nested beyond any recursion."""
    path.write_text("[" * 100_000 + "]" * 100_000)


def _changed(values: Any, draw: random.Random) -> Any:
    """Return JSON values with one of them, at any depth, replaced, removed, or added."""
    if isinstance(values, dict) and values and draw.random() < 0.85:
        key = draw.choice(sorted(values))
        if draw.random() < 0.1:
            return {name: value for name, value in values.items() if name != key}
        return values | {key: _changed(values[key], draw)}
    if isinstance(values, list) and values and draw.random() < 0.85:
        at = draw.randrange(len(values))
        return [*values[:at], _changed(values[at], draw), *values[at + 1 :]]
    return draw.choice(HOSTILE)


ANY = (flip, truncate, overwrite, remove, make_a_pipe, make_a_folder)
JSON = (change_json, change_json, change_json, change_json, nest)
WEIGHTS = (flip_in_header, change_json, change_json)


def sibling(folder: Path, other: Path, draw: random.Random) -> str:
    """Take one or two files of another model by the same recipe."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "report.json")
    for name in draw.sample(names, draw.choice((1, 2))):
        shutil.copyfile(other / name, folder / name)
    return "a sibling's file"


def damaged(whole: Path, other: Path, folder: Path, seed: int) -> str:
    """Copy a checkpoint to `folder` and damage it; return how. Half of the copies have no manifest any more."""
    draw = random.Random(seed)
    shutil.copytree(whole, folder)
    if draw.random() < 0.5:
        (folder / "manifest.json").unlink()
    if draw.random() < 0.1:
        return sibling(folder, other, draw)
    if draw.random() < 0.5:  # what decides how the weights are read
        names = ["config.json", "config.json", "model.safetensors.index.json", "manifest.json"]
        paths = [folder / name for name in names if (folder / name).is_file()]
    else:
        paths = sorted(folder.iterdir())
    path = draw.choice(paths)
    kinds = ANY + (JSON if path.suffix == ".json" else WEIGHTS if path.suffix == ".safetensors" else ())
    change = draw.choice(kinds)
    change(path, draw)
    return (change.__doc__ or "").split(".")[0].split(",")[0].lower()


def logits(folder: Path) -> list[float]:
    """Return numbers that a model computes, through the door of every command."""
    model = load_model(Place(str(folder), folder))
    with torch.no_grad():
        found: list[float] = model(torch.arange(12)[None]).logits[0, :, :40].double().flatten().tolist()
    return found


def loaded(whole: Path, other: Path, wanted: list[float], seed: int, folder: Path) -> tuple[str, str]:
    """Damage a checkpoint and load it; return how, and what became of it."""
    copy = folder / "out"
    how = damaged(whole, other, copy, seed)
    size = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
    found = tried(lambda: logits(copy), seconds=30)
    if found.kind == "done":
        return how, "the same numbers" if found.said == wanted else SILENT
    if found.peak > 2 * size + SLACK:
        return how, "over its memory"
    return how, found.kind


# --- recipes, texts, dense models ------------------------------------------------------------------------------------


def hostile_recipe(place: Path, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """Return a run with a recipe whose values, or whose bytes, are hostile.

    A pattern that backtracks for years is no trial: whoever types it can stop it.
    """
    recipe: dict[str, Any] = {
        "version": 1,
        "name": "trial",
        "seed": 3,
        "calibration": {"dataset": str(place / "text.txt"), "samples": 4, "length": 16, "held_out": 1},
        "rules": [{"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 4, "group_size": 8}]}],
        "gates": {"max_fallback_layers": 0.5},
    }
    path = folder / "recipe.yaml"
    text = json.dumps(_changed(recipe, draw))
    kind = draw.randrange(5)
    if kind == 1:
        text = "".join(map(chr, (draw.randrange(1, 0x3000) for _ in range(200))))
    elif kind == 2:
        text = text.replace(
            '"seed": 3', f'"seed": {draw.choice(("0x" + "f" * 6000, "9" * 6000, ".inf", "!!python/object:os.system"))}'
        )
    elif kind == 3:
        text = "a: &a [x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
        )
    elif kind == 4:
        pattern = draw.choice(("re:[", "re:" + "(" * 3000, "*" * 5000))
        text = json.dumps(
            recipe | {"rules": [{"match": [pattern] * draw.choice((1, 4000)), "steps": []}, *recipe["rules"]]}
        )
    path.write_text(text)
    return lambda: lc.plan(place / "dense", path) and None


def hostile_text(place: Path, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """Return a calibration on a text that is none."""
    kind = draw.randrange(7)
    path = folder / ("text.jsonl" if kind in (1, 2, 3) else "text.txt")
    if kind == 0:
        path.write_bytes(draw.randbytes(20_000))
    elif kind == 1:
        path.write_text("[" * 50_000 + "\n")
    elif kind == 2:
        content = draw.choice(([{"type": "text", "text": "mill " * 400}], [{"type": "image"}], 3, None, {"a": "b"}))
        path.write_text(
            "".join(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n" for _ in range(20))
        )
    elif kind == 3:
        path.write_text("".join(json.dumps(_changed({"text": "mill " * 300, "id": 3}, draw)) + "\n" for _ in range(20)))
    elif kind == 4:
        path.write_text("x" * 3_000_000)
    elif kind == 5:
        os.mkfifo(path)
    else:
        path.write_bytes(b"\xed\xa0\x80 \xff\xfe mill" * 2000)
    recipe = {
        "version": 1,
        "calibration": {"dataset": str(path), "samples": 4, "length": 16, "held_out": 1},
        "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}],
    }
    return lambda: str(lc.compress(place / "dense", recipe, folder / "out").folder)


def hostile_model(place: Path, folder: Path, draw: random.Random) -> Callable[[], Any]:
    """Return a plan for a dense model of which one file is damaged."""
    copy = folder / "dense"
    shutil.copytree(place / "dense", copy)
    path = draw.choice([copy / "config.json"] * 3 + sorted(copy.iterdir()))
    kinds = ANY + (JSON if path.suffix == ".json" else WEIGHTS if path.suffix == ".safetensors" else ())
    draw.choice(kinds)(path, draw)
    recipe = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}]}
    return lambda: str(lc.compress(copy, recipe, folder / "out").folder)


INPUTS = {"recipe": hostile_recipe, "text": hostile_text, "dense model": hostile_model}


def fed(place: Path, seed: int, folder: Path) -> tuple[str, str]:
    """Give the library hostile input; return of what kind, and what became of it."""
    draw = random.Random(seed)
    kind = sorted(INPUTS)[seed % len(INPUTS)]
    found: Outcome = tried(INPUTS[kind](place, folder, draw))
    if found.kind == "refused" and not _is_a_sentence(str(found.said)):
        return kind, "traceback"
    left = [path.name for path in folder.iterdir() if path.name.startswith("out.")]
    said = "kept in" in str(found.said)  # numbers that only a later block cannot hold
    return kind, "left behind" if left and not said and found.kind == "refused" else found.kind


def _is_a_sentence(said: str) -> bool:
    return "\n" not in said and "Traceback" not in said and len(said) < 2000
