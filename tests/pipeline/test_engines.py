"""`--for ENGINE`: one run from a model to what the engine loads; what it cannot hold is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.benchmark.protocol import SpeedProtocol
from llmcompress.cli.app import app
from llmcompress.errors import DiskError, GateError, InputError, RecipeError
from llmcompress.formats.export import check_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.files.checkpoint import check_manifest
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.reading import read_json
from llmcompress.pipeline import engines
from llmcompress.pipeline.engines import ENGINES, compress_for, plan_for
from llmcompress.pipeline.frontier import frontier
from llmcompress.pipeline.frontier_inputs import budgets
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import read_recipe
from llmcompress.reporting import report as reports
from tests.formats.gguf_files import GRID, tiny_llama
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny
from tests.zoo import save_zoo

SHORT = ["calibration.samples=4", "calibration.length=32", "calibration.held_out=1"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every engine here runs: sides that 128 divides, a tokenizer that llama.cpp loads."""
    return tiny_llama(tmp_path_factory.mktemp("dense"), dtype=torch.bfloat16, max_position_embeddings=128, **SIZES)


def recipe(engine: str, *settings: str) -> Recipe:
    return read_recipe(ENGINES[engine].recipe, [*SHORT, *settings])


@pytest.mark.parametrize("engine", ["mlx", *tiered_nightly(["vllm", "llama.cpp", "exllamav3"], "exllamav3".__ne__)])
def test_the_output_is_what_compress_and_export_write(engine: str, dense: Path, tmp_path: Path) -> None:
    result = compress_for(engine, dense, recipe(engine), tmp_path / "out")
    lc.compress(dense, recipe(engine), tmp_path / "ours")
    done = lc.export(tmp_path / "ours", tmp_path / "theirs", ENGINES[engine].form)
    written, expected = ({path.name for path in (tmp_path / name).iterdir()} for name in ("out", "theirs"))
    assert written == expected | {"report.json", "recipe.yaml"}
    for name in expected - {"manifest.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert check_manifest(tmp_path / "out")
    report = reports.read(tmp_path / "out")
    assert report == result.report and report.bytes == done.bytes_after and result.folder == tmp_path / "out"
    assert report.model_bpw == done.bytes_after * 8 / report.parameters and set(done.changed) <= set(report.warnings)
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("settings", tiered([(), ("target.bpw=8",)], lambda settings: not settings))
def test_a_run_that_ends_in_the_export_goes_on_from_there(
    settings: tuple[str, ...], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "default" if settings else "vllm-4"
    rules = ["rules=[]", "embeddings=[]", "head=null", "table=null"] if settings else []
    if settings:  # a text of the user's own, whose folder no recipe names that is written
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "own.txt").write_text("Seven grey geese fly over the mill. " * 60)
        rules.append(f"calibration.dataset={tmp_path / 'texts' / 'own.txt'}")
    asked = read_recipe(text, [*SHORT, *rules, *settings])

    def full(*_: Any, **__: Any) -> None:
        raise DiskError("No space left")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "export", full)
        with pytest.raises(DiskError, match="No space left") as error:
            compress_for("vllm", dense, asked, tmp_path / "out")
        assert error.value.__notes__[0].startswith(f"the compressed model is kept in {tmp_path / 'out.checkpoint'}")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.checkpoint").is_dir()
    changes = {"target.bpw=7": "another target", "damage=noise": "other rules or options", "seed=1": "another recipe"}
    for change, sentence in changes.items() if settings else [("", "another recipe")]:
        other = read_recipe(text, [*SHORT, *rules, *settings, change]) if settings else recipe("mlx")
        with pytest.raises(DiskError, match=sentence):
            compress_for("mlx" if not settings else "vllm", dense, other, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(engines, "compress", lambda *_, **__: pytest.fail("compressed again"))
        compress_for("vllm", dense, asked, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list(tmp_path.glob("out.*"))


@pytest.mark.slow
def test_a_run_can_start_over(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lc.compress(dense, "data-free", tmp_path / "out.checkpoint")
    compress_for("vllm", dense, recipe("vllm"), tmp_path / "out", resume=False)
    assert reports.read(tmp_path / "out").recipe == "vllm-4" and not list(tmp_path.glob("out.*"))


def free_bytes(count: int, patch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=count)
    patch.setattr(shutil, "disk_usage", lambda path: usage)


def test_checkpoint_and_export_fit_on_the_disk_together(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = lc.plan(dense, recipe("mlx")).bytes, plan_for("mlx", dense, recipe("mlx")).bytes
    with monkeypatch.context() as patch, pytest.raises(DiskError, match=r"out needs .* and its disk has"):
        patch.setattr(engines, "compress", lambda *_, **__: pytest.fail("compressed"))
        free_bytes(ours + theirs - 1, patch)
        compress_for("mlx", dense, recipe("mlx"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    lc.compress(dense, recipe("mlx"), tmp_path / "out.checkpoint")  # as an earlier run leaves it
    free_bytes(theirs * 3 // 2, monkeypatch)
    assert compress_for("mlx", dense, recipe("mlx"), tmp_path / "out").folder.is_dir()


@pytest.mark.parametrize("to", ["compressed-tensors", "gguf", "mlx"])
def test_exports_need_no_disk_for_matrices_of_floats(
    to: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = lc.compress(dense, {"version": 1, "rules": [{"match": "*", "steps": [GRID]}]}, tmp_path / "ours").folder
    size = CompressedCheckpoint(ours).bytes
    free_bytes(size // 2, monkeypatch)
    with pytest.raises(DiskError, match=r"out needs .* and its disk has"):
        lc.export(ours, tmp_path / "out", to)
    free_bytes(size * 3 // 2, monkeypatch)
    assert lc.export(ours, tmp_path / "out", to).bytes_after < size * 3 // 2


def test_folders_of_others_stay(dense: Path, tmp_path: Path) -> None:
    for name, sentence in (
        ("out.export", "not made by llmcompress"),
        ("out.checkpoint", "give a compressed checkpoint"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
        with pytest.raises((DiskError, InputError), match=sentence):
            compress_for("vllm", dense, recipe("vllm"), tmp_path / "out", resume=name != "out.checkpoint")
        assert (tmp_path / name / "precious").is_file()
        (tmp_path / name / "precious").rename(tmp_path / "elsewhere")
        (tmp_path / name).rmdir()


def test_a_missed_gate_leaves_the_engine_its_files(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended in the export misses it once more when it goes on."""

    def full(*_: Any, **__: Any) -> None:
        raise DiskError("No space left")

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="No space left"):
        patch.setattr(engines, "export", full)
        compress_for("vllm", dense, recipe("vllm", "gates.kl=1e-9"), tmp_path / "out")
    with pytest.raises(GateError, match=f"it stays in {tmp_path / 'out'} for"):
        compress_for("vllm", dense, recipe("vllm", "gates.kl=1e-9"), tmp_path / "out")
    gates = reports.read(tmp_path / "out").gates
    assert gates is not None and gates.held is False and not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    ("engine", "name", "sentence"),
    [
        ("vllm", "default", "vllm does not multiply rotate > trellis"),
        ("vllm", "gptq-4-g64", "vllm does not multiply gptq, .*integers of 5 bits, and vLLM reads those of 4 or 8"),
        ("vllm", "mlx-4", "vllm does not multiply"),
        ("mlx", "llama-cpp-4", "mlx does not multiply gguf"),
        ("llama.cpp", "balanced", "llama.cpp does not multiply"),
        ("llama.cpp", "partial-binarization", "options: llama.cpp does not multiply rotate > pb_llm"),
        ("exllamav3", "partial-binarization", "options: exllamav3 does not multiply rotate > pb_llm"),
        ("transformers", "exl3", "transformers does not multiply exl3, .*no kernel for cpu, and would be decoded"),
        ("transformers-cuda", "mxfp4", "transformers-cuda does not multiply mxfp.*no kernel for cuda"),
        ("exllamav3", "vllm-4", "exllamav3 does not multiply .*no tiles"),
    ],
)
def test_forms_that_an_engine_lacks_are_refused_before_any_work(
    engine: str, name: str, sentence: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        plan_for(engine, dense, read_recipe(name))
    with pytest.raises(RecipeError, match=sentence):
        compress_for(engine, dense, read_recipe(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


ROUNDED = "rules=[{match: '*', steps: [{method: gptq, %s}], inputs: {format: %s}}]"


@pytest.mark.parametrize(
    ("engine", "steps", "inputs", "sentence"),
    [
        (
            "llama.cpp",
            "bits: 4, group_size: 32",
            "int8",
            "llama.cpp has no int8 inputs with a scale a token; drop inputs",
        ),
        ("vllm", "format: fp8", "int8", "vLLM multiplies no int8 inputs with a scale a token by e4m3 floats row"),
        (
            "vllm",
            "bits: 8, narrow_range: true",
            "fp8",
            "vLLM multiplies no fp8 inputs with a scale a token by 7.99-bit",
        ),
        ("vllm", "bits: 4, narrow_range: true, group_size: 64", "fp8", "vLLM multiplies no fp8 inputs"),
        ("vllm", "format: mxfp4", "nvfp4", "vLLM multiplies no nvfp4 inputs by"),
    ],
)
def test_inputs_that_an_engine_does_not_multiply_are_refused(
    engine: str, steps: str, inputs: str, sentence: str, dense: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        plan_for(engine, dense, recipe("vllm", ROUNDED % (steps, inputs)))


@pytest.mark.parametrize(
    ("steps", "inputs"),
    [
        ("format: fp8_tensor", "fp8, scale: tensor"),
        ("bits: 8, narrow_range: true", "int8, scale: tensor"),
        ("bits: 4, narrow_range: true, group_size: 32", "int8"),
        ("bits: 4, narrow_range: true, group_size: 128", "fp8"),
        ("format: nvfp4", "nvfp4"),
        ("format: mxfp8", "mxfp8"),
    ],
)
def test_inputs_that_vllm_multiplies_are_planned(steps: str, inputs: str, dense: Path) -> None:
    planned = plan_for("vllm", dense, recipe("vllm", ROUNDED % (steps, inputs)))
    assert all(f"{inputs.split(',')[0]} inputs" in row.description for row in planned.layers)


@pytest.mark.parametrize("name", tiered(["vllm-fp8", "vllm-int8"], "vllm-int8".__eq__))
def test_recipes_with_inputs_of_few_bits(name: str, dense: Path, tmp_path: Path) -> None:
    result = compress_for("vllm", dense, read_recipe(name, SHORT), tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["input_activations"]["strategy"] for group in groups.values()] == ["token"]
    assert all(name.removeprefix("vllm-") in row.stored for row in result.report.layers)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        (
            "[{match: '*.v_proj', steps: [{method: rtn, bits: 8, narrow_range: true}]}, {match: '*', steps: "
            "[{method: rtn, bits: 4, narrow_range: true, group_size: 32}]}]",
            r"vLLM multiplies .*q_proj, .*k_proj, .*v_proj as one matrix, and .*q_proj has .* and .*v_proj has",
        ),
        (
            "[{match: '*.gate_proj', steps: []}, {match: '*', steps: [{method: rtn, bits: 8, narrow_range: true}]}]",
            "as one matrix, and .*gate_proj has no type and .*up_proj has",
        ),
    ],
)
def test_vllm_gets_one_form_for_what_it_stacks(rules: str, sentence: str, dense: Path, tmp_path: Path) -> None:
    asked = recipe("vllm", f"rules={rules}")
    with pytest.raises(RecipeError, match=sentence):
        plan_for("vllm", dense, asked)
    ours = lc.compress(dense, asked, tmp_path / "ours").folder
    done = lc.export(ours, tmp_path / "out", "compressed-tensors", allow_dense=True)
    assert done.changed[-1].startswith("vLLM will not load this: it multiplies ")


@pytest.mark.parametrize(
    ("engine", "settings", "sentence"),
    [
        ("llama.cpp", ["reconstruct={}"], r"Q._K of .* does not hold scales that learn; leave reconstruct: \(--tune\)"),
        ("llama.cpp", ["rules=[]", "target={bpw: 5}", "reconstruct={}"], "does not hold scales that learn"),
        (
            "vllm",
            ["distill={adapt: {rank: 4}, rates: {factors: 1e-3}, data: {length: 32}}"],
            "adapt adds low-rank terms, which compressed-",
        ),
    ],
)
def test_learning_that_no_file_holds_is_refused(
    engine: str, settings: list[str], sentence: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        compress_for(engine, dense, recipe(engine, *settings), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_types_whose_scales_are_free_may_learn(dense: Path, tmp_path: Path) -> None:
    rules = "rules=[{match: '*', steps: [{method: gguf, type: Q4_0}]}]"
    assert plan_for("llama.cpp", dense, recipe("llama.cpp", rules, "reconstruct={}")).seconds
    wide = tiny_llama(tmp_path / "wide", **SIZES | {"hidden_size": 256}, tie_word_embeddings=False)
    table = "embeddings=[{method: gguf, type: Q6_K}]"  # which does not learn
    assert plan_for("llama.cpp", wide, recipe("llama.cpp", rules, table, "distill={data: {length: 32}}")).bytes


def test_blocks_of_their_own_widths_go_to_no_other_engine(dense: Path, tmp_path: Path) -> None:
    lc.narrow(dense, tmp_path / "slim", neurons=0.75, per_block=True, by="random")
    with pytest.raises(InputError, match="widths of their own, which compressed-tensors has no place for"):
        plan_for("vllm", tmp_path / "slim", recipe("vllm"))


def test_vllm_gets_heads_as_wide_as_it_takes_them_to_be(tmp_path: Path) -> None:
    """For Qwen2 it does not read the `head_dim` of fewer heads; transformers does."""
    for family in ("qwen2", "qwen3"):
        source = save_tiny(family, tmp_path / family, **SIZES | {"num_key_value_heads": 2})
        assert plan_for("vllm", source, recipe("vllm")).bytes
        lc.narrow(source, tmp_path / f"{family}-slim", kv_heads=1, by="random")
    assert plan_for("vllm", tmp_path / "qwen3-slim", recipe("vllm")).bytes
    with pytest.raises(InputError, match="vLLM does not load .*: it takes heads of qwen2 to fill the width, and there"):
        compress_for("vllm", tmp_path / "qwen2-slim", recipe("vllm"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))
    ours = lc.compress(tmp_path / "qwen2-slim", one_matrix({"method": "rtn", "narrow_range": True}), tmp_path / "ours")
    done = lc.export(ours.folder, tmp_path / "theirs", "compressed-tensors")
    assert done.changed == (
        "vLLM will not load this: it takes heads of qwen2 to fill the width, and there are 2 heads of 32 numbers, not "
        "of 128 in all",
    )


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("bloom", "it reshapes all that is stored of query_key_value"),
        ("falcon_h1", "it looks up the forms of matrices by names"),
        ("mamba", "its Mamba multiplies dense matrices alone"),
    ],
)
def test_models_that_vllms_loaders_change_are_refused(family: str, sentence: str, tmp_path: Path) -> None:
    source = save_zoo(family, tmp_path / "dense")
    with pytest.raises(InputError, match=f"vLLM does not load .*: {sentence}.*; leave the engine out"):
        check_model(source, read_json(source / "config.json"), "compressed-tensors")


def test_a_sweep_for_an_engine_needs_a_model_that_it_runs(tmp_path: Path) -> None:
    place = save_tiny("gpt_neo", tmp_path / "dense")
    asked = read_recipe(
        "default", [*SHORT, "rules=[]", "embeddings=[]", "head=null", "table=null", "target={bpw: 5, engine: mlx}"]
    )
    with pytest.raises(InputError, match="is a gpt_neo model, of which nobody here knows what MLX reads"):
        frontier(place, [asked], budgets("5", None), tmp_path / "out")


def test_tables_are_refused_where_an_engine_has_none(dense: Path) -> None:
    table = "embeddings=[{method: gptq, bits: 4, group_size: 64, narrow_range: true}]"
    with pytest.raises(RecipeError, match="vllm has no compressed model.embed_tokens; leave it as it is"):
        plan_for("vllm", dense, recipe("vllm", table))
    with pytest.raises(RecipeError, match="mlx does not read svd"):
        plan_for("mlx", dense, recipe("mlx", "embeddings=[{method: svd, rank: 4}]"))


@pytest.mark.parametrize(
    ("engine", "step", "way"),
    [
        ("vllm", {"method": "rtn", "bits": 4, "narrow_range": True, "group_size": 64}, "vllm reads tables as they are"),
        ("exllamav3", {"method": "exl3"}, "exllamav3 reads tables as they are"),
        ("mlx", {"method": "rtn"}, "steps that mlx reads compress them"),
    ],
)
def test_what_is_said_of_dense_tables_holds_for_the_engine(
    engine: str, step: dict[str, Any], way: str, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "dense", **SIZES, num_hidden_layers=1)
    wanted = read_recipe({"version": 1, "rules": [{"match": "*", "steps": [step]}]})
    [line] = [note for note in plan_for(engine, source, wanted).warnings if "MB stay dense" in note]
    assert line.endswith(f"in model.embed_tokens, lm_head; {way}") and "--set" not in line
    if engine == "vllm":
        report = compress_for(engine, source, wanted, tmp_path / "out").report
        assert [note for note in report.warnings if "MB stay dense" in note] == [line]


def test_a_package_that_is_missing_is_named_before_any_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.formats.export.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="compressed-tensors is the package that reads what this writes, and is miss"):
        compress_for("vllm", dense, recipe("vllm"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_an_engine_does_not_run_are_refused_before_any_work(tmp_path: Path) -> None:
    bytewise = save_tiny("llama", tmp_path / "bytewise", **SIZES)
    with pytest.raises(InputError, match="merges nothing, which llama.cpp does not load"):
        plan_for("llama.cpp", bytewise, recipe("llama.cpp"))
    other = save_tiny("gpt_neo", tmp_path / "other", hidden_size=128, num_heads=4)
    with pytest.raises(InputError, match="is a gpt_neo model, of which nobody here knows what MLX reads"):
        plan_for("mlx", other, recipe("mlx"))


@pytest.mark.slow
def test_the_command_takes_an_engine(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    short = [word for setting in SHORT for word in ("--set", setting)]
    planned = CliRunner().invoke(app, ["plan", str(dense), "--for", "llama.cpp", "--json"])
    assert json.loads(planned.stdout)["recipe"] == "llama-cpp-4"
    done = CliRunner().invoke(app, ["compress", str(dense), "--for", "llama.cpp", "-o", "small", *short])
    assert done.exit_code == 0 and f"next    llmcompress eval small --against {dense}" in done.stdout
    assert locate("small").folder.parent == tmp_path / "cache", "the file is read as the engine has it"
    scored = CliRunner().invoke(app, ["eval", "small", "--against", str(dense), "--windows", "1", "--length", "32"])
    assert scored.exit_code == 0, scored.output
    done = CliRunner().invoke(app, ["compress", str(dense), "--for", "exllamav3", "-o", "tiles", *short])
    assert done.exit_code == 0 and f"next    llmcompress eval tiles --against {dense}" in done.stdout
    scored = CliRunner().invoke(app, ["compare", str(dense), "tiles", "small", "--windows", "1", "--length", "32"])
    assert scored.exit_code == 0, scored.output


def test_the_command_refuses_other_engines(dense: Path, tmp_path: Path) -> None:
    for words, sentence in (
        (["--for", "vlm"], "there is no engine 'vlm'; did you mean vllm?"),
        (["--for", "exllamav3", "--bpw", "1"], "1 bpw cannot be reached, 1.2"),
        (["--for", "mlx", "--sparsity", "0.5"], "mlx has no form for a share of zeros"),
        (["default", "--for", "tgi"], "choose one of vllm, llama.cpp, mlx, exllamav3, transformers"),
    ):
        refused = CliRunner().invoke(app, ["compress", str(dense), *words, "-o", str(tmp_path / "out")])
        assert refused.exit_code == 2 and sentence in refused.stderr, refused.stderr


def one_matrix(step: dict[str, Any]) -> Recipe:
    return read_recipe({"version": 1, "rules": [{"match": "*.0.*.o_proj", "steps": [step]}]})


def test_a_folder_for_another_engine_is_one_sentence(dense: Path, tmp_path: Path) -> None:
    """It is a model to score and to compress, but no checkpoint to export, and its speed is that of its engine."""
    for engine, name, step in (
        ("mlx", "mlx", {"method": "rtn"}),
        ("exllamav3", "exl3", {"method": "exl3"}),
        ("vllm", "compressed-tensors", {"method": "rtn", "bits": 4, "group_size": 32, "narrow_range": True}),
    ):
        done = compress_for(engine, dense, one_matrix(step), tmp_path / engine)
        with pytest.raises(InputError, match=f"holds a model stored by {name}; give the folder that compress wrote"):
            lc.export(done.folder, tmp_path / "other", "gguf")
        with pytest.raises(InputError, match=f"stored by {name}, whose codes transformers does not multiply on a proc"):
            lc.bench([done.folder], SpeedProtocol((1,)))
        planned = plan_for("vllm", done.folder, recipe("vllm"))
        assert any(f"of {name}: what rounds" in note.lower() for note in planned.warnings)


def test_transformers_gets_our_own_files(dense: Path, tmp_path: Path) -> None:
    wanted = one_matrix({"method": "rtn"})
    ours = compress_for("transformers", dense, wanted, tmp_path / "ours")
    assert plan_for("transformers-cuda", dense, wanted).layers == plan_for("transformers", dense, wanted).layers
    assert check_manifest(ours.folder) and ours.report == reports.read(ours.folder)
    with pytest.raises(RecipeError, match="transformers-cuda does not multiply mxfp"):
        compress_for("transformers-cuda", dense, one_matrix({"method": "mxfp"}), tmp_path / "other")
