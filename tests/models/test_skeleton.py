"""Models without weights are what transformers makes of their configs."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from llmcompress.errors import InputError
from llmcompress.models.dense.skeleton import auto_class, dense_skeleton, outline
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, tiny
from tests.zoo import EVERY, ZOO, zoo

FAST = {"gemma3_text", "gpt2", "opt", "mixtral", "deepseek_v3", "bert", "mamba2"}


@pytest.mark.parametrize("family", tiered(EVERY, FAST.__contains__, slow=FAMILY_CONFIGS.__contains__))
def test_all_but_the_weights_is_there(family: str, tmp_path: Path) -> None:
    config = (zoo if family in ZOO else tiny)(family).config
    drawn: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    skeleton = dense_skeleton(config, tmp_path, unfused=False)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for kind in ("named_parameters", "named_buffers"):
        here, there = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (skeleton, drawn))
        kinds = [{name: (value.shape, value.dtype) for name, value in each.items()} for each in (here, there)]
        assert kinds[0] == kinds[1]
    for name, buffer in skeleton.named_buffers():
        torch.testing.assert_close(buffer, drawn.get_buffer(name), rtol=0, atol=0, msg=name)
    assert set(skeleton.state_dict()) == set(drawn.state_dict())
    assert skeleton.all_tied_weights_keys == drawn.all_tied_weights_keys and not skeleton.training


def test_a_buffer_that_is_filled_with_the_weights_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[str] = []

    def fill(model: PreTrainedModel, module: nn.Module) -> None:
        filled.append(type(module).__name__)
        for buffer in module.buffers(recurse=False):
            buffer.fill_(3)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", fill)
    config = tiny("llama").config
    filled.clear()
    skeleton = dense_skeleton(config, tmp_path)
    assert all(torch.equal(buffer, torch.full_like(buffer, 3)) for buffer in skeleton.buffers())
    assert filled == ["LlamaRotaryEmbedding"], "nothing else is asked, of which meta keeps nothing"


def test_a_model_that_cannot_fill_its_buffers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: PreTrainedModel, module: nn.Module) -> None:
        raise ValueError("no such rope")

    config = tiny("llama").config
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", fail)
    with pytest.raises(InputError, match=r"does not describe a llama model that can be built \(no such rope\)"):
        dense_skeleton(config, tmp_path)


def test_threads_build_beside_each_other(tmp_path: Path) -> None:
    """Each thread gets its own model, other modules keep their numbers, and torch is as it was in the end."""
    config = tiny("llama").config
    before, found = (nn.Module.register_parameter, torch.nn.init.normal_), []

    def build() -> None:
        for _ in range(4):
            model = dense_skeleton(config, tmp_path)
            found.append(all(parameter.is_meta for parameter in model.parameters()))
            outline(config, tmp_path, 100, 10**9)

    threads = [Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    places = set()
    while any(thread.is_alive() for thread in threads):
        places.add(nn.Linear(2, 2).weight.device.type)
    assert places == {nn.Linear(2, 2).weight.device.type} == {"cpu"}
    assert found == [True] * 12 and before == (nn.Module.register_parameter, torch.nn.init.normal_)
