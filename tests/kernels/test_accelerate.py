"""Models whose linears multiply by kernels are the models that they were: in what they say, save, train and export."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.errors import RecipeError
from llmcompress.kernels import ops
from llmcompress.kernels.accelerate import SWITCH, Fast, accelerate, plain
from llmcompress.kernels.cpu import matmul, token_calls
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig, table_entry
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.modules import CompressedLinear, compressed_linears, compressed_modules, put
from llmcompress.weight.nodes import Bitmap, Dense, RotatedInputs, Where, Zero
from llmcompress.weight.trellis import Trellis
from tests.builders import grid, seeded, streams
from tests.tiny import save_tiny

RULES = [
    {"match": "*.k_proj", "steps": [{"method": "mxfp", "format": "mxfp8"}]},
    {"match": "*.v_proj", "steps": [{"method": "kmeans", "bits": 2}]},
    {"match": "*.up_proj", "steps": [{"method": "rtn", "bits": 3, "group_size": 32}, {"method": "svd", "rank": 2}]},
    {"match": "*.o_proj", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2, "group_size": 32}]},
    {"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]},
]
WITHOUT = {"model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"}
UP = "model.layers.0.mlp.up_proj"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
Load = Callable[..., PreTrainedModel]


def compressed(place: Path, seed: int) -> Path:
    """Write a model with grids, low-rank factors and streams of trellises, random ones since a search takes long."""
    dense = save_tiny("llama", place / "dense", tie_word_embeddings=True, seed=seed, **SIZES)
    recipe = {"version": 1, "rules": RULES, "embeddings": [{"method": "rtn", "bits": 4}]}
    model = AutoModelForCausalLM.from_pretrained(lc.compress(dense, recipe, place / "out").folder)
    for number, (name, layer) in enumerate(compressed_linears(model).items()):
        if name.endswith(("q_proj", "gate_proj")):
            w = streams(Trellis(2, 1, 12, "linear"), *layer.layout.size, 768)
            codes = torch.randint(4, w.codes.shape, generator=seeded(100 * seed + number), dtype=torch.uint8)
            signs = torch.rand(64, generator=seeded(number)) < 0.5
            turned = RotatedInputs(replace(w, codes=codes, scale=w.scale * 0.05), signs, 64)
            put(model, name, CompressedLinear.of(turned))
    table = {name: module.layout for name, module in compressed_modules(model).items()}
    model.config.quantization_config = LLMCompressConfig(**table_entry(table))
    model.hf_quantizer.quantization_config = model.config.quantization_config
    model.save_pretrained(place / "with streams")
    return place / "with streams"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(tmp_path_factory.mktemp("accelerated"), 0)


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return a function that loads the model, with a value of the variable."""

    def load(value: str = "exact", path: Path = folder) -> PreTrainedModel:
        monkeypatch.setenv(SWITCH, value)
        return AutoModelForCausalLM.from_pretrained(path)

    return load


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of the inputs that kernels multiplied."""
    sizes, multiply = [], ops.matmul.multiply
    monkeypatch.setattr(ops.matmul, "multiply", lambda w, x, mode: sizes.append(x.shape) or multiply(w, x, mode))
    return sizes


def ids(tokens: int, batch: int = 1) -> Tensor:
    return (torch.arange(tokens * batch).reshape(batch, tokens) * 37 + 11) % 256


@torch.no_grad()
def logits(model: nn.Module, tokens: int = 5, batch: int = 1) -> Tensor:
    return model(ids(tokens, batch)).logits


def plain_logits(model: nn.Module, tokens: int = 5, batch: int = 1) -> Tensor:
    with plain(model):
        return logits(model, tokens, batch)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    distance = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert distance <= tolerance, distance


# --- what it computes -----------------------------------------------------------------------------------------------


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [(1, 1), *(pytest.param(*case, marks=slow) for case in ((5, 1), (40, 1), (1, 2), (5, 2), (40, 2)))],
)
def test_logits_are_those_of_plain_products(
    tokens: int, batch: int, load: Load, products: list[tuple[int, ...]]
) -> None:
    model = load()
    wanted = plain_logits(model, tokens, batch)
    assert not products
    close(logits(model, tokens, batch), wanted)
    assert len(products) == len(compressed_linears(model)) - len(WITHOUT)


@pytest.fixture
def wider() -> Iterator[None]:
    """Make float64 torch's default dtype, as other threads do while they load a model."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_changes_nothing(
    dtype: torch.dtype, tokens: int, load: Load, wider: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_TOKENS", matmul._TokenCache())  # whose buffers may be from before
    monkeypatch.setattr(token_calls, "_HERE", token_calls._ThreadRoom())
    model = load().to(dtype)
    wanted = plain_logits(model, tokens)
    close(logits(model, tokens), wanted, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("mode", "tolerance"), [("auto", 2e-4), pytest.param("int8", 5e-2, marks=slow)])
