"""The price list: errors from few runs, sensitivities from half forwards, sizes from headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmcompress as lc
from llmcompress.allocation.allocate import allocate, reachable_choices
from llmcompress.allocation.choices import LOW_RATES, RATES, find_choices, goes_low
from llmcompress.allocation.distortion import (
    compress_roughly,
    error,
    families,
    interpolate_errors,
    options_to_measure,
    rough,
    sample_rows,
)
from llmcompress.allocation.file_sizes import payload_bytes
from llmcompress.allocation.prices import statistics_needs
from llmcompress.allocation.sensitivity import AT_ONCE, WINDOW, WINDOWS, ExchangedSource, Probe, probe_windows
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.compression.job import Job, prepare
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, methods, sketch, step
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.target import Target
from llmcompress.weight.expression import bits
from llmcompress.weight.layout import pack_weight
from tests.builders import correlated, every_node, gaussian, layer, moments
from tests.tiers import tiered
from tests.tiny import save_tiny
from tests.zoo import save_zoo, text_for_calibration, zoo

LOOK_BACK = {"method": "refine", "passes": 1}


# --- errors ---------------------------------------------------------------------------------------------------------


def unlike_layers() -> list[tuple[Layer, Moments]]:
    """Layers of unlike shape and inputs, which feedback helps much or not at all, and their held-out inputs."""
    shapes = [(64, 64), (96, 128), (128, 64), (48, 96)]
    inputs = [[correlated(512, width, seed, n) for seed in (n, 50 + n)] for n, (_, width) in enumerate(shapes)]
    inputs[2] = [torch.randn(512, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return [
        (layer(gaussian(*size, seed=n), fitted), moments(held_out))
        for n, (size, (fitted, held_out)) in enumerate(zip(shapes, inputs, strict=True))
    ]


@pytest.mark.slow
def test_a_rough_encoder_ranks_layers_as_a_thorough_one() -> None:
    """A longer memory and a look back change the errors of all layers alike, within a quarter, what a sixth of a bit
    does, where these differ by more than three times. That spread is nearly all the look back's."""
    thorough = (step({"method": "rotate"}), step({"method": "trellis", "bits": 1, "memory": 10}), step(LOOK_BACK))
    layers = unlike_layers()
    fast = {0: error(*swapped(layers[0], rough(thorough)))}
    asked = [error(*swapped(layers[0], thorough))]
    truths = [error(*swapped(one, thorough)) for one in layers]
    found = [interpolate_errors({0: error(*swapped(one, rough(thorough)))}, fast, asked)[0] for one in layers]
    assert found == pytest.approx(truths, rel=0.25)
    assert max(truths) > 3 * min(truths)


def test_rates_between_those_run_are_interpolated_well() -> None:
    grids = [step({"method": "gptq", "bits": bits}) for bits in (2, 3, 4, 5, 6)]
    options = [(step({"method": "rotate"}), grid, step(LOOK_BACK)) for grid in grids]
    [family] = families(options)
    layers = unlike_layers()
    fast = {number: error(*swapped(layers[0], rough(options[number]))) for number in options_to_measure(family)}
    asked = [error(*swapped(layers[0], option)) for option in options]
    for one in layers:
        run = {number: error(*swapped(one, rough(options[number]))) for number in options_to_measure(family)}
        truth = [error(*swapped(one, option)) for option in options]
        assert interpolate_errors(run, fast, asked) == pytest.approx(truth, rel=0.25)


def swapped(one: tuple[Layer, Moments], steps: tuple[StepConfig, ...]) -> tuple[Layer, tuple[StepConfig, ...], Moments]:
    """The arguments of `error`."""
    return one[0], steps, one[1]


def test_what_was_run_as_asked_for_keeps_its_error() -> None:
    run = {0: 0.5, 1: 0.2, 2: 0.01}
    reference = {0: 0.3, 1: 0.1, 2: 0.02}
    assert interpolate_errors(run, reference, [0.3, 0.1, 0.02]) == pytest.approx([0.5, 0.2, 0.01])
    ratio = interpolate_errors({0: 0.6, 3: 0.03}, {0: 0.3, 3: 0.01}, [0.3, 0.2, 0.1, 0.01])
    assert ratio[0] == pytest.approx(0.6) and ratio[3] == pytest.approx(0.03)
    assert 2 < ratio[2] / 0.1 < 3 and ratio == sorted(ratio, reverse=True)


