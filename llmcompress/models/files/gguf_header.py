"""The header of a GGUF file: entries, types and sizes of its tensors, vocabulary and context.

The package gguf reads headers too, but keeps every token of the vocabulary as an array: 20 s and 640 MB for Llama 3.

Layout: magic, version, counts of tensors and of entries; the entries; the tensors' names, dimensions, types and places;
the tensors, each at a multiple of the alignment.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from llmcompress.errors import InputError
from llmcompress.models.files.reading import check_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # with 64-bit counts, little endian
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
LONGEST = 2**26  # bytes of a string, entries, dimensions: more is damage
MOST_NUMBERS = 2**22  # of an array, each of which the package gguf makes an object
TYPES = {  # of tensors, by their numbers
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
FLOATS = {"F32", "F16", "BF16", "F64"}
ENDS = ("eos", "eot", "eom")  # tokens after which llama.cpp stops, in names of entries: of a text, a turn, a message
Places = dict[str, tuple[list[int], int, int]]
TABLE, HEAD = "token_embd.weight", "output.weight"
ORIGINAL = "give the folder or the Hub id of the model that it was made of"


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    entries: numbers and strings by key, arrays by their length. sizes: bytes of each tensor with its padding.
    types: weights by the type that stores them, most first. packed: tensors in a type of few bits. context: None where
    the file does not say.
    """

    bytes: int
    entries: dict[str, Any]
    sizes: dict[str, int]
    types: dict[str, int]
    packed: int
    vocabulary: int
    context: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that are read for a token: everything, but one row only of a token table beside a head, and
        of experts as many as a token is given."""
        counted = f"{self.entries.get('general.architecture')}.expert"
        used, experts = (_positive(self.entries, f"{counted}_{key}count") or 1 for key in ("used_", ""))
        share = min(1.0, used / experts)
        everything = sum(round(size * share) if "_exps." in name else size for name, size in self.sizes.items())
        if HEAD not in self.sizes:
            return everything
        table = self.sizes[TABLE]
        return everything - (table - -(-table // self.vocabulary))


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a file. Raises InputError for one that is missing, of another kind, damaged, or in parts."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a GGUF file")
    check_regular(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise InputError(
                    f"{path} is not a GGUF file: it does not begin with the letters GGUF; give one that is"
                )
            entries, places, start = _read_header(file, path)
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path} ends or breaks off inside its header; download or write it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give another GGUF file") from error
    if (parts := _positive(entries, "split.count") or 1) > 1:
        raise InputError(f"{path} is one of {parts} parts; merge them into one file first")
    dimensions, _, _ = places.get(TABLE, ([], 0, 0))
    if len(dimensions) != 2 or min(dimensions) < 1:
        raise InputError(f"{path} holds no token table ({TABLE}), so no language model; give another GGUF file")
    total = path.stat().st_size
    context = _positive(entries, f"{entries.get('general.architecture')}.context_length")
    sizes = _sizes({name: offset for name, (_, _, offset) in places.items()}, total - start, path)
    packed = sum(TYPES.get(kind) not in FLOATS for _, kind, _ in places.values())
    return GGUFHeader(total, entries, sizes, _count_types(places), packed, dimensions[1], context)


def _count_types(places: Places) -> dict[str, int]:
    """Return the weights by the type that stores them, most first; a type without a name here by its number."""
    counts: Counter[str] = Counter()
    for dimensions, kind, _ in places.values():
        counts[TYPES.get(kind, f"type {kind}")] += prod(dimensions)
    return dict(counts.most_common())


def _positive(entries: dict[str, Any], key: str) -> int | None:
    """Return an entry that is a positive whole number; None for any other, and for none."""
    value = entries.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], Places, int]:
    """Return the entries, each tensor's (dimensions, type, first byte), and the place that those bytes count from."""
    (version,) = _unpack(file, "I")
    if version not in VERSIONS:
        raise InputError(f"{path} is GGUF of version {version}, not 2 or 3; convert it with a newer tool")
    tensors, count = _unpack(file, "QQ")
    entries = {}
    for _ in range(count):
        key = _read_string(file)
        (kind,) = _unpack(file, "I")
        entries[key] = _read_value(file, kind)
    places: Places = {}
    for _ in range(tensors):
        name = _read_string(file)
        (dimensions,) = _unpack(file, "I")
        sizes = list(_unpack(file, f"{_plausible(dimensions)}Q"))
        kind, offset = _unpack(file, "IQ")
        places[name] = (sizes, kind, offset)
    alignment = _positive(entries, "general.alignment") or ALIGNMENT
    return entries, places, -(-file.tell() // alignment) * alignment


def _read_value(file: BinaryIO, kind: int) -> Any:
    """Return a value; of an array, its length. Raises EOFError for unknown kinds."""
    if kind == STRING:
        return _read_string(file)
    if kind == ARRAY:
        inner, count = _unpack(file, "IQ")
        if inner in VALUES:
            if count > MOST_NUMBERS:
                raise EOFError
            _read_bytes(file, count * struct.calcsize(VALUES[inner]))
        elif inner == STRING:
            for _ in range(_plausible(count)):
                _read_string(file)
        else:  # arrays of arrays, which nothing writes
            raise EOFError
        return count
    if kind not in VALUES:
        raise EOFError
    return _unpack(file, VALUES[kind])[0]


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _read_bytes(file, length).decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, _read_bytes(file, struct.calcsize(form)))


def _read_bytes(file: BinaryIO, count: int) -> bytes:
    content = file.read(_plausible(count))
    if len(content) < count:
        raise EOFError
    return content


def _plausible(count: int) -> int:
    """Return a count. Raises EOFError for one that only damage explains."""
    if count > LONGEST:
        raise EOFError
    return count


def _sizes(offsets: dict[str, int], total: int, path: Path) -> dict[str, int]:
    """Return the bytes from each tensor to the next one, of the `total` that follow the header."""
    order = sorted(offsets, key=lambda name: offsets[name])
    stops = [offsets[name] for name in order[1:]] + [total]
    sizes = {name: stop - offsets[name] for name, stop in zip(order, stops)}
    if any(size <= 0 for size in sizes.values()):
        raise InputError(f"{path} is shorter than its header says; download or write it again")
    return sizes
