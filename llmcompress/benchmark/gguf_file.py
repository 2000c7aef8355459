"""The header of a GGUF file: sizes of its tensors, vocabulary and context, read without any package.

Layout: magic, version, counts of tensors and of entries; the entries; the tensors' names, dimensions, types and places;
the tensors, each at a multiple of the alignment.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmcompress.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # with 64-bit counts, little endian
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
LONGEST = 2**26  # bytes of a string, entries, dimensions: more is damage
TABLE, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file. `sizes`: bytes of each tensor with its padding; `context`: None where the file does not say."""

    bytes: int
    sizes: dict[str, int]
    vocabulary: int
    context: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that are read for a token: all but the rows of the token table that are not looked up.

        The table is read whole where there is no output head beside it.
        """
        everything = sum(self.sizes.values())
        return everything if HEAD not in self.sizes else everything - _others(self.sizes[TABLE], self.vocabulary)


def _others(size: int, rows: int) -> int:
    """Return the bytes of a table without one of its rows."""
    return size - -(-size // rows)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file. Raises InputError for one that is missing, of another kind, damaged, or in parts."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a GGUF file")
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise InputError(
                    f"{path} is not a GGUF file: it does not begin with the letters GGUF; give one that is"
                )
            entries, places, start = _header(file, path)
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path} ends or breaks off inside its header; download or write it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give another GGUF file") from error
    if (parts := _number(entries, "split.count") or 1) > 1:
        raise InputError(f"{path} is one of {parts} parts; merge them into one file first")
    dimensions, _ = places.get(TABLE, ([], 0))
    if len(dimensions) != 2 or min(dimensions) < 1:
        raise InputError(f"{path} holds no token table ({TABLE}), so no language model; give another GGUF file")
    total = path.stat().st_size
    context = _number(entries, f"{entries.get('general.architecture')}.context_length")
    return GgufFile(total, _sizes(places, total - start, path), dimensions[1], context)


def _number(entries: dict[str, Any], key: str) -> int | None:
    """Return an entry that is a positive whole number; None where there is none such."""
    found = entries.get(key)
    return found if isinstance(found, int) and found > 0 else None


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, tuple[list[int], int]], int]:
    """Return the entries, each tensor's (dimensions, first byte), and the place that those bytes count from."""
    (version,) = _unpack(file, "I")
    if version not in VERSIONS:
        raise InputError(f"{path} is GGUF of version {version}, not 2 or 3; convert it with a newer tool")
    tensors, count = _unpack(file, "QQ")
    entries = {}
    for _ in range(count):
        key = _string(file)
        (kind,) = _unpack(file, "I")
        entries[key] = _value(file, kind)
    places = {}
    for _ in range(tensors):
        name = _string(file)
        (dimensions,) = _unpack(file, "I")
        sizes = list(_unpack(file, f"{_checked(dimensions)}Q"))
        _, offset = _unpack(file, "IQ")
        places[name] = (sizes, offset)
    alignment = _number(entries, "general.alignment") or ALIGNMENT
    return entries, places, -(-file.tell() // alignment) * alignment


def _value(file: BinaryIO, kind: int) -> Any:
    """Return a value; of an array, its length."""
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        inner, count = _unpack(file, "IQ")
        if inner in VALUES:
            _exactly(file, _checked(count) * struct.calcsize(VALUES[inner]))
        elif inner == STRING:
            for _ in range(_checked(count)):
                _string(file)
        else:  # arrays of arrays, which nothing writes
            raise EOFError
        return count
    if kind not in VALUES:
        raise EOFError
    return _unpack(file, VALUES[kind])[0]


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _exactly(file, _checked(length)).decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))


def _exactly(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise EOFError
    return found


def _checked(count: int) -> int:
    if count > LONGEST:
        raise EOFError
    return count


def _sizes(places: dict[str, tuple[list[int], int]], held: int, path: Path) -> dict[str, int]:
    """Return the bytes from each tensor to the next one, of the `held` that follow the header."""
    order = sorted(places, key=lambda name: places[name][1])
    stops = [places[name][1] for name in order[1:]] + [held]
    sizes = {name: stop - places[name][1] for name, stop in zip(order, stops)}
    if any(size <= 0 for size in sizes.values()):
        raise InputError(f"{path} is shorter than its header says; download or write it again")
    return sizes
