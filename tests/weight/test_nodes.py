"""`children` and `rebuild` lead to all that a weight stores, under the names and selections that its disk form has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Bitmap, Dense, Weight, Where, Zero, children, rebuild, shape, stored_tensors
from tests.builders import payload_bits, seeded
from tests.tiers import expressions


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "w" in metafunc.fixturenames:
        metafunc.parametrize("w", expressions(7, 40))


def below(w: Weight, path: str = "", shown: Tensor | None = None) -> Iterator[tuple[str, Weight, Tensor | None]]:
    """`w` and all nodes below it."""
    yield path, w, shown
    for place, node, here in children(w, shown):
        yield from below(node, path + place, here)


def test_children_lead_to_every_stored_tensor_under_its_name_and_show_what_is_stored(w: Weight) -> None:
    tensors = dict(encode(w)[1])
    for path, node, shown in below(w):
        if isinstance(node, Where):
            del tensors[path + "index"]
        for part in stored_tensors(node):
            found = tensors.pop(path + part.name)
            assert 0 <= payload_bits({part.name: found}) - part.bits(shown) <= 7, f"{path}{part.name}"
            assert part.levels is not None or torch.equal(found, part.numbers(shown))
    assert not tensors, f"no node has {list(tensors)}"


def test_a_rebuilt_weight_is_the_same_bits(w: Weight) -> None:
    def again(node: Weight) -> Weight:
        return rebuild(node, lambda path, child, shown: again(child))

    (header, tensors), (header_, tensors_) = encode(w), encode(again(w))
    assert header == header_ and list(tensors) == list(tensors_)
    assert all(torch.equal(tensors[name], tensors_[name]) for name in tensors)


@pytest.mark.parametrize("whole", [True, False])
def test_rebuild_gives_each_child_its_path_and_what_shows_of_it(w: Weight, whole: bool) -> None:
    shown = None if whole else torch.rand(shape(w), generator=seeded(4)) < 0.5
    found = iter(children(w, shown))

    def met(path: str, node: Weight, here: Tensor | None) -> Weight:
        path_, node_, here_ = next(found)
        assert path == path_ and node is node_
        assert here is here_ or torch.equal(here, here_)  # type: ignore[arg-type]
        return Zero(shape(node))

    emptied = rebuild(w, met, shown)
    assert next(found, None) is None
    assert all(isinstance(node, Zero) for _, node, _ in children(emptied)) and shape(emptied) == shape(w)


def test_hidden_elements_do_not_matter(w: Weight) -> None:
    """Neither to the matrix, where it shows, nor to the bits."""
    outer = torch.rand(shape(w), generator=seeded(4)) < 0.5
    for shown in (None, outer):

        def littered(path: str, node: Weight, here: Tensor | None) -> Weight:
            if here is None:
                return node
            return Where(Bitmap(here.expand(shape(node))), node, Dense(torch.full(shape(node), 9.0)))

        visible = torch.ones(shape(w), dtype=torch.bool) if shown is None else shown
        assert torch.equal(dense(rebuild(w, littered, shown))[visible], dense(w)[visible])
        counted = sum(part.bits(shown) for part in stored_tensors(w)) + sum(
            bits(node, here) for _, node, here in children(w, shown)
        )
        index = bits(Where(w.index, Zero(shape(w)), Zero(shape(w)))) if isinstance(w, Where) else 0
        assert counted + index == bits(w, shown)
