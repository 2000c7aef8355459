"""YAML as recipes use it: plain data, no key twice, and the line of every entry for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from llmcompress.errors import RecipeError

Path = tuple[str | int, ...]  # ("rules", 0, "match"): where an entry is
Places = dict[Path, str]  # "recipe.yaml:14": where its author wrote it

MOST_ENTRIES = 50_000  # an alias counts with each use, so that a small file cannot stand for a huge one
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # control characters, halves of characters
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 takes 1e-4 for text
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")}


def parse(text: str, name: str) -> tuple[Any, Places]:
    """Return the value of `text`, and the place of each entry as `name:line`. Raises RecipeError."""
    try:
        loader = yaml.SafeLoader(text)  # not the C one, which crashes on deep nesting
        node = loader.get_single_node()
        reader = _NodeReader(loader, name)
        return (None if node is None else reader.value(node, ())), reader.places
    except yaml.YAMLError as error:
        raise RecipeError(fault(error, name)) from error
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF"
        raise RecipeError(f"{name}: this is not YAML (an escape stands for no character)") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: entries are nested too deeply for a recipe") from error


def fault(error: yaml.YAMLError, name: str | None = None) -> str:
    """Return the sentence on text that is not YAML. `name` is that of the text; None for the name of its file."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name or getattr(error, 'name', 'a file')}: this is not YAML ({str(error).splitlines()[0]})"
    mark = error.problem_mark or error.context_mark
    where = name or "a file" if mark is None else f"{name or mark.name}:{mark.line + 1}"
    return f"{where}: this is not YAML ({shorten(error.problem or error.context, 200)})"


class _NodeReader:
    """Turns YAML nodes into values, and notes their places."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.loader, self.name = loader, name
        self.places: Places = {}
        self.entries = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        """Return the value of a node."""
        self.entries += 1
        if self.entries > MOST_ENTRIES:
            raise RecipeError(f"{self._line(node)}: a recipe has at most {MOST_ENTRIES} entries; shorten it")
        self.places.setdefault(path, self._line(node))
        if node.tag not in _PLAIN:
            raise RecipeError(f"{self._line(node)}: the tag {node.tag} is not allowed here; write plain values")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, number)) for number, item in enumerate(node.value)]
        return dict(self._items(node, path))

    def _items(self, node: yaml.Node, path: Path) -> Iterator[tuple[str, Any]]:
        first_lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            where = self._line(key_node)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{where}: a key is a list or a map; write a word")
            if not key_node.tag.endswith((":str", ":merge")):
                raise RecipeError(f'{where}: the key {shorten(key)} is not text; write it as "{shorten(key)}"')
            if key in first_lines:
                raise RecipeError(
                    f'{where}: the key "{shorten(key)}" is already at {first_lines[key]}; remove one of them'
                )
            first_lines[key] = where
            self.places[(*path, key)] = where
            yield key, self.value(value_node, (*path, key))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.style is None and node.tag.endswith(":str") and EXPONENT.fullmatch(node.value):
            return float(node.value)
        try:
            value = self.loader.construct_object(node)
            str(value)  # no message could show a hexadecimal number of thousands of digits
        except (ValueError, ArithmeticError, LookupError, AttributeError) as error:  # `!!bool 7` is a KeyError
            reason = error if isinstance(error, ValueError) else f"no {node.tag.rpartition(':')[2]}"
            raise RecipeError(f"{self._line(node)}: {shorten(node.value)} is not a value ({reason})") from error
        return value

    def _line(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"


def shorten(value: object, most: int = 40) -> str:
    """Return a value for a sentence: at most `most` characters, and escapes for those that cannot be printed."""
    text = str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def at(path: Path, places: Places) -> str:
    """Return "recipe.yaml:14: " for `path`, or for what encloses it; without places the path itself."""
    for length in range(len(path), -1, -1):
        if path[:length] in places:
            return f"{places[path[:length]]}: "
    return f"{shorten(dotted_path(path), 100)}: " if path else ""


def dotted_path(path: Path) -> str:
    """Return a path as `--set` spells it: "rules[0].steps[1].rank"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


class _Dumper(yaml.SafeDumper):
    """Indents lists, and quotes text that YAML 1.1 would read as something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent list items below their key."""
        return super().increase_indent(flow, False)


class OneLine(dict[str, Any]):
    """A map to be written on one line."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))  # quotes text like 1e-4
_Dumper.add_representer(
    OneLine, lambda dumper, values: dumper.represent_mapping("tag:yaml.org,2002:map", values, flow_style=True)
)


def write_yaml(values: Any) -> str:
    """Return plain values as YAML text that `parse` reads back equal; a `OneLine` map takes one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=110)
