"""A teacher in 8 or 4 bits: near the dense one, what is learned from, and never what is measured against."""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import llmcompress as lc
from llmcompress.cli.distill import distilled_view
from llmcompress.distillation import requirements, setup
from llmcompress.distillation.parallel.launch import check_sharding
from llmcompress.distillation.requirements import check_requirements
from llmcompress.distillation.run import distill
from llmcompress.distillation.teacher import quantized
from llmcompress.distillation.teacher.cache import CacheOrigin, open_cache, record_type
from llmcompress.distillation.teacher.quantized import Bits, load_quantized, silence_bitsandbytes
from llmcompress.errors import InputError, MemoryLimitError, NumericsError, RecipeError
from llmcompress.evaluation.distance import kl_divergence
from llmcompress.formats.model_card import DistillationRecord, _distillation
from llmcompress.models.dense.locate import Place, locate
from llmcompress.recipe.distillation import Distillation
from tests.distillation import miniature
from tests.models.test_packed import fp8, store
from tests.tiny import save_tiny, tiny_tokenizer

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model whose predictions are not flat, a `small` one made from it, and a text."""
    folder = tmp_path_factory.mktemp("quantized")
    save_tiny("llama", folder / "dense", tie_word_embeddings=True, initializer_range=0.2)
    (folder / "text.txt").write_text("".join(f"{i}. {miniature.TEXT}" for i in range(80)))
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
    lc.compress(folder / "dense", {"version": 1, "rules": rules}, folder / "small")
    return folder


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    return miniature.recipe(place, **{"rates": {"scales": 5e-3, "norms": 5e-3}, "evaluate_every": 9, "steps": 9} | more)


def predictions(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def decoded(weight: Any) -> Tensor:
    """Return the weight that transformers decodes a quantized one to."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, SimpleNamespace(SCB=None))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gpt2's linears hold their weights as [in, out]
def test_quantized_teachers_of_any_shape_are_near_the_dense_model(family: str, tmp_path: Path) -> None:
    """Widths of 32 and 48 are no multiples of NF4's blocks of 64, let alone of what fast kernels ask for."""
    dense = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path / "dense"))
    exact, distances = predictions(dense), {}
    for bits in (8, 4):
        for dtype in (torch.float32, torch.bfloat16):
            model = load_quantized(locate(str(tmp_path / "dense")), bits, CPU, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), silence_bitsandbytes():
                distances[bits, dtype] = float(kl_divergence(exact, predictions(model)).mean())
            assert not model.training and not any(value.requires_grad for value in model.parameters())
            assert model.dtype == dtype and torch.equal(
                model.get_input_embeddings().weight, dense.get_input_embeddings().weight.to(dtype)
            )
    assert all(0 < distances[8, dtype] < 2e-4 for dtype in (torch.float32, torch.bfloat16)), distances
    assert all(4 * distances[8, dtype] < distances[4, dtype] < 0.05 for _, dtype in distances), distances


@pytest.mark.parametrize("bits", [8, 4])
def test_the_linears_of_blocks_take_as_many_bits(bits: Bits, place: Path) -> None:
    model = load_quantized(locate(str(place / "dense")), bits, CPU, torch.float32)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 14
    for linear in linears:
        numbers = linear.in_features * linear.out_features
        assert linear.weight.numel() * linear.weight.element_size() * 8 == bits * numbers
    assert type(model.get_output_embeddings()) is nn.Linear


# --- distillations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded_student(place: Path) -> Path:
    """A dense model whose numbers are those of the 4-bit teacher, beside the others."""
    teacher = load_quantized(locate(str(place / "dense")), 4, CPU, torch.float32)
    student = AutoModelForCausalLM.from_pretrained(place / "dense")
    for name, module in teacher.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            student.model.layers.get_submodule(name).weight.data = decoded(module.weight)
    student.save_pretrained(place / "decoded")
    tiny_tokenizer().save_pretrained(place / "decoded")
    return place / "decoded"