def test_rounded_inputs_change_little(mode: str, tolerance: float, load: Load) -> None:
    model = load(mode)
    assert not torch.equal(logits(model, 1), plain_logits(model, 1)), "inputs are rounded"
    close(logits(model, 1), plain_logits(model, 1), tolerance)
    close(logits(model, 40), plain_logits(model, 40))


def test_lookup_reads_the_weight_of_its_head(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = load(), []
    table, module = model.get_input_embeddings(), sys.modules[Fast.__module__]
    decode_rows = module.decode_rows
    monkeypatch.setattr(module, "decode_rows", lambda *given: found.append(given) or decode_rows(*given))
    wanted = table(ids(4))
    assert not found, "the head was not used yet"
    logits(model)
    found.clear()
    close(table(ids(4)), wanted)
    close(table(ids(4)[0, 1]), wanted[0, 1])
    assert len(found) == 2
    table(ids(40))
    assert len(found) == 2, "many tokens"
    for token in (-1, table.num_embeddings):
        with pytest.raises(IndexError, match=f"token {token} is not in a table"):
            table(torch.tensor([5, token]))
    table.weight.data = table.weight.data.clone()
    close(table(ids(4)), wanted)
    assert len(found) == 2, "another payload"


def test_accelerated_model_generates_the_same_text(load: Load) -> None:
    model = load()
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    found = model.generate(ids(5), **asked)
    with plain(model):
        assert torch.equal(found, model.generate(ids(5), **asked))
    beams = model.generate(ids(5), num_beams=3, **asked)
    with plain(model):
        assert torch.equal(beams, model.generate(ids(5), num_beams=3, **asked))


@pytest.mark.parametrize("tokens", [1, 40])
def test_inference_mode(tokens: int, load: Load) -> None:
    model = load()
    wanted = plain_logits(model, tokens)
    with torch.inference_mode():
        close(model(ids(tokens)).logits, wanted)
    close(logits(model, tokens), wanted)


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=slow), pytest.param(5, marks=slow), 40])
def test_autocast(tokens: int, load: Load, products: list[tuple[int, ...]]) -> None:
    model = load()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = plain_logits(model, tokens), logits(model, tokens)
    assert products
    close(found, wanted, 3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_another_precision_and_back(dtype: torch.dtype, load: Load) -> None:
    model = load()
    logits(model)
    model.to(dtype)
    for tokens in (1, 5, 40):
        close(logits(model, tokens), plain_logits(model, tokens), 3e-2)
    model.to(torch.float32)
    for tokens in (1, 5, 40):
        close(logits(model, tokens), plain_logits(model, tokens))


@pytest.mark.parametrize("size", [(64,), (0, 64), (2, 0, 64), (1, 1, 64), (2, 3, 4, 64)])
def test_inputs_of_any_shape(size: tuple[int, ...], load: Load) -> None:
    layer = load().get_submodule(UP)
    x = torch.randn(*size)
    with plain(layer):
        wanted = layer(x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_strided_inputs(load: Load) -> None:
    layer = load().get_submodule(UP)
    for x in (torch.randn(64, 7).T, torch.randn(3, 128)[:, ::2], torch.randn(1, 64).expand(4, 64)):
        with plain(layer):
            wanted = layer(x)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


# --- what it holds --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, object]:
    """The files of a model; of tensors the header, whose entries have no order, and all bytes behind it."""
    found: dict[str, object] = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            start = 8 + int.from_bytes(data[:8], "little")
            found[path.name] = json.loads(data[8:start]), data[start:]
        else:
            found[path.name] = data
    assert "model.safetensors" in found
    return found


def test_accelerated_model_saves_the_same_bytes(load: Load, tmp_path: Path) -> None:
    before, model = load("0"), load()
    logits(model)
    before.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "after")
    assert contents(tmp_path / "before") == contents(tmp_path / "after")
    close(logits(load(path=tmp_path / "after")), logits(before))


def test_a_copy_is_another_model(load: Load, products: list[tuple[int, ...]]) -> None:
    model = load()
    wanted = logits(model)
    other = copy.deepcopy(model)
    products.clear()
    assert torch.equal(logits(other), wanted) and products
    other.get_submodule(UP).weight.zero_()
    assert not torch.equal(logits(other), wanted) and torch.equal(logits(model), wanted)


@pytest.mark.parametrize("assign", [pytest.param(False, marks=slow), True])
def test_loaded_weights_are_prepared_again(assign: bool, load: Load, tmp_path: Path) -> None:
    model, other = load(), load(path=compressed(tmp_path, 1))
    first, wanted = logits(model), plain_logits(other)
    assert float((first - wanted).norm() / wanted.norm()) > 0.1
    model.load_state_dict(other.state_dict(), assign=assign)
    close(logits(model), wanted)


def change_by_copy(layer: CompressedLinear, payload: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(payload)


def change_by_parameter(layer: CompressedLinear, payload: Tensor) -> None:
    layer.weight = nn.Parameter(payload, requires_grad=False)


def change_data(layer: CompressedLinear, payload: Tensor) -> None:
    layer.weight.data = payload


@pytest.mark.parametrize(
    "change",
    [
        change_by_copy,
        change_by_parameter,
        change_data,
    ],
)
def test_a_changed_payload_is_prepared_again(change: Callable[[CompressedLinear, Tensor], None], load: Load) -> None:
    model = load()
    one, other = (model.get_submodule(f"model.layers.{block}.mlp.gate_proj") for block in (0, 1))
    x = torch.randn(1, 64)
    assert one.layout == other.layout and not torch.equal(one(x), other(x))
    change(one, other.weight.detach().clone())
    assert torch.equal(one(x), other(x))


def test_nothing_is_prepared_for_linears_that_are_offloaded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their payloads are read anew at every call, and must not stay in memory in another form."""
    model = load()
    wanted = logits(model)
    prepared: list[Any] = []
    prepare = ops.prepare_payload
    monkeypatch.setattr(ops, "prepare_payload", lambda *given: prepared.append(given) or prepare(*given))
    cpu_offload(model)
    for _ in range(2):
        close(logits(model), wanted)
    kept = [getattr(layer.fast, "weight", None) for layer in compressed_linears(model).values()]
    assert not prepared and not any(kept)


# --- what is built on it --------------------------------------------------------------------------------------------


def test_adapters_train_as_on_plain_products(load: Load, products: list[tuple[int, ...]]) -> None:
    found = []
    for fast in (True, False):
        torch.manual_seed(0)
        model = load("exact" if fast else "0")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"]))
        optimizer = torch.optim.SGD([part for part in adapted.parameters() if part.requires_grad], lr=0.5)
        for _ in range(3):
            loss = adapted(ids(30), labels=ids(30)).loss
            loss.backward()
            gradients = [part.grad.clone() for part in adapted.parameters() if part.requires_grad]
            optimizer.step()
            optimizer.zero_grad()
        found.append((loss.detach(), *gradients, *(part for part in adapted.state_dict().values())))
        assert all(bool(gradient.any()) for gradient in gradients)
    assert products
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_inputs_are_those_of_the_dense_matrix(
    dtype: torch.dtype, fast: bool, load: Load, products: list[tuple[int, ...]]
) -> None:
    """By a kernel and without, once and twice; what waits for the backward pass holds no matrix."""
    layer: Any = load().get_submodule(UP)
    layer.fast = Fast("exact") if fast else None
    dense, waiting = layer.dequantize().to(dtype), []
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: waiting.append(tensor.shape) or tensor, lambda t: t):
        y = layer(x)
    assert bool(products) == fast and dense.shape not in waiting
    assert layer(x[None]).add_(1).requires_grad  # as adapters do
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * y @ dense)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 2 * torch.ones_like(x) @ dense.T @ dense)


def test_a_plain_call_multiplies_by_kernels(load: Load, products: list[tuple[int, ...]]) -> None:
    """Norms and tables that may learn make every state want a gradient."""
    model = load()
    assert model(ids(5)).logits.requires_grad
    called = len(products)
    logits(model)
    assert called == len(products) - called > 0


def test_derivatives_that_go_forward_are_those_of_plain_products(load: Load) -> None:
    layer: Any = load().get_submodule(UP)
    x, direction = torch.randn(3, 64), torch.randn(3, 64)
    wanted = direction @ layer.dequantize().T
    found = torch.func.jvp(layer, (x,), (direction,))[1]
    close(found, wanted)
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, direction)))[1]
    close(found, wanted)
    close(torch.func.vmap(layer)(x), layer(x))
    close(torch.func.grad(lambda x: layer(x).sum())(x), torch.ones(3, len(wanted[0])) @ layer.dequantize())


def test_a_copy_made_while_decoded_multiplies_by_kernels(load: Load, products: list[tuple[int, ...]]) -> None:
    model = load()
    with lc.decoded(model):
        twin = copy.deepcopy(model)
    assert twin.get_submodule(UP).ready is None
    logits(twin)
    assert products


@pytest.mark.parametrize("tokens", [1, pytest.param(5, marks=slow), pytest.param(40, marks=slow)])
def test_torch_compile_keeps_the_operator(tokens: int, load: Load, products: list[tuple[int, ...]]) -> None:
    layer = load().get_submodule("model.layers.0.mlp")
    x = torch.randn(tokens, 64)
    with torch.no_grad():
        with plain(layer):
            wanted = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        close(compiled(x), wanted)
    assert len(products) == 3, "kernels are called by the graph"


def test_torch_export_keeps_the_operator(load: Load, products: list[tuple[int, ...]]) -> None:
    layer = load().get_submodule("model.layers.0.mlp").eval()
    x = torch.randn(5, 64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=1, max=64)},))
    with torch.no_grad():
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("llmcompress.linear.default") == 3
        for tokens in (1, 5, 40):
            x = torch.randn(tokens, 64)
            with plain(layer):
                wanted = layer(x)
            close(program.module()(x), wanted)
    assert products


def test_a_form_has_a_kernel_by_its_device() -> None:
    """Groups of 16 columns are multiplied on GPUs alone, pruned matrices on CPUs alone."""
    pruned = Where(Bitmap(torch.eye(32, 64) > 0), Dense(torch.ones(32, 64)), Zero((32, 64)))
    for form, on_cpu, on_gpu in ((grid((32, 64), 16, 16, 1, symmetric=True), False, True), (pruned, True, False)):
        layout, _ = pack_weight(form)
        for device, known in (("cpu", on_cpu), ("cuda", on_gpu)):
            weight = SimpleNamespace(is_meta=False, device=torch.device(device))
            layer: Any = SimpleNamespace(weight=weight, layout=layout, expression=lambda form=form: form)
            layer.get_parameter = lambda name, weight=weight: weight
            assert (ops.unsupported_form(layer) is None) == known, (layout.text, device)


# --- how it is asked for --------------------------------------------------------------------------------------------


def test_accelerate_names_linears_without_a_kernel(load: Load) -> None:
    model = load("0")
    found = accelerate(model, "int8")
    assert set(found.decoded) == WITHOUT and set(found.kernels) == compressed_linears(model).keys() - WITHOUT
    assert found.mode == "int8"
    text = str(found)
    assert all(f"{name} ({form})" in text for name, form in found.decoded.items())
    assert text.startswith(f"{len(found.kernels)} linears multiply by kernels (int8 inputs)")
    assert all((layer.fast is None) == (name in WITHOUT) for name, layer in compressed_linears(model).items())
    assert not accelerate(nn.Linear(2, 2)).kernels


def test_the_environment_variable_chooses_the_mode(
    load: Load, products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(load("0"))
    assert not products
    for mode in ("auto", "exact", "int8"):
        layers = compressed_linears(load(mode))
        assert {name: getattr(layer.fast, "mode", None) for name, layer in layers.items()} == {
            name: None if name in WITHOUT else mode for name in layers
        }
    place = load("0").name_or_path
    monkeypatch.delenv(SWITCH)
    model = AutoModelForCausalLM.from_pretrained(place)
    assert {getattr(layer.fast, "mode", "auto") for layer in compressed_linears(model).values()} == {"auto"}
    assert any(layer.fast for layer in compressed_linears(model).values())


def test_an_unknown_mode_is_refused(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"LLMCOMPRESS_FAST is 'quick'; set it to 0, auto or exact or int8"):
        load("quick")
    with pytest.raises(RecipeError, match=r"no mode 'quick'; choose one of auto, exact, int8"):
        accelerate(load("0"), "quick")


def test_plain_ends_with_an_error_too(load: Load) -> None:
    model = load()
    before = {name: layer.fast for name, layer in compressed_linears(model).items()}
    with pytest.raises(ZeroDivisionError), plain(model):
        assert all(layer.fast is None for layer in compressed_linears(model).values())
        raise ZeroDivisionError
    assert {name: layer.fast for name, layer in compressed_linears(model).items()} == before
