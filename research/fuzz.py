"""Feed the readers of recipes, layouts, weight headers and indexes with damaged input, generated from seeds.

    python research/fuzz.py [--inputs 100000] [--seed 0] [--jsonl FILE]

An input is a valid one with a few bytes, words or values changed. Its end is `read`, `refused` (by an error of ours, or
the ValueError that a layout's reader promises), or bad: `traceback`, `hang` (10 s), `memory` (500 MB beside what the
process has). Ends with 1 where something bad happened, and prints its seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from records import Record, append, provenance
from reliability import make
from reliability_inputs import _changed
from trials import tried

from llmcompress.errors import LLMCompressError
from llmcompress.models.dense.headers import read_headers
from llmcompress.models.files.integrity import INDEX
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.layout import Layout

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
SECONDS, MEMORY = 10, 500 * 2**20
BAD = ("traceback", "hang", "memory")

Reader = Callable[[random.Random], Any]  # makes an input of a seed, and reads it


class Hang(Exception):
    """Raised when an input takes too long."""


def main() -> None:
    """Feed every reader in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as folder:
        readers = readers_in(Path(folder))
        taken = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (taken, taken))
        found: Counter[tuple[str, str]] = Counter()
        for number in range(options.inputs):
            name = sorted(readers)[number % len(readers)]
            outcome = ended(readers[name], options.seed + number)
            found[name, outcome] += 1
            if outcome in BAD:
                print(f"{name}: seed {options.seed + number}: {outcome}")
    for row in records(found, options.inputs):
        print(f"| {row['arm']} | {row['numbers']['trials']} | {row['numbers']['outcomes']} |")
        if options.jsonl is not None:
            append(options.jsonl, row)
    sys.exit(int(any(outcome in BAD for _, outcome in found)))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang


def ended(read: Reader, seed: int) -> str:
    """Return the outcome of one input."""
    signal.alarm(SECONDS)
    try:
        read(random.Random(seed))
    except (LLMCompressError, Refused):
        return "refused"
    except Hang:
        return "hang"
    except MemoryError:
        return "memory"
    except Exception:  # noqa: BLE001 - whatever it is, it is the outcome
        return "traceback"
    finally:
        signal.alarm(0)
    return "read"


class Refused(Exception):
    """Raised for the ValueError that a layout's reader promises."""


def readers_in(place: Path) -> dict[str, Reader]:
    """Return the readers by name, with valid inputs made in `place`."""
    said = tried(lambda: make(place), seconds=600)
    if said.kind != "done":
        raise SystemExit(f"nothing can be tried: {said.said}")
    small = place / "one.4"
    config = json.loads((small / "config.json").read_text())["quantization_config"]
    shards = {path.name: path.read_bytes() for path in sorted(small.glob("*.safetensors"))}
    index = json.loads((small / INDEX).read_text())
    texts = [path.read_text() for path in RECIPES]

    def recipe(draw: random.Random) -> None:
        path = place / "recipe.yaml"
        path.write_bytes(mangled(draw.choice(texts).encode(), draw))
        read_recipe(path)

    def layout(draw: random.Random) -> None:
        try:
            found = Layout.from_json(_changed(draw.choice(config["layouts"]), draw))
            found.bytes()
        except ValueError as error:
            raise Refused from error

    def table(draw: random.Random) -> None:
        LLMCompressConfig(**_words(_changed(config, draw))).table()

    def header(draw: random.Random) -> None:
        name = draw.choice(sorted(shards))
        folder = place / "header"
        folder.mkdir(exist_ok=True)
        data = shards[name]
        size = 8 + int.from_bytes(data[:8], "little")
        (folder / "model.safetensors").write_bytes(mangled(data[:size], draw) + data[size:])
        read_headers(folder)

    def listing(draw: random.Random) -> None:
        (small / INDEX).write_text(json.dumps(_changed(index, draw)))
        read_headers(small)

    return {"recipe": recipe, "layout": layout, "table of layouts": table, "weight header": header, "index": listing}


def _words(values: Any) -> dict[str, Any]:
    """Return what transformers passes on of a `quantization_config`: nothing where it is no object."""
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def mangled(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to four places flipped, cut, doubled, moved or overwritten."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((1, 1, 2, 8, 40)))
        match draw.randrange(5):
            case 0:
                piece = bytes(byte ^ 1 << draw.randrange(8) for byte in data[start:stop])
            case 1:
                piece = b""
            case 2:
                piece = data[start:stop] * draw.choice((2, 3, 50))
            case 3:
                piece = draw.randbytes(stop - start)
            case _:
                piece = draw.choice(
                    (b"-1", b"1e400", b"null", b"[[[[", b"{}", b"\x00", b'"', b": ", b"\n", b"&a *a", b"9" * 40)
                )
        data = data[:start] + piece + data[stop:]
    return data


def records(found: Counter[tuple[str, str]], inputs: int) -> Iterator[Record]:
    """Yield a record for each reader."""
    for name in sorted({name for name, _ in found}):
        outcomes = {outcome: count for (of, outcome), count in sorted(found.items()) if of == name}
        yield {
            "table": "reliability",
            "arm": f"fuzzed: {name}",
            "command": f"python research/fuzz.py --inputs {inputs}",
            "model": "a Llama of 3 blocks, width 32",
            "text": None,
            "calibration": None,
            "numbers": {
                "trials": sum(outcomes.values()),
                "outcomes": ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()),
            },
            **provenance(),
        }


if __name__ == "__main__":
    main()