@pytest.mark.parametrize("kind", ["online", pytest.param("cached", marks=pytest.mark.slow)])
def test_losses_are_to_the_quantized_teacher_and_looks_to_the_dense_one(
    kind: str, place: Path, decoded_student: Path, tmp_path: Path
) -> None:
    """A student that is the teacher in 4 bits has nothing to learn from it, and is as far from the dense model."""
    losses = [{"of": {"loss": "forward_kl"}}] + ([{"of": {"loss": "hidden"}}] if kind == "online" else [])
    teacher = {"kind": kind, "bits": 4} | ({"k": 1000} if kind == "cached" else {})
    asked = recipe(place, rates={"norms": 1e-9}, steps=1, losses=losses, teacher=teacher)
    done = distill(decoded_student, place / "dense", asked, tmp_path / "out")
    [step] = [row for row in map(json.loads, (tmp_path / "out" / "metrics.jsonl").open()) if "terms" in row]
    assert all(abs(value) < 1e-6 for value in step["terms"].values()) and len(step["terms"]) == len(losses)
    assert done.quantized_teacher["bits"] == 4 and done.quantized_teacher["kl"] > 1e-3
    for row in done.history:
        assert math.isclose(row["kl"], done.quantized_teacher["kl"], rel_tol=1e-3)
        assert math.isclose(row["perplexity"], done.quantized_teacher["perplexity"], rel_tol=1e-4)


@pytest.fixture(scope="module")
def dense_run(place: Path) -> Any:
    return distill(place / "small", place / "dense", recipe(place), place / "by-dense")


