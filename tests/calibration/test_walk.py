"""The walk against the model's own forward: it must see, block by block, exactly what the unedited model computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmcompress.calibration.block_calls import _ForwardRecord, _record_batches, embed
from llmcompress.calibration.blocks import BlockForward, Call, Calls, RowBatch
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Block, Execution, walk
from llmcompress.compression.block import swap
from llmcompress.errors import InputError, NumericsError
from llmcompress.methods.moments import capped_weights
from llmcompress.models.dense.families import FAMILIES, Architecture, architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import PackedWeight, pack_weight
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Dense
from tests.tiny import VOCABULARY, save_tiny, tiny

DISCOVERED = ["stablelm", "starcoder2", "olmo2", "granite", "cohere", "bloom"]  # families without a row
OUTER = frozenset({"outer"})
Opened = Callable[[str], tuple[DenseModel, Architecture]]


def sequences(count: int = 5, length: int = 24) -> Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Tiny models on disk, one per family."""
    made: dict[str, tuple[DenseModel, Architecture]] = {}

    def get(family: str) -> tuple[DenseModel, Architecture]:
        if family not in made:
            source = resolve(str(save_tiny(family, tmp_path_factory.mktemp(family), **changes(family))))
            made[family] = source, architecture(source.config, source.skeleton())
        return made[family]

    return get


