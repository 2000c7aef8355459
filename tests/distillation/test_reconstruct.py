"""Reconstruction while compressing: blocks come nearer to the dense model's, and what is stored is what was learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.calibration.walk import Execution, walk
from llmcompress.cli.app import app
from llmcompress.cli.compress import report_view
from llmcompress.data.calibration import calibration_tokens
from llmcompress.distillation.blockwise import Activations, BlockErrors, recover_block
from llmcompress.distillation.student.model import Student, relaxed_student
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.models.dense.families import architecture, block_stack
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.file_names import RECIPE
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.reporting.report import read
from llmcompress.runtime.ranks import Ranks
from llmcompress.weight.modules import compressed_linears
from tests.distillation.miniature import TEXT, loaded, make
from tests.lockstep import in_lockstep
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny

RULES = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "gptq", "bits": 2}]}]
TRELLIS = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "trellis", "bits": 2, "memory": 8}]}]
SCALES = {"scales": 1e-2, "norms": 1e-2}
QUICK = {"micro_batch": 2, "batch": 2, "steps": 24, "evaluate_every": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of two blocks, and a text."""
    folder = tmp_path_factory.mktemp("reconstruct")
    save_tiny("llama", folder / "dense")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


def recipe(place: Path, reconstruct: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 20, "length": 32, "held_out": 4}
    base = {"version": 1, "name": "r", "calibration": calibration, "compute": "float32", "rules": RULES}
    return base | ({} if reconstruct is None else {"reconstruct": QUICK | reconstruct}) | more


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found.double()


def block_errors(place: Path, folder: Path) -> list[float]:
    """Of each block's outputs in a finished checkpoint, on the held-out calibration sequences: the mean over tokens of
    |output - dense output|^2 / |dense output|^2."""
    asked = read_recipe(recipe(place, None))
    source = resolve(str(place / "dense"))
    assert asked.calibration is not None
    ids = calibration_tokens(asked.calibration, source.tokenizer(), lambda: None, source.config).sequences[-4:]  # type: ignore[arg-type, return-value]
    states: list[list[Tensor]] = []
    for path in (place / "dense", folder):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        kept: list[Tensor] = []
        for block in model.get_submodule(block_stack(model.config, model)).children():
            block.register_forward_hook(lambda _module, _inputs, output, kept=kept: kept.append(_hidden(output)))
        with torch.no_grad():
            model(ids)
        states.append(kept)
    return [
        float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())
        for wanted, found in zip(*states, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "rates"),
    [
        pytest.param(RULES, SCALES, id="grids"),
        pytest.param(TRELLIS, SCALES, id="trellis"),
        pytest.param(RULES, SCALES | {"weights": 1e-2}, id="weights"),
        pytest.param(RULES, SCALES | {"codes": 2e-2}, id="codes"),
    ],
)
def test_reported_errors_equal_those_of_the_checkpoint(
    rules: list[dict[str, Any]], rates: dict[str, float], place: Path, tmp_path: Path
) -> None:
    plain = lc.compress(place / "dense", recipe(place, None, rules=rules), tmp_path / "plain")
    found = lc.compress(place / "dense", recipe(place, {"rates": rates}, rules=rules), tmp_path / "tuned")
    blocks = found.report.blocks
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    assert all(block["after"] <= block["before"] for block in blocks.values())
    after, before = block_errors(place, found.folder), block_errors(place, plain.folder)
    assert [block["after"] for block in blocks.values()] == pytest.approx(after, rel=0.02), "norms are rounded"
    assert all(a < 0.99 * b for a, b in zip(after, before, strict=True))
    for block in blocks.values():  # with weights it learns after each group of layers, and the last time is not all
        last = block["after"] / block["before"]
        assert block["left"] < 0.99 * last if "weights" in rates else block["left"] == pytest.approx(last)
    assert found.report.bpw == plain.report.bpw and abs(found.report.bytes - plain.report.bytes) < 200
    verify(found.folder, text=place / "text.txt", length=16)


def test_errors_of_layers_are_said_to_be_those_before_the_learning(place: Path, tmp_path: Path) -> None:
    said = "errors of layers are those before their blocks learned, which moves all of a block together"
    plain = lc.compress(place / "dense", recipe(place, None), tmp_path / "plain")
    tuned = lc.compress(place / "dense", recipe(place, {"rates": {"scales": 1e-2}}), tmp_path / "tuned")
    first, second = ([row.error for row in result.report.layers if ".0." in row.name] for result in (plain, tuned))
    assert first == pytest.approx(second, rel=1e-4), "though the weights are others:"
    weights = (load_file(result.folder / "model.safetensors") for result in (plain, tuned))
    assert not torch.equal(*(each["model.layers.0.self_attn.q_proj.weight"] for each in weights))
    assert said in tuned.report.warnings and said not in plain.report.warnings


