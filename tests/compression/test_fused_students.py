"""Students whose weights were changed before they were compressed: they learn from predictions, as all do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.distillation.requirements import check_student
from llmcompress.distillation.run import distill
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as
from tests.distillation.miniature import TEXT, recipe
from tests.tiny import save_tiny

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
STATES = [{"of": {"loss": "forward_kl"}}, {"of": {"loss": "hidden"}}]
BLOCKWISE = [{"kind": "blockwise", "steps": 2}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, a text, and the students `rotation` and `awq`."""
    folder = tmp_path_factory.mktemp("students")
    save_tiny("llama", folder / "dense", tie_word_embeddings=True)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    data = {"dataset": str(folder / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    for name, fuse in (("rotation", {"rotation": True, "untie": True}), ("awq", {"awq": True})):
        asked = {"version": 1, "rules": RULES, "calibration": data, "fuse": fuse}
        lc.compress(folder / "dense", asked, folder / name)
    return folder


@pytest.mark.slow
def test_a_rotated_student_learns_and_keeps_its_own_head(place: Path, tmp_path: Path) -> None:
    done = distill(place / "rotation", place / "dense", recipe(place, steps=8), tmp_path / "out")
    assert done.history[-1]["kl"] < done.history[0]["kl"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("student", "changes", "sentence"),
    [
        (
            "rotation",
            {"losses": STATES},
            "hidden states of this student into another basis .* leave losses on hidden states out",
        ),
        ("rotation", {"phases": BLOCKWISE}, "a blockwise phase compares hidden states.* leave the phase out"),
        ("awq", {"latents": "teacher", "rates": {"codes": 1e-3}}, "were changed by fuse: .* set latents: codes"),
        (
            "awq",
            {"adapt": {"rank": 2, "start": "residual"}, "rates": {"factors": 1e-3}},
            "start: residual} requires the teacher's weights, .* were changed by fuse: .* set start: zero",
        ),
        (
            "rotation",
            {"phases": [{"kind": "end_to_end", "regrow": {"start": "teacher"}, "rates": {"values": 1e-3}}]},
            "start: teacher} requires the teacher's weights, .* were changed by fuse: .* set start: zero",
        ),
    ],
)
def test_what_the_teacher_cannot_teach_is_refused(
    student: str, changes: dict[str, Any], sentence: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(place / student, place / "dense", recipe(place, **changes), tmp_path / "out")


def test_a_saved_student_is_known_as_fused(place: Path, tmp_path: Path) -> None:
    """Its folder has no recipe."""
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(place / "awq").save_pretrained(tmp_path / "saved")
    asked = recipe(place, latents="teacher", rates={"codes": 1e-3})
    with pytest.raises(RecipeError, match="were changed by fuse: .* set latents: codes"):
        distill(tmp_path / "saved", place / "dense", asked, tmp_path / "out")
    check_student(tmp_path / "saved", tmp_path / "saved", read_as(Distillation, asked))  # of the same weights


def test_a_section_is_refused_before_anything_is_compressed(place: Path, tmp_path: Path) -> None:
    section = {key: value for key, value in recipe(place, phases=BLOCKWISE).items() if key != "version"}
    fuse = {"rotation": True, "untie": True}
    with pytest.raises(RecipeError, match="a blockwise phase compares hidden states"):
        lc.compress(place / "dense", {"version": 1, "rules": RULES, "fuse": fuse, "distill": section}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_blocks_of_a_scaled_student_recover(place: Path, tmp_path: Path) -> None:
    """Scales leave the states between blocks as they were."""
    done = distill(place / "awq", place / "dense", recipe(place, phases=BLOCKWISE), tmp_path / "out")
    assert all(block["after"] < block["before"] for block in done.phases[0]["blocks"].values())