def changes(family: str) -> dict[str, Any]:
    """Settings for model types that `tiny` has no row for."""
    if family not in DISCOVERED:
        return {}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    if family == "bloom":  # its blocks return tuples
        return {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    return {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def block_outputs(model: PreTrainedModel, arch: Architecture, tokens: Tensor) -> list[Tensor]:
    """Return the output of every block of the plain model for one batch."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(layout.path).register_forward_hook(
            lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for layout in arch.blocks
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def linear_inputs(model: PreTrainedModel, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """The inputs `[tokens, in]` of linears in the plain model."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", [*FAMILIES, *DISCOVERED])
def test_walk_reproduces_hidden_states(family: str, opened: Opened) -> None:
    source, arch = opened(family)
    assert (arch.family is None) == (family in DISCOVERED)
    tokens, plain = sequences(), tiny(family, **changes(family))
    batches = [slice(0, 2), slice(2, 3), slice(3, 5)]  # batch size 2, the last two sequences held out
    expected = [block_outputs(plain, arch, tokens[rows]) for rows in batches]
    block = None
    for block in walk(source, arch, tokens, Statistics(needs=OUTER), Execution(batch_size=2), held_out=2):
        if block.index:
            for rows, outputs in zip(batches, expected, strict=True):
                assert (block.hidden[rows] - outputs[block.index - 1]).abs().max() == 0
    assert block is not None
    for rows, outputs in zip(batches, expected, strict=True):  # after the last block
        assert (block.hidden[rows] - outputs[-1]).abs().max() == 0


def test_moments_are_those_of_the_plain_inputs(opened: Opened) -> None:
    source, arch = opened("llama")
    tokens, plain = sequences(), tiny("llama")
    everything = frozenset({"square", "outer"})
    for block in walk(source, arch, tokens, Statistics(needs=everything, cap=None), held_out=2):
        for group in block.groups:
            x = linear_inputs(plain, [group.names[0]], tokens[:3])[group.names[0]]
            held = linear_inputs(plain, [group.names[0]], tokens[3:])[group.names[0]]
            assert group.held_out is not None
            assert (group.inputs.tokens, group.held_out.tokens) == (3 * 24, 2 * 24)
            torch.testing.assert_close(group.inputs.outer, x.T @ x)
            torch.testing.assert_close(group.inputs.square, x.square().sum(0))
            torch.testing.assert_close(group.held_out.outer, held.T @ held)
            assert group.held_out.square is None


def test_batch_size_changes_nothing_but_rounding(opened: Opened) -> None:
    source, arch = opened("qwen2")
    runs = [
        [
            group
            for block in walk(
                source, arch, sequences(), Statistics(needs=OUTER), Execution(batch_size=size), held_out=1
            )
            for group in block.groups
        ]
        for size in (1, 3, None)
    ]
    for groups in zip(*runs, strict=True):
        for other in groups[1:]:
            torch.testing.assert_close(other.inputs.outer, groups[0].inputs.outer)
            assert other.inputs.tokens == pytest.approx(groups[0].inputs.tokens)


def test_massive_tokens_are_capped(opened: Opened) -> None:
    source, arch = opened("llama")
    tokens, plain = sequences(), tiny("llama")
    block = next(walk(source, arch, tokens, Statistics(needs=OUTER, cap=0.5)))
    for group in block.groups:
        x = linear_inputs(plain, [group.names[0]], tokens)[group.names[0]]
        weights = capped_weights(x.reshape(5, 24, -1), 0.5).flatten()
        assert float(weights.max()) < 1
        torch.testing.assert_close(group.inputs.outer, (x * weights[:, None]).T @ x)


def test_needs_by_name(opened: Opened) -> None:
    source, arch = opened("llama")
    key, down = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"
    first, second = walk(source, arch, sequences(), Statistics(needs={key: frozenset({"square"}), down: OUTER}))
    assert first.groups == second.groups == ()  # dropped once the walk has moved on
    blocks = walk(source, arch, sequences(), Statistics(needs={key: frozenset({"square"}), down: OUTER}))
    (group,) = next(blocks).groups
    assert key in group.names
    assert len(group.names) == 3
    assert group.inputs.square is not None
    assert group.inputs.outer is None
    (group,) = next(blocks).groups
    assert group.names == (down,)
    assert group.inputs.outer is not None


def rounded(block: Block) -> dict[str, PackedWeight]:
    """Every linear of the block, changed a lot."""
    names = [name for group in block.groups for name in group.names]
    return {name: pack_weight(Dense((block.weight(name) * 0.5).bfloat16())) for name in names}


def edited(family: str, arch: Architecture, blocks: range) -> PreTrainedModel:
    """The plain model with the same change made to some of its blocks."""
    model = tiny(family)
    for name in arch.linears():
        if any(name.startswith(f"{arch.blocks[index].path}.") for index in blocks):
            weight = model.get_submodule(name).weight.data
            weight.copy_((weight * 0.5).bfloat16().float())
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: transposed weights, biases
def test_later_blocks_see_the_compressed_prefix(family: str, opened: Opened) -> None:
    source, arch = opened(family)
    tokens = sequences()
    for block in walk(source, arch, tokens, Statistics(needs=OUTER, cap=None)):
        half = edited(family, arch, range(block.index))
        for group in block.groups:
            x = linear_inputs(half, [group.names[0]], tokens)[group.names[0]]
            torch.testing.assert_close(group.inputs.outer, x.T @ x)
        for name in group.names:
            weight, linear = block.weight(name), arch.linears()[name]
            assert tuple(weight.shape) == linear.shape
        swap(block, rounded(block))
        assert all(isinstance(block.module.get_submodule(n.split(".", 3)[3]), CompressedLinear) for n in group.names)
    outputs = block_outputs(edited(family, arch, range(2)), arch, tokens)
    torch.testing.assert_close(block.hidden, outputs[-1])


def test_dense_prefix(opened: Opened) -> None:
    source, arch = opened("llama")
    expected = block_outputs(tiny("llama"), arch, sequences())
    for block in walk(source, arch, sequences(), Statistics(needs=OUTER, prefix="dense")):
        assert (block.hidden - expected[block.index]).abs().max() == 0  # the outputs already
        swap(block, rounded(block))
    assert (block.hidden - expected[-1]).abs().max() == 0
    with pytest.raises(ValueError, match="same stream twice"):
        next(walk(source, arch, sequences(), Statistics(prefix="dense", cross=True)))


def test_dense_stream_gives_the_cross_moment(opened: Opened) -> None:
    source, arch = opened("llama")
    tokens = sequences()
    needs = frozenset({"outer", "cross"})
    for block in walk(
        source, arch, tokens, Statistics(needs=needs, cap=None, cross=True), Execution(batch_size=2), held_out=1
    ):
        for group in block.groups:
            name = group.names[0]
            dense_x = linear_inputs(tiny("llama"), [name], tokens[:4])[name]
            x = linear_inputs(edited("llama", arch, range(block.index)), [name], tokens[:4])[name]
            torch.testing.assert_close(group.inputs.cross, dense_x.T @ x)
            torch.testing.assert_close(group.inputs.outer, x.T @ x)
        swap(block, rounded(block))


def test_swapped_weight_is_what_runs(opened: Opened) -> None:
    source, arch = opened("gpt2")
    block = next(walk(source, arch, sequences(), Statistics(needs=OUTER)))
    name = block.groups[0].names[0]
    weight = Dense(block.weight(name).bfloat16())
    bias = block.module.get_parameter("attn.c_attn.bias")
    swap(block, {name: pack_weight(weight)})
    x = torch.randn(3, weight.values.shape[1])
    torch.testing.assert_close(block.module.get_submodule("attn.c_attn")(x), x @ dense(weight).T + bias)


def test_without_data(opened: Opened) -> None:
    source, arch = opened("llama")
    calls: list[tuple[int, int, float]] = []
    weights = tiny("llama").state_dict()
    names: list[str] = []
    for block in walk(source, arch, None, execution=Execution(progress=lambda *call: calls.append(call))):
        for group in block.groups:
            assert group.inputs.tokens == 0
            assert group.inputs.outer is None
            assert group.held_out is None
            assert all(torch.equal(block.weight(name), weights[f"{name}.weight"]) for name in group.names)
            names += group.names
    assert names == list(arch.linears())
    assert calls == [(1, 2, 0.0), (2, 2, 0.0)]


def test_progress_counts_blocks(opened: Opened) -> None:
    source, arch = opened("llama")
    calls: list[tuple[int, int, float]] = []
    for _ in walk(source, arch, sequences(), execution=Execution(progress=lambda *call: calls.append(call))):
        pass
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]
    assert all(rate > 0 for *_, rate in calls)