def test_families_and_their_runs() -> None:
    grids = [(step({"method": "rtn", "bits": bits, "group_size": 16}),) for bits in (3, "ternary", 8, 4, 2)]
    options = [*grids, (step({"method": "rtn", "bits": 4}),)]
    assert families(options) == [[1, 4, 0, 3, 2], [5]]
    assert (
        options_to_measure([1, 4, 0, 3, 2]) == [1, 0, 2]
        and options_to_measure([5]) == [5]
        and options_to_measure([1, 2]) == [1, 2]
    )
    assert [type(config).__name__ for config in rough((step({"method": "trellis"}), step(LOOK_BACK)))] == [
        "TrellisConfig"
    ]


@pytest.mark.parametrize("name", methods())
def test_a_rough_step_takes_the_same_bits_and_cannot_be_made_rougher(name: str) -> None:
    for example in methods()[name].config.examples:
        config = step({"method": name, **example})
        fast = config.rough()
        if fast is not None:
            assert fast.rough() == fast and fast.method == name
            before = (step({"method": "rtn"}),) if name == "refine" else ()
            assert bits(sketch("a", (128, 256), (*before, fast))) == bits(sketch("a", (128, 256), (*before, config)))


def test_some_rows_stand_for_all() -> None:
    one = layer(gaussian(4000, 32), correlated(256, 32))
    option = (step({"method": "gptq", "bits": 3}),)
    held_out = moments(correlated(256, 32, seed=5))
    wanted = error(one, option, held_out)
    for is_table, rows in ((True, 2048), (False, 512)):
        few = sample_rows(one, is_table)
        assert len(few.weight) == rows
        assert error(few, option, held_out) == pytest.approx(wanted, rel=0.2)
    assert compress_roughly(one, option, held_out)[1] == pytest.approx(wanted, rel=0.2)
    small = layer(gaussian(640, 32), correlated(256, 32))
    assert sample_rows(small) is small and sample_rows(small, is_table=True) is small


# --- sensitivities --------------------------------------------------------------------------------------------------


def probed(source: DenseModel, windows: Tensor, share: float) -> dict[str, float]:
    """Return the KL for every matrix when its weights are multiplied by `share`."""
    arch = architecture(source.config, source.skeleton())
    probe = Probe(source, arch, windows, "cpu")
    numbers: dict[str, int] = {}
    tables = [arch.embedding] if arch.tied else [arch.embedding, arch.head]
    needs: dict[str, frozenset[str]] = dict.fromkeys([*arch.linears(), *tables], frozenset())
    for block in walk(source, arch, windows, Statistics(needs=needs, prefix="dense"), held_out=1):
        for name in (name for group in block.groups for name in group.names):
            numbers[name] = probe.exchange(block, name, block.weight(name) * share)
        probe.leave(block)
    found = probe.divergences()
    return {name: found[number] for name, number in numbers.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiered(["llama", "gemma2", "gpt2", "opt"], "gpt2".__eq__))
def test_the_dense_weight_changes_nothing_and_another_what_a_whole_forward_says(
    family: str, tied: bool, tmp_path: Path
) -> None:
    source = resolve(str(save_tiny(family, tmp_path, tie_word_embeddings=tied)))
    windows = torch.randint(0, 250, (AT_ONCE + 1, 12), generator=torch.Generator().manual_seed(0))
    same = probed(source, windows, 1.0)
    found = probed(source, windows, 0.7)
    assert set(same.values()) == {0.0}
    model = source.load()
    assert len(found) == len(architecture(model.config, model).linears()) + (1 if tied else 2)
    with torch.no_grad():
        expected = model(windows).logits.log_softmax(-1)[:, :-1]
        for name, kl in found.items():
            parameter = model.get_submodule(name).get_parameter("weight")
            before, parameter.data = parameter.data, parameter.data * 0.7
            changed = model(windows).logits.log_softmax(-1)[:, :-1]
            parameter.data = before
            wanted = (expected.exp() * (expected - changed)).sum(-1).mean().item()
            assert kl == pytest.approx(wanted, rel=1e-3, abs=1e-7), name


def test_only_another_token_table_has_the_blocks_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, names = resolve(str(save_tiny("llama", tmp_path, tie_word_embeddings=False))), []
    read = ExchangedSource.read
    monkeypatch.setattr(ExchangedSource, "read", lambda self, name: names.append(name) or read(self, name))
    probed(source, torch.arange(24).reshape(2, 12), 0.9)
    assert names.count("model.layers.1.mlp.up_proj.weight") == 1
    assert names.count("lm_head.weight") == 2  # of the table, and of the head


def test_probing_tokens_are_held_out_ones() -> None:
    text = torch.arange(12 * 1100).reshape(12, 1100)
    held_out = text[3:]
    assert torch.equal(probe_windows(CalibrationTokens(text, 9, "", 12)), held_out[:WINDOWS, :WINDOW])
    last = text[-1, : WINDOWS * WINDOW].reshape(WINDOWS, WINDOW)
    assert torch.equal(probe_windows(CalibrationTokens(text, 1, "", 12)), last)
    assert torch.equal(probe_windows(CalibrationTokens(text[:, :40], 1, "", 12)), text[-1:, :40])


