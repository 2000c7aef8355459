"""The dry run before a plan: it refuses what a run would refuse, drops linears that nobody calls, takes no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.calibration import dry_run
from llmcompress.calibration.dry_run import probe_architecture
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.errors import InputError
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.model import resolve
from tests.tiers import tiered
from tests.zoo import HYBRIDS, PLAIN, save_zoo, text_for_calibration, zoo

UNCALLED = {  # linears of which blocks read the weight without calling them
    "mamba": {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"},
    "falcon_mamba": {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"},
    "jamba": {"model.layers.0.mamba.dt_proj"},
}


def recipe(text: Path, bits: int = 4) -> dict[str, Any]:
    calibration = {"dataset": str(text), "samples": 3, "length": 32, "held_out": 1}
    rules = [{"match": "*", "steps": [{"method": "gptq", "bits": bits, "group_size": 16}]}]
    return {"version": 1, "calibration": calibration, "rules": rules}


def open_family(family: str, place: Path) -> tuple[Any, Architecture]:
    source = resolve(save_zoo(family, place))
    return source, architecture(source.config, source.skeleton())


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))).logits
    return found


@pytest.mark.parametrize("family", ["rwkv", "gemma3n_text"])
def test_a_plan_refuses_what_a_run_refuses(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the walk itself, which is called here without a dry run."""
    source, asked = save_zoo(family, tmp_path / "model"), recipe(text_for_calibration(tmp_path))
    with pytest.raises(InputError, match="cannot be run") as planned:
        lc.plan(source, asked)
    with pytest.raises(InputError) as compressed:
        lc.compress(source, asked, tmp_path / "out")
    assert str(planned.value) == str(compressed.value)
    assert "\n" not in str(planned.value) and not (tmp_path / "out").exists()
    dense = resolve(source)
    arch = architecture(dense.config, dense.skeleton())
    with pytest.raises(InputError, match="cannot be run|is called"):
        list(walk(dense, arch, torch.zeros(2, 16, dtype=torch.long), Statistics(needs=frozenset({"outer"}))))


@pytest.mark.parametrize("family", tiered(HYBRIDS | PLAIN, {"bamba", "olmo2"}.__contains__, slow=HYBRIDS.__contains__))
def test_linears_that_no_block_calls_stay_dense_and_are_named(family: str, tmp_path: Path) -> None:
    source = save_zoo(family, tmp_path / "model")
    asked = recipe(text_for_calibration(tmp_path), bits=8)
    called: set[str] = set()
    model = zoo(family)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _m, _args, name=name: called.add(name))
    wanted = logits(model)
    blocks = architecture(model.config, model)
    inside = set(blocks.linears())
    assert inside - called == UNCALLED.get(family, set())
    plan, report = lc.plan(source, asked), lc.compress(source, asked, tmp_path / "out").report
    assert {row.name for row in plan.layers} == {row.name for row in report.layers} == inside & called
    dense = {f"{name}.weight stays dense" for name in inside - called}
    assert dense <= set(report.warnings) and dense <= set(plan.warnings)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("family", ["mixtral", "olmo2"])
def test_weights_of_the_dry_run_share_one_element(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, arch = open_family(family, tmp_path / "model")
    seen: list[nn.Module] = []
    run_blocks = dry_run._run_blocks
    monkeypatch.setattr(dry_run, "_run_blocks", lambda model, arch: (seen.append(model), run_blocks(model, arch))[1])
    monkeypatch.setattr(type(source), "read", None)  # no weight is read
    assert probe_architecture(source, arch, True).linears() == arch.linears()
    [model] = seen
    sizes = {name: value.untyped_storage().nbytes() for name, value in model.named_parameters()}
    assert sizes.keys() == dict(source.skeleton().named_parameters()).keys() and set(sizes.values()) <= {4, 8}


def test_a_dry_run_of_a_large_model_loads_no_weights(tmp_path: Path) -> None:
    """30 GB in float32, of which the dry run takes less than 100 MB."""
    source, _ = open_family("olmo2", tmp_path / "model")
    large = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    for name, value in {**large, "num_key_value_heads": 32, "vocab_size": 100352, "pad_token_id": 0}.items():
        setattr(source.config, name, value)
    arch = architecture(source.config, source.skeleton())
    assert sum(out * columns for out, columns in (one.shape for one in arch.linears().values())) > 6e9
    before = resident()
    assert probe_architecture(source, arch, True).linears() == arch.linears()
    assert resident() - before < 100e6


def resident() -> int:
    """Return the bytes of memory that this process has ever had at once."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
