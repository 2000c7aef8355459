"""The public names: shown by `dir` and `help`, documented, and those that are packages too can be called."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys

import pytest

import llmcompress as lc
from llmcompress.runtime.callable_package import CallablePackage

PACKAGES = [name for name in lc.__all__ if inspect.ismodule(getattr(lc, name))]


def test_names_are_listed_and_nothing_is_loaded_for_it() -> None:
    program = (
        "import sys, llmcompress as lc\n"
        "assert set(lc.__all__) <= set(dir(lc)) and 'import_module' not in dir(lc)\n"
        "import llmcompress.distill, llmcompress.export\n"
        "assert lc.distill is sys.modules['llmcompress.distill'] and callable(lc.export)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_shows_every_name() -> None:
    shown = pydoc.plain(pydoc.render_doc(lc))
    assert not [name for name in lc.__all__ if name not in shown]
    functions = [name for name in lc.__all__ if not inspect.isclass(getattr(lc, name))]
    assert not [name for name in functions if f"`{name}`" not in (lc.__doc__ or "")], "say them in the docstring"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["distill, export", "export, distill"])
def test_a_name_is_one_object_before_and_after_it_is_used(order: str) -> None:
    first, second = order.split(", ")
    program = (
        f"import llmcompress as lc; before = lc.{first}\n"
        f"import llmcompress.{second}\n"
        f"assert before is lc.{first} and callable(lc.{second}) and lc.{second} is lc.{second}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_answers_for_its_function(name: str) -> None:
    package = getattr(lc, name)
    assert isinstance(package, CallablePackage)
    text, parameters = inspect.getdoc(package) or "", inspect.signature(package).parameters
    arguments = text.partition("Args:")[2].partition("\n\n")[0]
    assert parameters and not [given for given in parameters if f"\n    {given}: " not in arguments]
    assert "Returns:" in text and "Raises:" in text
    with pytest.raises(TypeError, match=f"{name}\\(\\) missing"):
        package()
    with pytest.raises(lc.LLMCompressError):
        package(*("none" for parameter in parameters.values() if parameter.default is parameter.empty))


def test_there_are_packages_that_are_called() -> None:
    assert PACKAGES == ["distill", "export"]
