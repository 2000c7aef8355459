"""Changes of JSON for tests of readers: any place of a document, set to any value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]
NUMBERS = (-1, 0, 1, 2, 3, 7, 16, 24, 255, 256, 257, 10**6, 2**31, 2**63, 10**12, 10**30)


def places(document: Any, above: Place = ()) -> Iterator[Place]:
    """Yield the way to every value within a document, and to a key and an element that it lacks."""
    if isinstance(document, dict):
        yield (*above, "unknown")
        for key, value in document.items():
            yield (*above, key)
            yield from places(value, (*above, key))
    elif isinstance(document, list):
        yield (*above, len(document))
        for number, value in enumerate(document):
            yield (*above, number)
            yield from places(value, (*above, number))


def changed(document: Any, place: Place, value: Any) -> Any:
    """Return a copy of a document with `value` at `place`; `REMOVED` takes away what is there."""
    first, *rest = place
    copied = dict(document) if isinstance(document, dict) else [*document]
    if rest:
        copied[first] = changed(copied[first], tuple(rest), value)
    elif isinstance(copied, list) and first == len(copied):
        copied.extend([] if value is REMOVED else [value])
    elif value is REMOVED:
        copied.pop(first, *([None] if isinstance(copied, dict) else []))
    else:
        copied[first] = value
    return copied


REMOVED: Any = object()


def values(document: Any) -> st.SearchStrategy[Any]:
    """Draw any JSON value, a value found elsewhere in the document, one near it, or `REMOVED`."""
    inside = [_at(document, place) for place in places(document) if place[-1] != "unknown"]
    numbers = sorted({value + step for value in inside if type(value) is int for step in (-1, 1)})
    texts = sorted({value for value in inside if type(value) is str})
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(NUMBERS),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(numbers or [0]),
        st.sampled_from(texts or [""]),
        st.just(REMOVED),
    )
    anything = st.recursive(
        leaves.filter(lambda value: value is not REMOVED),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    return st.one_of(leaves, anything, st.sampled_from([value for value in inside if value is not None] or [0]))


def _at(document: Any, place: Place) -> Any:
    for step in place:
        if isinstance(document, list) and step == len(document):
            return None
        document = document[step]
    return document