@pytest.mark.slow
def test_learning_uncompressed_weights_lowers_the_error(place: Path, tmp_path: Path) -> None:
    """More than scales and norms alone can; a layer that stays dense stays as it is."""
    rules = [{"match": "*.1.mlp.up_proj", "steps": []}, *RULES]
    means = []
    for name, rates in (("scales", SCALES), ("weights", SCALES | {"weights": 1e-2})):
        found = lc.compress(place / "dense", recipe(place, {"rates": rates}, rules=rules), tmp_path / name)
        means.append(sum(block_errors(place, found.folder)))
        dense, kept = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "dense", found.folder))
        linear = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(kept.get_parameter(linear), dense.get_parameter(linear))
        assert len(compressed_linears(kept)) == 13
    assert means[1] < means[0]


@pytest.mark.slow
def test_learning_at_tiny_rates_changes_nothing(place: Path, tmp_path: Path) -> None:
    """At rates too small for float16, the files are those of a run without reconstruction, in batches as large."""
    found = [
        lc.compress(place / "dense", recipe(place, asked), tmp_path / str(number)).folder
        for number, asked in enumerate((None, {"rates": {"scales": 1e-12}, "micro_batch": 16, "batch": 16}))
    ]
    one, other = (compressed_linears(AutoModelForCausalLM.from_pretrained(path)) for path in found)
    assert all(torch.equal(layer.W_q, other[name].W_q) for name, layer in one.items())


@pytest.mark.parametrize("family", tiered_nightly(["gpt2", "gemma2", "qwen2"], "gpt2".__eq__))
def test_families(family: str, tmp_path: Path) -> None:
    """Transposed linears, norms around norms, biases."""
    save_tiny(family, tmp_path / "dense")
    (tmp_path / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    asked = recipe(tmp_path, {"rates": SCALES | {"weights": 1e-2}, "steps": 8, "evaluate_every": 4})
    found = lc.compress(tmp_path / "dense", asked, tmp_path / "out")
    after = block_errors(tmp_path, found.folder)
    assert [block["after"] for block in found.report.blocks.values()] == pytest.approx(after, rel=0.02)


def problem(folder: Path) -> tuple[Callable[[Tensor], Tensor], Student, Activations]:
    """The first block of a model, its scales to train, and two sequences."""
    make(folder, [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}])
    student, _ = loaded(folder)
    part = relaxed_student(student, {"scales": 0.1}, None, "model.layers.0.")
    inputs, wanted = (torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layer, rotary = student.get_submodule("model.layers.0"), student.model.rotary_emb(inputs, torch.arange(8)[None])

    def block(hidden: Tensor) -> Tensor:
        output: Tensor = layer(hidden, position_embeddings=rotary)
        return output

    return block, part, Activations(inputs, wanted, torch.ones(2, 8, dtype=torch.bool))


def test_rates_of_a_block_rise_to_the_rate_and_fall_to_the_final_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, part, data = problem(tmp_path)
    step, shares = torch.optim.Adam.step, list[float]()

    def record(optimizer: torch.optim.Adam) -> None:
        shares.extend(group["lr"] / (0.02 * group["size"]) for group in optimizer.param_groups[:1])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    asked = Reconstruction(rates={"scales": 0.02}, steps=7, warmup=0.5, final_rate=0.2)
    recover_block(block, part, data, data, asked, "model.layers.0")
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.6, 0.2]), "a line up, and half a cosine down"


def test_a_signed_step_is_the_rate_in_the_direction_of_the_gradient(tmp_path: Path) -> None:
    block, part, data = problem(tmp_path)
    before = {name: value.detach().clone() for name, value in part.named_parameters().items()}
    data.error(block).backward()
    gradients = {name: value.grad.clone() for name, value in part.named_parameters().items() if value.grad is not None}
    for value in part.named_parameters().values():
        value.grad = None
    asked = Reconstruction(rates={"scales": 0.01}, optimizer="sign", steps=1, warmup=0, batch=2, micro_batch=2)
    found = recover_block(block, part, data, data, asked, "model.layers.0")
    assert found.step == 1 and gradients.keys() == before.keys()
    for name, value in part.named_parameters().items():
        steps = 0.01 * before[name].abs()
        assert torch.allclose(value - before[name], -steps * gradients[name].sign(), rtol=1e-3, atol=0), name