def test_an_expert_that_no_probing_token_reaches_costs_as_the_least_sensitive_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own change shows in no prediction; the text to come may reach it."""
    dense, text = save_zoo("deepseek_v3", tmp_path / "dense"), text_for_calibration(tmp_path)
    model = zoo("deepseek_v3")
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")[0] = -1e4
    model.save_pretrained(dense)
    recipe = {
        "version": 1,
        "calibration": {"dataset": str(text), "samples": 8, "length": 48, "held_out": 2},
        "rules": [{"match": ["*.self_attn.*", "*shared_experts*", "*.layers.0.*"], "steps": []}],
        "options": [[{"method": "rtn", "bits": bits, "group_size": 16}] for bits in (2, 4, 8)],
        "target": {"bpw": 5.0},
    }
    plan = allocate(prepare(resolve(str(dense)), read_recipe(recipe)))
    sensitivities = {one.name: one.sensitivity for one in plan.prices}
    unreached = {f"model.layers.1.mlp.experts.0.{leaf}_proj" for leaf in ("gate", "up", "down")}
    assert {name for name, value in sensitivities.items() if value == 0} == unreached
    for one in (one for one in plan.prices if one.name in unreached):
        leaf = one.name.rpartition(".")[2]
        least = min(value for name, value in sensitivities.items() if name.endswith(leaf) and value)
        assert [offer.damage for offer in one.offers] == pytest.approx([offer.error * least for offer in one.offers])
    [note] = plan.summary(0.0, 0)["notes"]
    assert note in caplog.messages and all(name in note for name in unreached)


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_payloads_are_as_large_as_they_are_said_to_be() -> None:
    for w in every_node():
        actual = pack_weight(w)[0].bytes()
        assert actual <= payload_bytes(w) <= actual + 48


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_as_large_as_its_plan(tied: bool, tmp_path: Path) -> None:
    """Dense blocks, a rule's layers, chosen ones, tables: the sum is the size on disk, less at most 1 %, never more."""
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=tied, hidden_size=64, intermediate_size=160)
    grids = [[{"method": "rtn", "bits": bits}] for bits in (2, 5)]
    rules = [{"match": "*.1.mlp.*", "steps": []}, {"match": "*.k_proj", "steps": [{"method": "rtn", "bits": 7}]}]
    calibration = {"samples": 4, "length": 32}
    asked = read_recipe(
        {"version": 1, "target": {"bytes": "1MB"}, "options": grids, "rules": rules, "calibration": calibration}
    )
    found = find_choices(prepare(resolve(str(source)), asked))
    names = [one.name for one in found.matrices if not one.is_table]
    assert len(names) == 9 and not any("k_proj" in name or "1.mlp" in name for name in names)
    assert [one.name for one in found.matrices if one.is_table] == ["model.embed_tokens", "lm_head"][: 2 - tied]
    plan = [number % 2 for number in range(len(found.matrices))]
    written = [{"match": one.name, "steps": one.options[plan[i]]} for i, one in enumerate(found.matrices)]
    tables = {"embeddings" if "embed" in one["match"] else "head": one["steps"] for one in written[9:]}
    for_driver = {"version": 1, "rules": [*rules, *written[:9]], "calibration": {**calibration}, **tables}
    for_driver["calibration"]["dataset"] = str(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("Seven grey geese fly over the mill. " * 60)
    report = lc.compress(source, for_driver, tmp_path / "out").report
    assert report.bytes <= found.size(plan) <= 1.01 * report.bytes
    assert report.bpw == pytest.approx(found.bpw(plan))


def test_default_options_suit_a_llama_and_stop_at_its_tables(tmp_path: Path) -> None:
    source = resolve(str(save_tiny("llama", tmp_path / "dense")))
    base = {"version": 1, "calibration": {"samples": 4, "length": 32}}
    linears = find_choices(prepare(source, read_recipe(base | {"target": {"bpw": 2}})))
    assert all(not one.is_table and len(one.options) == len(RATES) for one in linears.matrices)
    assert {steps[-2].method for one in linears.matrices for steps in one.options} == {"trellis"}
    everything = find_choices(prepare(source, read_recipe(base | {"target": {"kl": 0.1}})))
    assert [one.options[0][0].method for one in everything.matrices if one.is_table] == ["rotate", "rotate"]
    job = prepare(source, read_recipe(base | {"target": {"kl": 0.1}}))
    needs = statistics_needs(job, {one.name: one for one in everything.matrices})
    assert needs["model.embed_tokens"] == frozenset(), "a table that is only looked up has no inputs, in the run either"
    assert "outer" in needs["lm_head"] and "outer" in needs[linears.matrices[0].name]
    no_table = find_choices(prepare(source, read_recipe(base | {"target": {"kl": 0.1}, "table": []})))
    assert [one.name for one in no_table.matrices if one.is_table] == ["lm_head"]
    fixed = base | {"target": {"kl": 0.1}, "embeddings": [{"method": "rtn"}]}
    fixed["rules"] = [{"match": "lm_head", "steps": []}]
    assert len(find_choices(prepare(source, read_recipe(fixed))).matrices) == len(linears.matrices)


def test_tables_of_an_odd_number_of_rows_have_options_of_whole_bits(tmp_path: Path) -> None:
    """Half bits go two rows at a time; 50,257 and 32,001 tokens are common."""
    source = resolve(str(save_tiny("llama", tmp_path / "dense", vocab_size=265)))
    recipe = {"version": 1, "calibration": {"samples": 4, "length": 32}, "target": {"bytes": 100_000}}
    found = find_choices(prepare(source, read_recipe(recipe)))
    tables = {one.name: one for one in found.matrices if one.is_table}
    assert list(tables) == ["model.embed_tokens", "lm_head"]
    trellises = [steps[-1] for one in tables.values() for steps in one.options if steps[-1].method == "trellis"]
    assert [one.model_dump()["bits"] for one in trellises] == [2, 3, 4, 2, 3, 4]
    assert [note.split(":")[1].split(" cannot")[0].strip() for note in found.notes] == list(tables)


# --- less than one bit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model whose matrices are large enough for scales to leave them a rank at half a bit."""
    place = tmp_path_factory.mktemp("wide") / "dense"
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return resolve(str(save_tiny("llama", place, **shape)))


def low_job(source: DenseModel, target: dict[str, float], **more: object) -> Job:
    calibration = {"samples": 6, "length": 48, "held_out": 2}
    return prepare(source, read_recipe({"version": 1, "calibration": calibration, "target": target, **more}))


def test_low_targets_have_options_below_one_bit(wide: DenseModel) -> None:
    low, usual = find_choices(low_job(wide, {"bpw": 1.2})), find_choices(low_job(wide, {"bpw": 1.25}))
    for one, other in zip(low.matrices, usual.matrices, strict=True):
        assert one.options[len(LOW_RATES) :] == other.options
        counts = [count / (one.shape[0] * one.shape[1]) for count in one.bits[: len(LOW_RATES)]]
        assert all(0.9 * rate < count <= rate for rate, count in zip(LOW_RATES, counts, strict=True))
    least = usual.bpw([0] * len(usual.matrices)) or 0.0
    assert (low.bpw([0] * len(low.matrices)) or 9.0) <= 0.5 < 1 < least
    with pytest.raises(RecipeError, match="cannot be reached"):
        reachable_choices(low_job(wide, {"bpw": 0.4}), [Target(bpw=0.4)])


def test_a_size_is_low_that_leaves_trellises_little_room(wide: DenseModel) -> None:
    usual = find_choices(low_job(wide, {"bytes": 10**9}))
    least = usual.size([one.bytes.index(min(one.bytes)) for one in usual.matrices])
    weights = sum(one.shape[0] * one.shape[1] for one in usual.matrices if not one.is_table)
    assert goes_low(low_job(wide, {"bytes": least - 1000}))
    assert goes_low(low_job(wide, {"bytes": least + weights // 33}))
    assert not goes_low(low_job(wide, {"bytes": least + weights // 31}))
    assert not goes_low(low_job(wide, {"kl": 3.0}))
    assert not goes_low(low_job(wide, {"bpw": 1}, options=[[{"method": "rtn", "bits": 1}]]))


def test_matrices_too_small_for_less_than_a_bit_keep_the_usual_options(tmp_path: Path) -> None:
    source = resolve(str(save_tiny("llama", tmp_path / "dense")))
    assert find_choices(low_job(source, {"bpw": 1.2})).matrices == find_choices(low_job(source, {"bpw": 2})).matrices


@pytest.mark.slow
def test_a_target_of_less_than_a_bit_is_kept(wide: DenseModel, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Seven grey geese fly over the mill. " * 90)
    calibration = {"dataset": str(tmp_path / "text.txt"), "samples": 6, "length": 48, "held_out": 2}
    recipe = {"version": 1, "calibration": calibration, "target": {"bpw": 0.9}}
    report = lc.compress(wide.folder, recipe, tmp_path / "out").report
    assert 0.7 < report.bpw <= 0.9
