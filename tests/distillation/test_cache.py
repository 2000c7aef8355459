"""The cached teacher: disk holds what was predicted; an interrupted writing resumes; other runs' caches are refused."""

from __future__ import annotations

import json
import math
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForMultimodalLM

import llmcompress as lc
from llmcompress.cli.distill import distilled_view
from llmcompress.data.batch import Batch
from llmcompress.distillation import setup
from llmcompress.distillation.held_out import distances
from llmcompress.distillation.objective.forward import check_head
from llmcompress.distillation.run import distill
from llmcompress.distillation.teacher import cache
from llmcompress.distillation.teacher.cache import Cache, CacheOrigin, open_cache, tokens_digest, write_cache
from llmcompress.distillation.teacher.predictions import HeldOutTeacher, Likeliest
from llmcompress.errors import (
    DiskError,
    InputError,
    LLMCompressError,
    LockedError,
    NumericsError,
    RecipeError,
    Termination,
)
from tests.compression.test_towers import TOWERS
from tests.distillation import miniature
from tests.tiny import save_tiny, tiny
from tests.zoo import ZOO

VOCABULARY = 300  # so that ids take two bytes


class Predictor:
    """A teacher whose logits follow from the token before; counts the sequences that it is asked for."""

    def __init__(self, text: Batch, cut_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 3
        self.text = text
        self.read, self.cut_at = 0, cut_at

    def of(self, rows: Any) -> Tensor:
        return self.table[self.text.ids[rows][self.text.predicting[rows]]]

    def __call__(self, rows: slice) -> Iterator[Tensor]:
        self.read += len(self.text[rows])
        yield self.of(rows)[:2]
        if self.cut_at is not None and self.read > self.cut_at:
            raise Cut
        yield self.of(rows)[2:]


class Cut(Exception):
    """An interruption of a writing."""


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Seven sequences of nine tokens, some of which count; two sequences are a run."""
    monkeypatch.setattr(cache, "CHUNK", 18)
    generator = torch.Generator().manual_seed(0)
    ids, counted = torch.randint(VOCABULARY, (7, 9), generator=generator), torch.rand(7, 9, generator=generator) < 0.7
    counted[:, 0] = False
    return Batch(ids, counted)


def origin(text: Batch, **other: Any) -> CacheOrigin:
    return replace(CacheOrigin("a", tokens_digest(text), 5, "float32"), **other)


def written(folder: Path, text: Batch, predictor: Predictor, **other: Any) -> Cache:
    write_cache(folder, origin(text, **other), text.counted, predictor, VOCABULARY)
    return open_cache(folder, origin(text, **other), text.counted)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cached_predictions_equal_the_teachers(tmp_path: Path, text: Batch) -> None:
    teacher = Predictor(text)
    found = written(tmp_path / "c", text, teacher)
    for numbers in ([0], [6, 2, 2], list(range(7))):
        expected, given = Likeliest.of(torch.cat([teacher.of(n) for n in numbers]), 5), found.of(numbers)
        assert torch.equal(given.ids, expected.ids) and given.vocabulary() == VOCABULARY
        assert_close(given.log_p, expected.log_p, rtol=2**-11, atol=0)  # half a unit of float16
        assert_close(given.log_tail, expected.log_tail, rtol=2**-11, atol=1e-7)
    assert found.records.itemsize == 5 * (2 + 2) + 2 and isinstance(found.records, np.memmap)
    size = (tmp_path / "c" / "predictions.npy").stat().st_size
    assert size - int(text.counted.sum()) * found.records.itemsize in range(256)  # and a header
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize("vocabulary, width", [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_ids_take_the_smallest_integers(vocabulary: int, width: int) -> None:
    assert cache.record_type(3, vocabulary)["ids"].base.itemsize == width


@pytest.mark.parametrize("cut_at", [0, 3, 6])
def test_interrupted_writing_resumes_to_the_same_bytes(cut_at: int, tmp_path: Path, text: Batch) -> None:
    written(tmp_path / "whole", text, Predictor(text))
    with pytest.raises(Cut):
        written(tmp_path / "cut", text, Predictor(text, cut_at))
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.partial").is_dir()
    teacher = Predictor(text)
    written(tmp_path / "cut", text, teacher)
    assert teacher.read == 7 - cut_at // 2 * 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    again = Predictor(text)
    written(tmp_path / "cut", text, again)
    assert again.read == 0


def test_a_signal_ends_the_writing_after_a_run(tmp_path: Path, text: Batch) -> None:
    class Stopping(Predictor):
        def __call__(self, rows: slice) -> Iterator[Tensor]:
            os.kill(os.getpid(), signal.SIGTERM)
            yield from super().__call__(rows)

    with pytest.raises(Termination, match=r"2 of 7 sequences are kept in .*c\.partial, from where the same command"):
        written(tmp_path / "c", text, Stopping(text))
    teacher = Predictor(text)
    written(tmp_path / "c", text, teacher)
    assert teacher.read == 5


@pytest.mark.parametrize("stage", ["c", "c.partial"])
@pytest.mark.parametrize(
    "other, words",
    [
        ({"teacher": "b"}, "teacher changed"),
        ({"k": 6}, "k changed"),
        ({"dtype": "x", "tokens": "y"}, "tokens and dtype changed"),
    ],
)
def test_a_cache_of_another_origin_is_refused(
    stage: str, other: dict[str, Any], words: str, tmp_path: Path, text: Batch
) -> None:
    if stage == "c":
        written(tmp_path / "c", text, Predictor(text))
    else:
        with pytest.raises(Cut):
            written(tmp_path / "c", text, Predictor(text, 3))
    with pytest.raises(
        InputError, match=rf"{stage} was left by a different run .{words}.; remove it, or name another folder"
    ):
        written(tmp_path / "c", text, Predictor(text), **other)


def test_all_that_the_teacher_reads_is_part_of_the_origin(text: Batch) -> None:
    others = [text[:6], text[torch.arange(6, -1, -1)], replace(text, counted=~text.counted)]
    others += [replace(text, documents=torch.arange(9).expand(7, 9) // width) for width in (3, 4)]
    assert len({tokens_digest(each) for each in (text, *others)}) == 6


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "predictions.npy").unlink(), "cannot be read"),
        (lambda folder: os.truncate(folder / "predictions.npy", 500), "cannot be read"),
        (lambda folder: (folder / "cache.json").write_text("{"), "cache.json cannot be read .*; remove"),
        (lambda folder: (folder / "cache.json").write_text("[]"), "cache.json cannot be read .*; remove"),
        (lambda folder: (folder / "cache.json").unlink(), "is not a cache of a teacher's predictions"),
    ],
)
def test_a_damaged_cache_is_refused(damage: Callable[[Path], object], words: str, tmp_path: Path, text: Batch) -> None:
    written(tmp_path / "c", text, Predictor(text))
    damage(tmp_path / "c")
    with pytest.raises(InputError, match=words):
        written(tmp_path / "c", text, Predictor(text))


def test_nan_a_lock_and_a_full_disk_are_reported(tmp_path: Path, text: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[LLMCompressError], words: str, teacher: Predictor) -> None:
        with pytest.raises(kind, match=words):
            written(tmp_path / "c", text, teacher)
        assert not (tmp_path / "c").exists()

    broken = Predictor(text)
    broken.table[:] = torch.nan
    refused(NumericsError, "the teacher's predictions are NaN", broken)
    with FileLock(tmp_path / "c.partial.lock"):
        refused(LockedError, "is being written by another process", Predictor(text))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused(DiskError, "cannot be written .*No space left.*; free some space", Predictor(text))
    written(tmp_path / "c", text, Predictor(text))


def test_a_held_out_teacher_measures_the_same_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    for family, changes in (("llama", {}), ("gemma2", {"final_logit_softcapping": 5.0})):
        teacher, student = tiny(family, **changes), tiny(family, seed=1, **changes)
        parts = [Batch.of(torch.randint(256, (3, 20), generator=generator)) for _ in range(2)]
        parts[0].counted[1, 12:] = False  # padded behind its end
        parts[1] = replace(parts[1], documents=(torch.arange(20) // 7).expand(3, 20))
        held_out, device = HeldOutTeacher(teacher, parts), torch.device("cpu")
        for part in parts:
            assert distances(held_out, student, part, device) == distances(teacher, student, part, device)
        assert set(dict(held_out.named_parameters())) <= {"linear.weight"}
        with pytest.raises(KeyError):
            distances(held_out, student, Batch.of(parts[0].ids + 1), device)


@pytest.mark.parametrize("name", ["llava", "gemma4"])
def test_a_held_out_teacher_stands_for_one_that_reads_images(name: str) -> None:
    """Gemma 4 caps its logits, as only its own forward says."""
    capped = {"vocab_size": VOCABULARY, "pad_token_id": 0, "final_logit_softcapping": 0.5}
    settings = {"text_config": ZOO["gemma4_text"] | capped} if name == "gemma4" else TOWERS[name]
    torch.manual_seed(0)
    teacher = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(name, **settings)).eval()
    teacher.get_output_embeddings().weight.data.normal_()
    part, device = Batch.of(torch.arange(24).view(2, 12)), torch.device("cpu")
    check_head(teacher, part.ids)
    held_out, student = HeldOutTeacher(teacher, [part]), tiny("llama", vocab_size=teacher.config.text_config.vocab_size)
    assert distances(held_out, student, part, device) == distances(teacher, student, part, device)


# --- distillations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model whose predictions are not flat, a `small` one made from it, and a text."""
    place = tmp_path_factory.mktemp("cached")
    save_tiny("llama", place / "dense", tie_word_embeddings=True, initializer_range=0.2)
    (place / "text.txt").write_text("".join(f"{i}. {miniature.TEXT}" for i in range(80)))
    data = {"dataset": str(place / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
    lc.compress(place / "dense", {"version": 1, "rules": rules, "calibration": data}, place / "small")
    return place


def recipe(folders: Path, **more: Any) -> dict[str, Any]:
    return miniature.recipe(
        folders, **{"rates": {"scales": 5e-3, "norms": 5e-3}, "evaluate_every": 9, "steps": 9} | more
    )


@pytest.mark.slow
def test_a_cached_teacher_recovers_what_an_online_one_does(folders: Path, tmp_path: Path) -> None:
    def distilled(name: str, **teacher: Any) -> Any:
        return distill(folders / "small", folders / "dense", recipe(folders, teacher=teacher), tmp_path / name)

    online, whole = distilled("online", kind="online"), distilled("whole", kind="cached", k=1000)
    few = distilled("few", kind="cached", k=32, folder=str(tmp_path / "shared" / "cache"))
    start = online.history[0]["kl"]
    recovered = [start - done.history[-1]["kl"] for done in (online, whole, few)]
    assert start == whole.history[0]["kl"] == few.history[0]["kl"] and recovered[0] > 0.2 * start
    assert math.isclose(recovered[1], recovered[0], rel_tol=0.01)  # all but for float16
    assert recovered[2] > 0.8 * recovered[0]
    assert online.cache_bias is None
    for bias in few.cache_bias.values():
        assert 0.1 < bias["tail_mass"] < 0.7 and 0 < bias["kl_with_tail"] < bias["kl"]
    assert math.isclose(few.cache_bias["after"]["kl"], few.history[-1]["kl"], rel_tol=1e-5)
    assert few.cache_bias["before"]["tail_mass"] == few.cache_bias["after"]["tail_mass"]
    bias = whole.cache_bias["after"]
    assert bias["tail_mass"] == 0 and math.isclose(bias["kl"], bias["kl_with_tail"], rel_tol=0.01)
    assert json.loads((tmp_path / "few" / "distillation.json").read_text())["cache_bias"] == few.cache_bias
    assert any("teacher's mass in the tail" in str(part) for part in distilled_view(few.to_json(), False))
    assert {path.name for path in tmp_path.iterdir()} == {"online", "whole", "few", "shared"}
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"cache"}


@pytest.mark.slow
def test_the_teacher_is_gone_while_the_student_learns(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = setup.load_model

    def counted(*given: Any, **more: Any) -> Any:
        model = load(*given, **more)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(setup, "load_model", counted)
    alive: list[int] = []
    teacher = {"kind": "cached", "k": 8, "folder": str(tmp_path / "cache")}
    asked = recipe(folders, steps=4, teacher=teacher, controls=["no_teacher"])
    distill(
        folders / "small",
        folders / "dense",
        asked,
        tmp_path / "a",
        progress=lambda *_: alive.append(sum(ref() is not None for ref in loaded)),
    )
    assert len(loaded) == 4 and alive == [1] * 8, "in the control, too"
    read: list[Any] = []
    monkeypatch.setattr(cache.ModelLogits, "__call__", lambda *given: read.append(given))
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "b")
    assert not read and again.steps == 4


def test_a_trial_leaves_a_named_cache_alone(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=1, teacher={"kind": "cached", "k": 8, "folder": str(tmp_path / "cache")})
    for number, trial in enumerate((True, False, True)):
        distill(folders / "small", folders / "dense", asked | {"trial": trial}, tmp_path / str(number))
        assert (tmp_path / "cache").exists() == (number > 0)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "cache"}


@pytest.mark.parametrize(
    "more, sentence",
    [
        (
            {"losses": [{"of": {"loss": "dad"}}, {"of": {"loss": "topk"}}]},
            "losses: dad and topk, with these arguments, cannot be",
        ),
        (
            {"losses": [{"of": {"loss": "forward_kl"}}, {"of": {"loss": "hidden"}}]},
            "losses: hidden cannot be computed from a cached teacher, which has no hidden states; use `teacher: {kind",
        ),
        (
            {"losses": [{"of": {"loss": "forward_kl", "temperature": 2}}]},
            "forward_kl, with these arguments, cannot be computed",
        ),
        ({"teacher": {"kind": "cached", "k": 0}}, "k"),
        ({"teacher": {"kind": "cached", "kk": 3}}, 'unknown key "kk"'),
        ({"teacher": {"k": 3}}, "k and folder apply to a cached teacher only"),
        ({"teacher": {"kind": "offline"}}, "online"),
    ],
)
def test_impossible_recipes_are_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, teacher={"kind": "cached"}) | more
    with pytest.raises(RecipeError, match=sentence):
        distill(folders / "small", folders / "dense", asked, tmp_path / "out")


