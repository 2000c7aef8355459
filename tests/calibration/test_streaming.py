"""StreamedModel predictions: those of the whole model, from one block in memory at a time."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmcompress as lc
from llmcompress.calibration import head_rows
from llmcompress.calibration.streaming import StreamedModel, from_disk, in_memory
from llmcompress.errors import InputError
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.weight.modules import compressed_linears, decoded
from tests.tiers import one_in, tiered
from tests.tiny import save_tiny
from tests.zoo import ENCODERS, EVERY, save_any, save_zoo, text_for_calibration

CPU = torch.device("cpu")
REFUSED = {"jetmoe", "rwkv", "gemma3n_text"}
FAST = {"llama", "mixtral", "gpt2"}
STREAMED = [family for family in EVERY if family not in REFUSED.union(ENCODERS)]
RTN = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]}


def windows() -> Tensor:
    return torch.randint(3, 250, (3, 24), generator=torch.Generator().manual_seed(1))


def predicted(model: StreamedModel, size: int = 1) -> Tensor:
    states = model.embed(windows(), size)
    for index in range(model.depth):
        model.advance(states, index)
    return torch.cat([torch.cat(list(parts), 1) for parts in model.logits(states)])


@pytest.mark.parametrize("family", tiered(STREAMED, FAST.__contains__, slow=one_in(3, STREAMED)))
def test_a_model_on_disk_predicts_what_it_does_in_memory(family: str, tmp_path: Path) -> None:
    place = save_any(family, tmp_path / "model")
    source, whole = resolve(place), load_model(locate(str(place)))
    streamed = from_disk(source, CPU)
    with torch.no_grad():
        wanted = torch.cat([whole(input_ids=one[None], use_cache=False).logits for one in windows()])
    found = predicted(streamed)
    if any(name.endswith("experts") for name, _ in whole.named_modules()):  # summed up in another order
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, wanted)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.parametrize("family", tiered(STREAMED, FAST.__contains__, slow=one_in(3, STREAMED[1:])))
def test_a_large_head_stays_as_stored(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_rows, "LARGE", 0)
    monkeypatch.setattr(head_rows, "ROWS", 7)
    place = save_any(family, tmp_path / "model")
    load_model(locate(str(place)), dtype=torch.bfloat16).save_pretrained(tmp_path / "stored")
    place, whole = tmp_path / "stored", load_model(locate(str(tmp_path / "stored")))
    streamed = from_disk(resolve(place), CPU)
    with torch.no_grad():
        wanted = torch.cat([whole(input_ids=one[None], use_cache=False).logits for one in windows()])
    torch.testing.assert_close(predicted(streamed), wanted, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_by_rows_and_their_gradients_are_those_of_the_whole(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_rows, "ROWS", 7)
    head = nn.Linear(12, 30, bias=has_bias).bfloat16().requires_grad_(False)
    exact, inputs, toward = copy.deepcopy(head).double(), torch.randn(2, 5, 12), torch.randn(2, 5, 30)
    results = []
    for module, x in ((exact, inputs.double().requires_grad_()), (head, inputs.clone().requires_grad_())):
        with nullcontext() if module is exact else head_rows.multiply_by_rows(module):
            outputs = module(x)
        results.append((outputs, *torch.autograd.grad(outputs, x, toward.to(outputs.dtype))))
    for wanted, given in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted.float())
    assert "forward" not in vars(head)


@pytest.mark.parametrize("tables", [{}, {"embeddings": [{"method": "rtn", "bits": 8, "group_size": 16}]}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compressed_model_predicts_what_it_does_when_decoded(
    family: str, tables: dict[str, object], tmp_path: Path
) -> None:
    place = save_tiny(family, tmp_path / "dense")
    model = load_model(locate(str(lc.compress(place, RTN | tables, tmp_path / "small").folder)))
    with torch.no_grad(), decoded(model):
        wanted = torch.cat([model(input_ids=one[None], use_cache=False).logits for one in windows()])
    assert torch.equal(predicted(in_memory(model)), wanted)
    assert all(layer.ready is None for layer in compressed_linears(model).values())


def test_a_mixture_that_returns_its_routers_logits_predicts_the_same(tmp_path: Path) -> None:
    text = {"dataset": str(text_for_calibration(tmp_path)), "samples": 3, "length": 32, "held_out": 1}
    logits, gates = [], []
    for returned in (False, True):
        place = save_zoo("mixtral", tmp_path / f"dense {returned}", output_router_logits=returned)
        done = lc.compress(place, RTN | {"calibration": text}, tmp_path / f"small {returned}")
        small = load_model(locate(str(done.folder)))
        logits += [predicted(from_disk(resolve(place), CPU)), predicted(in_memory(small))]
        gates.append(done.report.gates)
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
    assert gates[0] is not None and gates[0] == gates[1]


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_other_models_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one by one|cannot"):
        predicted(from_disk(resolve(save_any(family, tmp_path)), CPU))


def test_blocks_that_share_keys_and_values_are_refused_for_that(tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention"] * 2
    save_zoo("gemma4_text", tmp_path, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=layers)
    with pytest.raises(InputError, match=r"one by one \(the last 2 read the keys and values of earlier ones\)"):
        from_disk(resolve(tmp_path), CPU).embed(windows(), 1)


def test_a_block_that_changes_the_shape_is_refused(tmp_path: Path) -> None:
    streamed = from_disk(resolve(save_tiny("llama", tmp_path)), CPU)
    states = streamed.embed(windows(), 3)

    class Half(nn.Module):
        def forward(self, hidden: Tensor, **_: object) -> Tensor:
            return hidden[..., ::2]

    streamed.model.get_submodule(streamed.stack)[0] = Half()  # type: ignore[operator]
    with pytest.raises(InputError, match="block 0 turns hidden states .* into"):
        streamed.advance(states, 0)


@pytest.mark.parametrize("family", ["zamba2", "gemma4_text"])
def test_arguments_that_depend_on_tokens_stay_with_their_tokens(family: str, tmp_path: Path) -> None:
    """Blocks of these read the tokens themselves: no block can learn from rows that are drawn."""
    source = resolve(save_any(family, tmp_path / "model"))
    for size in (1, 3):  # several batches of one size, and a single batch
        states = from_disk(source, CPU).embed(windows(), size)
        assert set(states.calls.own) == {batch.rows.start for batch in states.batches}
        with pytest.raises(
            InputError, match="depend on the tokens, so they cannot learn one by one; leave reconstruct"
        ):
            states.calls.of(0, size, None)
    asked = RTN | {
        "calibration": {"dataset": str(text_for_calibration(tmp_path)), "samples": 3, "length": 32, "held_out": 1},
        "reconstruct": {"steps": 1},
    }
    with pytest.raises(InputError, match="leave reconstruct: and blockwise: out"):
        lc.compress(source.folder, asked, tmp_path / "small")