@pytest.mark.slow
@pytest.mark.parametrize("bits, compute", [(8, "float32"), (4, "bfloat16")])
def test_fewer_bits_recover_what_the_dense_teacher_does(
    bits: int, compute: str, place: Path, dense_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(place, teacher={"bits": bits}, compute=compute)
    done = distill(place / "small", place / "dense", asked, tmp_path / "out")
    start, end = (row["kl"] for row in dense_run.history)
    assert end < 0.9 * start, "there is something to recover"
    if compute == "float32":
        assert done.history[0] == dense_run.history[0], "looks are at the dense teacher"
    assert math.isclose(start - done.history[-1]["kl"], start - end, rel_tol=0.02 if bits == 8 else 0.3)
    assert done.history[-1]["teacher_perplexity"] == done.history[0]["teacher_perplexity"]
    assert not caplog.records and logging.getLogger("bitsandbytes").level == logging.NOTSET


@pytest.mark.slow
def test_the_cost_of_quantizing_is_reported_everywhere(place: Path, dense_run: Any, tmp_path: Path) -> None:
    assert dense_run.quantized_teacher is None
    done = distill(place / "small", place / "dense", recipe(place, steps=1, teacher={"bits": 8}), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert written["quantized_teacher"] == done.quantized_teacher and 0 < done.quantized_teacher["kl"] < 1e-3
    assert "bits: 8" in (tmp_path / "out" / "distillation.yaml").read_text()
    assert any("8 of the teacher while it taught" in str(part) for part in distilled_view(done.to_json(), False))
    for one, said in ((done, True), (dense_run, False)):
        text = "".join(_distillation(DistillationRecord(one.to_json(), "version: 1")))
        assert ("the teacher had its linears in 8 bits, at a KL of 0.000" in text) == said


@pytest.mark.parametrize(
    "kind, names",
    [
        ("online", ["small", "dense in 4 bits"]),
        pytest.param("cached", ["small"], marks=pytest.mark.slow),
    ],
)
def test_the_dense_teacher_is_gone_while_the_student_learns(
    kind: str, names: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, weakref.ref[Any]] = {}
    load = setup.load_model

    def remembering(place: Place, *more: Any, **settings: Any) -> Any:
        model = load(place, *more, **settings)
        loaded[place.folder.name + (" in 4 bits" if len(more) > 2 else "")] = weakref.ref(model)
        return model

    for module in (setup, quantized):
        monkeypatch.setattr(module, "load_model", remembering)
    alive: list[list[str]] = []
    distill(
        place / "small",
        place / "dense",
        recipe(place, steps=2, teacher={"kind": kind, "bits": 4}),
        tmp_path / "out",
        progress=lambda *_: alive.append([name for name, model in loaded.items() if model() is not None]),
    )
    assert list(loaded) == ["small", "dense", "dense in 4 bits"] and alive == [names] * 2


@pytest.mark.slow
def test_weights_come_from_the_dense_teacher(place: Path, tmp_path: Path) -> None:
    """Blocks are recovered towards the dense teacher's, and latents start at its weights."""
    phases = [
        {"kind": "blockwise", "steps": 2, "rates": {"codes": 1e-2}, "latents": "teacher"},
        {"kind": "end_to_end", "steps": 1},
    ]
    runs = [
        distill(
            place / "small",
            place / "dense",
            recipe(place, phases=phases, teacher={"bits": bits}),
            tmp_path / str(bits),
        )
        for bits in (None, 4)
    ]
    one, other = ([{**row, "seconds": 0} for row in done.history if row["phase"] == 1] for done in runs)
    assert one == other and one[-1]["kl"] != one[0]["kl"]


@pytest.mark.slow
@pytest.mark.slow
def test_a_control_measures_against_the_same_dense_teacher(place: Path, tmp_path: Path) -> None:
    """It is loaded as it was for the distillation: on the host, in float32."""
    asked = recipe(place, steps=1, teacher={"bits": 8}, compute="bfloat16", controls=["no_teacher"])
    done = distill(place / "small", place / "dense", asked, tmp_path / "out")
    assert done.controls["no_teacher"]["teacher_perplexity"] == done.history[-1]["teacher_perplexity"]


def test_a_cache_of_other_bits_is_refused(place: Path, tmp_path: Path) -> None:
    def cached(bits: int | None, folder: str, output: str) -> Any:
        teacher = {"kind": "cached", "k": 16, "bits": bits, "folder": str(tmp_path / folder)}
        asked = recipe(place, steps=1, teacher=teacher)
        return distill(place / "small", place / "dense", asked, tmp_path / output)

    cached(None, "dense", "a")
    cached(4, "coarse", "b")
    dense, coarse = ((tmp_path / folder / "predictions.npy").read_bytes() for folder in ("dense", "coarse"))
    assert dense != coarse
    for bits, folder in ((4, "dense"), (None, "coarse")):
        with pytest.raises(InputError, match=f"{folder} was left by a different run .bits changed.; remove it, or"):
            cached(bits, folder, "c")


def test_caches_without_bits_belong_to_unquantized_teachers(tmp_path: Path) -> None:
    """Such a cache, as it lay on the disk, is opened by a recipe without bits, and by no other."""
    entries = {"teacher": "a", "tokens": "b", "k": 2, "dtype": "float32"}
    counted = torch.tensor([[False, True, True]])
    np.save(tmp_path / "predictions.npy", np.zeros(2, record_type(2, 256)))
    (tmp_path / "cache.json").write_text(json.dumps(entries | {"vocabulary": 256, "sequences": 1}))
    assert len(open_cache(tmp_path, CacheOrigin(**entries), counted).of([0], "cpu").ids) == 2
    for bits in (8, 4):
        with pytest.raises(InputError, match="bits changed"):
            open_cache(tmp_path, CacheOrigin(**entries, bits=bits), counted)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, sentence",
    [
        ({"bits": 3}, "bits"),
        ({"bits": 16}, "bits"),
        ({"bits": 4, "k": 3}, "k and folder apply to a cached teacher only"),
        ({"bit": 4}, 'unknown key "bit".*did you mean "bits"'),
    ],
)
def test_impossible_recipes_are_refused(teacher: dict[str, Any], sentence: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(place / "small", place / "dense", recipe(place, teacher=teacher), tmp_path / "out")


def test_a_recipe_with_bits_survives_its_own_file() -> None:
    for teacher in ({"bits": 4}, {"bits": 8, "kind": "cached", "k": 3}):
        asked = Distillation(teacher=teacher)
        assert Distillation.model_validate(asked.model_dump(mode="json")) == asked


def test_a_missing_package_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    sentence = r'teacher: {bits: 4} requires bitsandbytes; run pip install "llmcompress\[distill\]"'
    with pytest.raises(RecipeError, match=sentence):
        check_requirements(Distillation(teacher={"bits": 4}), "cpu")
    check_requirements(Distillation(), "cpu")


def test_the_host_holds_the_dense_teacher_beside_a_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 1000)
    monkeypatch.setattr(setup, "loading_device", lambda accelerator: "cuda")
    monkeypatch.setattr(setup, "load_model", lambda *_, **__: pytest.fail("loaded"))
    student, teacher = locate(str(place / "small")), locate(str(place / "dense"))
    accelerator: Any = SimpleNamespace(is_fsdp2=False)
    with pytest.raises(MemoryLimitError, match=r"holds .*dense \(0.0 GB\) in float32.*; leave bits of the teacher out"):
        setup.load_pair(student, teacher, Distillation(teacher={"bits": 4}), accelerator)


def test_it_is_not_shared_out() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    sharding: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(
        RecipeError, match="{bits: 8} requires a whole teacher in every process.*leave bits out, or launch with"
    ):
        check_sharding(sharding, Distillation(teacher={"bits": 8}))


def stored(place: Path, to: Path) -> Path:
    """The dense model as bitsandbytes stores it."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(place / "dense", quantization_config=asked).save_pretrained(to)
    tiny_tokenizer().save_pretrained(to)
    return to


def in_fp8(place: Path, to: Path) -> Path:
    """A model in FP8, as transformers stores it."""
    folder = save_tiny("llama", to, hidden_size=64, intermediate_size=96)
    return store(folder, fp8, quant_method="fp8", weight_block_size=[32, 32])


@pytest.mark.parametrize(
    "teacher, bits, sentence",
    [
        (lambda place, to: place / "small", 4, "compressed already, so it cannot be quantized to 4 bits; leave bits"),
        (stored, 8, "compressed already, so it cannot be quantized to 8 bits; leave bits"),
        (in_fp8, 4, "compressed already, so it cannot be quantized to 4 bits; leave bits"),
    ],
)
def test_teachers_that_are_compressed_are_refused(
    teacher: Callable[[Path, Path], Path], bits: int, sentence: str, place: Path, tmp_path: Path
) -> None:
    folder = teacher(place, tmp_path / "teacher")
    with pytest.raises(InputError, match=sentence):
        distill(place / "small", folder, recipe(place, teacher={"bits": bits}), tmp_path / "out")


def test_numbers_of_bitsandbytes_teach_what_is_made_of_them(place: Path, tmp_path: Path) -> None:
    folder = stored(place, tmp_path / "teacher")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 8, "group_size": 16}]}]
    asked: dict[str, Any] = {"version": 1, "rules": rules, "distill": recipe(place, steps=1, teacher={"bits": 4})}
    with pytest.raises(InputError, match="compressed already, so it cannot be quantized to 4 bits; leave bits"):
        lc.compress(folder, asked, tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "which is found before compression starts"
    asked["distill"].pop("teacher")
    distance = lc.compress(folder, asked, tmp_path / "out").distillation["history"][0]["kl"]
    whole = lc.score(tmp_path / "out", lc.Protocol(windows=2, length=32), against=place / "dense")["kl"]
    assert 0 < 10 * distance < whole


@pytest.mark.slow
def test_inputs_too_large_for_8_bits_raise_numerics_error(place: Path, tmp_path: Path) -> None:
    """LLM.int8() reads them in float16, which ends at 65504; the dense model, and its 4 bits, go further."""
    dense = AutoModelForCausalLM.from_pretrained(place / "dense")
    dense.model.layers[1].mlp.up_proj.weight.data *= 1e8
    dense.save_pretrained(tmp_path / "steep")
    tiny_tokenizer().save_pretrained(tmp_path / "steep")
    with pytest.raises(NumericsError, match="with 8 bits the teacher's predictions are NaN or infinite; set bits to 4"):
        distill(place / "small", tmp_path / "steep", recipe(place, teacher={"bits": 8}), tmp_path / "out")
    done = distill(place / "small", tmp_path / "steep", recipe(place, steps=1, teacher={"bits": 4}), tmp_path / "out")
    assert math.isfinite(done.quantized_teacher["kl"])