def test_losses_that_need_no_teacher_or_symbols_are_allowed(folders: Path) -> None:
    from llmcompress.recipe.distillation import Distillation

    names = ("forward_kl", "reverse_kl", "js", "skewed_kl", "taid", "cross_entropy")
    losses = [{"of": {"loss": name}} for name in names]
    asked = Distillation.model_validate(recipe(folders, teacher={"kind": "cached"}, losses=losses))
    assert asked.teacher.k == 64 and asked.teacher.folder is None


@pytest.mark.slow
def test_phases_that_need_the_teachers_weights_reload_it(folders: Path, tmp_path: Path) -> None:
    phases = [
        {"kind": "blockwise", "steps": 1, "rates": {"scales": 5e-3}},
        {"kind": "end_to_end", "steps": 2, "rates": {"codes": 1e-2}, "latents": "teacher"},
    ]
    online, cached = (
        distill(
            folders / "small",
            folders / "dense",
            recipe(folders, phases=phases, teacher=teacher),
            tmp_path / str(number),
        )
        for number, teacher in enumerate(({"kind": "online"}, {"kind": "cached", "k": 1000}))
    )
    for one, other in zip(online.history, cached.history, strict=True):
        assert math.isclose(one["kl"], other["kl"], rel_tol=0.01), one
    assert cached.cache_bias is not None and cached.cache_bias["after"]["kl"] < cached.cache_bias["before"]["kl"]
