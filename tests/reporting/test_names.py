"""Names of points in a picture: where points lie close together, none covers another, a point, or the edge."""

from __future__ import annotations

from itertools import combinations

import pytest

pytest.importorskip("matplotlib")
from matplotlib.transforms import Bbox

from llmcompress.reporting.plots import new_figure, write_name


@pytest.mark.parametrize("gap", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("middle", [0.5, 0.02, 0.98])
def test_names_of_near_points_do_not_overlap(middle: float, gap: float) -> None:
    figure = new_figure()
    axes = figure.subplots()
    points = [(0.5, middle + gap * number) for number in range(-2, 3)]
    axes.set(xlim=(0, 1), ylim=(-0.5, 1.5))
    figure.draw_without_rendering()
    corners = axes.transData.transform(points)
    boxes = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in corners]
    for point in points:
        boxes.append(write_name(axes, point, "a name of some length", boxes))
    names = boxes[len(points) :]
    assert all(axes.bbox.contains(*corner) for box in names for corner in box.corners())
    assert not any(one.overlaps(other) for one, other in combinations(names, 2))
    assert not any(name.count_overlaps(boxes[: len(points)]) for name in names)