@pytest.mark.parametrize("batch", tiered([1, 2, 3], lambda batch: batch == 3))
def test_a_block_learns_the_same_in_several_processes(batch: int, tmp_path: Path) -> None:
    """Of three processes one has nothing held out; in a step of one sequence two have nothing to do."""
    make(tmp_path, [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}])
    inputs, wanted = (torch.randn(9, 8, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    data = Activations(inputs, wanted, torch.ones(9, 8, dtype=torch.bool))
    asked = Reconstruction(rates={"scales": 1e-2}, steps=6, batch=batch, evaluate_every=2)

    def learn(ranks: Ranks) -> tuple[BlockErrors, dict[str, Tensor]]:
        student, _ = loaded(tmp_path)
        part = relaxed_student(student, {"scales": 0.1}, None, "model.layers.0.")
        layer, rotary = student.get_submodule("model.layers.0"), student.model.rotary_emb(inputs, torch.arange(8)[None])

        def block(hidden: Tensor) -> Tensor:
            output: Tensor = layer(hidden, position_embeddings=rotary)
            return output

        mine, beside = ranks.share(torch.arange(7)), ranks.share(torch.arange(7, 9))
        found = recover_block(block, part, data[mine], data[beside], asked, "model.layers.0", ranks)
        return found, {name: value.detach().clone() for name, value in part.named_parameters().items()}

    [(alone, kept)], many = in_lockstep(1, learn), in_lockstep(3, learn)
    assert alone.step > 0 and alone.after < alone.before
    for found, values in many:
        assert found == many[0][0] and all(torch.equal(values[name], many[0][1][name]) for name in values)
        assert (found.step, found.frozen) == (alone.step, alone.frozen)
        assert (found.before, found.after) == pytest.approx((alone.before, alone.after), rel=1e-5)
        assert all(torch.allclose(values[name], kept[name], rtol=1e-4, atol=1e-6) for name in kept)


def test_a_step_may_draw_more_sequences_than_there_are(place: Path, tmp_path: Path) -> None:
    few = {"dataset": str(place / "text.txt"), "samples": 5, "length": 32, "held_out": 2}
    asked = recipe(place, {"micro_batch": 8, "batch": 8, "steps": 2, "evaluate_every": 1}, calibration=few)
    blocks = lc.compress(place / "dense", asked, tmp_path / "out").report.blocks.values()
    assert len(blocks) == 2 and all(block["after"] < block["before"] for block in blocks)


def test_a_block_that_learns_runs_on_as_many_sequences_as_a_process_may_draw(place: Path) -> None:
    source = resolve(str(place / "dense"))
    arch, ids = architecture(source.config, source.skeleton()), torch.randint(3, 250, (8, 16))

    def sizes(ranks: Ranks) -> list[int]:
        execution = Execution(batch_size=3, ranks=ranks)
        block = next(walk(source, arch, ranks.share(ids), execution=execution, held_out=2, window=1))
        assert block.run is not None
        return [len(block.run(block.hidden[:1].repeat(size, 1, 1))) for size in (1, 2, 3)]

    assert in_lockstep(2, sizes) == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reconstruct": {"rates": {"projections": 1e-3}}}, "as wide as the dense block's"),
        ({"reconstruct": {"rates": {"weights": 1e-3}}}, "weights are those of layers still to be compressed"),
        ({"reconstruct": {"rates": {"scales": 2.0}}}, "scales is 2.0; it must be less than 1"),
        ({"reconstruct": {"rtaes": {"scales": 1e-3}}}, "rtaes"),
        ({"reconstruct": {"batch": 3, "micro_batch": 2}}, "batch 3 is no multiple of micro_batch 2"),
        ({"reconstruct": {"latents": "weights"}}, "add a rate for codes"),
        ({"reconstruct": {}, "prefix": "dense"}, "prefix: dense"),
        ({"reconstruct": {}, "calibration": None}, "held-out text"),
    ],
)
def test_impossible_reconstructions_are_refused(
    changes: dict[str, Any], sentence: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        lc.compress(place / "dense", recipe(place, None) | changes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_with_nothing_to_hold_out_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(TEXT[:40])
    short = {"dataset": str(tmp_path / "short.txt"), "samples": 1, "length": 32, "held_out": 0.5}
    asked = recipe(place, {}, calibration=short)
    with pytest.raises(InputError, match="hold any of it out"):
        lc.compress(place / "dense", asked, tmp_path / "out")


@pytest.mark.slow
def test_the_command_prints_the_errors_of_blocks(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, {"rates": SCALES, "steps": 4})))
    done = CliRunner().invoke(app, ["compress", str(place / "dense"), str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    report = read(tmp_path / "out").to_json()
    left = median(block["left"] for block in report["blocks"].values())
    assert "blocks  2 reconstructed" in done.output and f" · x{left:.3f} by learning" in done.output
    for block in report["blocks"].values():
        del block["left"]  # as in reports of earlier versions
    [line] = [line for line in map(str, report_view(report, every=False)) if line.startswith("blocks")]
    assert line.startswith("blocks  2 reconstructed · error ") and "learning" not in line


def test_the_plan_says_that_blocks_will_learn(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, {"rates": SCALES})
    assert lc.plan(place / "dense", asked).reconstruction == Reconstruction(**QUICK, rates=SCALES, name="r").model_dump(
        mode="json"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    done = CliRunner().invoke(app, ["plan", str(place / "dense"), str(path)])
    assert done.exit_code == 0 and "learns  every block, 24 steps each time: norms at 0.01" in done.output


@pytest.mark.slow
def test_the_option_tune_adds_a_reconstruction(place: Path, tmp_path: Path) -> None:
    """And a section that a recipe has stays what it is."""
    for name, section in (("none", None), ("some", {"rates": SCALES, "steps": 2})):
        path, out = tmp_path / f"{name}.yaml", tmp_path / name
        path.write_text(yaml.safe_dump(recipe(place, section)))
        done = CliRunner().invoke(app, ["compress", str(place / "dense"), str(path), "--tune", "-o", str(out)])
        assert done.exit_code == 0, done.output
        kept = read_recipe(out / RECIPE).reconstruct
        assert kept == Reconstruction(name="r", **({} if section is None else QUICK | section))
        assert read(out).blocks
