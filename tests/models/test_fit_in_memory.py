"""Models that do not fit, or are others than they seem, are refused before they are loaded."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator

import llmcompress as lc
from llmcompress.distillation.setup import load_pair
from llmcompress.errors import InputError, MemoryLimitError
from llmcompress.evaluation.processes import Processes
from llmcompress.evaluation.score import score
from llmcompress.models.dense.load import check_fits
from llmcompress.models.dense.locate import locate
from llmcompress.recipe.distillation import Distillation
from llmcompress.runtime import memory
from llmcompress.runtime.memory import CgroupLimits
from tests.tiny import save_tiny, tiny

RECIPE = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model and a compressed one."""
    place = tmp_path_factory.mktemp("fits")
    dense = save_tiny("qwen3", place / "dense")
    return dense, lc.compress(dense, RECIPE, place / "out").folder


def test_the_limit_is_the_weights_in_float32(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, compressed = folders
    weights = sum(value.numel() for value in tiny("qwen3").parameters())  # tied ones once
    both = [locate(str(compressed)), locate(str(dense))]
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 8 * weights)
    check_fits("cpu", "scoring", both)
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 8 * weights - 1)
    with pytest.raises(MemoryLimitError, match=r"scoring holds .*out .* and .*dense .* GB\) in float32"):
        check_fits("cpu", "scoring", both)
    with pytest.raises(MemoryLimitError):
        check_fits("cpu:0", "distilling", both)  # as Accelerate calls it
    check_fits("cuda", "scoring", both)
    check_fits("cpu", "scoring", both[:1], both[1:])


def test_a_model_that_passes_takes_its_largest_part(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, compressed = (locate(str(folder)) for folder in folders)
    model = tiny("qwen3")
    blocks = [sum(value.numel() for value in block.parameters()) for block in model.model.layers]
    part = 4 * max(*blocks, model.lm_head.weight.numel())
    stored = (compressed.folder / "model.safetensors").stat().st_size
    for places, size in (([dense], part), ([compressed], part + stored), ([dense, compressed], 2 * part + stored)):
        monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda size=size: size)
        check_fits("cpu", "scoring", passing=places)
        monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda size=size: size - 1)
        with pytest.raises(MemoryLimitError, match="scoring holds"):
            check_fits("cpu", "scoring", passing=places)


def test_every_process_of_a_machine_has_its_own_models(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, compressed = folders
    weights = sum(value.numel() for value in tiny("qwen3").parameters())
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 16 * weights - 1)
    monkeypatch.setattr("llmcompress.evaluation.score.open_model", None)
    with pytest.raises(TypeError):  # since two models block by block fit
        score(compressed, lc.Protocol(windows=1, length=16), against=dense)
    with pytest.raises(MemoryLimitError, match="scoring holds .* in float32 in each of 9 processes, and this machine"):
        score(compressed, lc.Protocol(windows=1, length=16), against=dense, processes=Processes(here=9))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MemoryLimitError, match="distilling holds .* in each of 2 processes"):
        load_pair(locate(str(compressed)), locate(str(dense)), Distillation(), Accelerator(cpu=True))


@pytest.mark.slow
def test_scoring_and_verifying_refuse_before_they_load(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, compressed = folders
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 1000)
    for door in ("score.open_model", "verify.load_model"):
        monkeypatch.setattr(f"llmcompress.evaluation.{door}", None)
    with pytest.raises(MemoryLimitError, match="take a larger machine"):
        lc.score(compressed, lc.Protocol(windows=1, length=16), against=dense)
    with pytest.raises(MemoryLimitError, match="take a larger machine"):
        lc.verify(compressed, windows=1, length=16)


@pytest.mark.parametrize("limit", [1000, None, 2**62])
def test_a_container_has_the_memory_it_may_use(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = int(psutil.virtual_memory().total)
    monkeypatch.setattr(memory, "cgroup_limits", lambda: CgroupLimits(memory=limit))
    assert memory.total_memory() == min(whole, limit or whole)


def test_an_adapter_beside_the_weights_is_no_other_model(tmp_path: Path) -> None:
    """With PEFT there, transformers would score the model that the adapter names."""
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"adapter_config.json beside its weights.*remove that file"):
        lc.score(folder, lc.Protocol(windows=1, length=16))