def test_blocks_are_dropped(opened: Opened) -> None:
    source, arch = opened("llama")
    for block in walk(source, arch, sequences(), Statistics(needs=OUTER)):
        assert all(not parameter.is_meta for parameter in block.module.parameters())
        assert not any(module._forward_pre_hooks for module in block.module.modules())
    assert all(parameter.is_meta for parameter in block.module.parameters())


def damaged(source: DenseModel, path: Path, name: str, value: float) -> DenseModel:
    """A copy of the model with one weight set to `value`."""
    tensors = load_file(source.folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return resolve(str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value: float, tmp_path: Path, opened: Opened) -> None:
    source, arch = opened("llama")
    broken = damaged(source, tmp_path / "broken", "model.layers.1.mlp.up_proj.weight", value)
    blocks = walk(broken, arch, sequences())
    next(blocks)
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf in .*broken"):
        next(blocks)


def test_overflow_names_the_layer(tmp_path: Path, opened: Opened) -> None:
    source, arch = opened("llama")
    broken = damaged(source, tmp_path / "broken", "model.layers.0.mlp.up_proj.weight", 3e38)
    tensors = load_file(broken.folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, broken.folder / "model.safetensors")
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.mlp\.down_proj: its inputs became NaN or Inf"):
        next(walk(broken, arch, sequences(), Statistics(needs=OUTER)))
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: its outputs became NaN or Inf"):
        list(walk(broken, arch, sequences(), Statistics(needs={})))


@pytest.mark.parametrize(
    ("tokens", "held_out", "sentence"),
    [
        (sequences() + VOCABULARY, 0, "the model's vocabulary ends at 263"),
        (sequences() - 300, 0, "the calibration text has token -"),
        (sequences(length=65), 0, "sequences of 65 tokens are longer than the model's 64 positions"),
        (sequences(), 5, "none is left to calibrate on"),
        (sequences()[:0], 0, "none is left to calibrate on"),
    ],
)
def test_unsuitable_sequences_are_refused(tokens: Tensor, held_out: int, sentence: str, opened: Opened) -> None:
    source, arch = opened("llama")
    with pytest.raises(InputError, match=sentence):
        next(walk(source, arch, tokens, held_out=held_out))


def test_blocks_that_cannot_run_alone_are_refused() -> None:
    hidden, mask = torch.zeros(1, 2, 3), torch.zeros(2)
    call = Call((), {"mask": mask})
    record = _ForwardRecord("odd", extra=0, known=[Call((), {"mask": mask + 1e-7})] * 2)  # rounded otherwise
    record.add("layers.0", hidden, call)
    record.add("layers.1", hidden, call)
    assert len(record.calls) == 2
    other, found = _ForwardRecord("odd", 0, [call, Call((), {"mask": mask + 1})]), [record.depends]
    for path in ("layers.0", "layers.1"):
        other.add(path, hidden, call)
        found.append(other.depends)
    assert found == [False, False, True]
    why = "it changes the hidden states before layers.1"
    with pytest.raises(InputError, match=rf"^the blocks of model type 'odd' .*one by one \({why}\); choose"):
        record.add("layers.1", hidden.clone(), call)
    with pytest.raises(InputError, match="layers.0 gets a cache"):
        _ForwardRecord("odd", False, None).add("layers.0", hidden, Call((DynamicCache(),), {}))


class Relay(nn.Module):
    """A model whose second block reads what the first returns beside hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.config: Any = SimpleNamespace(model_type="relay", get_text_config=lambda decoder: self.config)

    @property
    def base_model(self) -> Relay:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, more = input_ids[..., None].float(), None
        for layer in self.layers:
            hidden, more, _ = layer(hidden, more)
        return hidden


def test_blocks_that_talk_to_each_other_are_refused() -> None:
    model, batches = Relay(), [RowBatch(slice(0, 5), False)]
    with pytest.raises(InputError, match="its code fails with stand-ins for them"):  # as blocks return three things
        _record_batches(model, "layers", sequences(), batches, torch.device("cpu"), extra=0, sizes=())
    with pytest.raises(InputError, match=r"layers\.1 gets more than hidden states from the block before"):
        _record_batches(model, "layers", sequences(), batches, torch.device("cpu"), extra=2, sizes=())
    assert all(type(layer) is nn.Identity for layer in model.layers)


class Odd(nn.Module):
    """A block that calls one linear twice and the other never, or changes the width."""

    def __init__(self, width: int):
        super().__init__()
        self.twice, self.never = nn.Linear(4, width), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.twice(hidden) + self.twice(hidden),)


def test_odd_blocks_are_refused() -> None:
    hidden = torch.zeros(1, 2, 4)
    alone = Calls("odd", {1: [Call((), {})]}, {})
    run = BlockForward(Odd(4), "layers.0", alone, 0)
    assert run(hidden).shape == hidden.shape
    for name, times in (("layers.0.twice", 2), ("layers.0.never", 0)):
        with pytest.raises(InputError, match=f"{name} is called {times} times by its block"):
            run(hidden, names=(name,))
    assert not run.module.twice._forward_pre_hooks  # taken off although the run failed
    with pytest.raises(InputError, match=r"layers\.0 turns hidden states of shape \[1, 2, 4\] into \[1, 2, 5\]"):
        BlockForward(Odd(5), "layers.0", alone, 0)(hidden)


def test_recorders_are_taken_out_again(opened: Opened) -> None:
    source, arch = opened("llama")
    model = source.skeleton()
    batches = [RowBatch(slice(0, 5), False)]
    embed(model, source, arch, sequences(), batches, torch.device("cpu"))
    assert [type(block).__name__ for block in model.model.layers] == ["LlamaDecoderLayer"] * 2
    assert all(parameter.is_meta for parameter in model.parameters())


PEAK = """
import sys
import torch
torch.set_num_threads(1)
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.compression.block import swap
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.families import architecture
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.nodes import Dense

def peak_kilobytes():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])

for folder in sys.argv[1:]:
    source = resolve(folder)
    arch = architecture(source.config, source.skeleton())
    for block in walk(source, arch, torch.arange(256).reshape(4, 64), Statistics(frozenset({"outer"})), held_out=1):
        names = [name for group in block.groups for name in group.names]
        swap(block, {name: pack_weight(Dense(block.weight(name).bfloat16())) for name in names})
    print(peak_kilobytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_follows_one_block(tmp_path: Path) -> None:
    """8 and 32 blocks of 14 MB in float32: held all at once they would differ by 330 MB."""
    folders = [str(save_wide(tmp_path / str(layers), layers)) for layers in (8, 32)]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    assert peaks[1] < 1.15 * peaks[0], f"peak memory {peaks[0]} kB with 8 blocks, {peaks[1]} kB with 32"


def save_wide(path: Path, layers: int) -> Path:
    """A Llama of width 512 in bfloat16, written tensor by tensor."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 512}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(path)
    block = {name: torch.randn(shape).mul(0.02).bfloat16() for name, shape in shapes.items() if ".0." in name}
    rest = {name: torch.randn(shape).mul(0.02).bfloat16() for name, shape in shapes.items() if ".layers." not in name}
    blocks = {name.replace(".0.", f".{i}.", 1): value.clone() for i in range(layers) for name, value in block.items()}
    save_file({**rest, **blocks}, path / "model.safetensors")
    return path


def test_statistics_are_summed_in_float32_whatever_the_products_are(tmp_path: Path) -> None:
    """A Gram matrix of bfloat16 products loses positive definiteness: only the forward may be in bfloat16."""
    source = resolve(str(save_tiny("llama", tmp_path / "dense")))
    arch = architecture(source.config, source.skeleton())
    sequences = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    needs = frozenset({"outer", "square"})
    for block in walk(source, arch, sequences, Statistics(needs=needs, cap=None), Execution(dtype=torch.bfloat16)):
        for group in block.groups:
            outer, square = group.inputs.outer, group.inputs.square
            assert outer is not None and square is not None
            torch.testing.assert_close(outer.diagonal(), square, rtol=1e-5, atol=1e-6)
