"""Settings of all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("LLMCOMPRESS_FAST", "exact")  # kernels everywhere, without rounded inputs


@pytest.fixture(scope="session", autouse=True)
def brief_trials() -> Iterator[None]:
    """Estimates of time: products have a known speed, steps are tried once, and nothing of it is kept on this machine.

    `tests/compression/test_step_timing.py` has the trials as they are.
    """
    from llmcompress.compression import step_timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timing, "time_products", lambda dtype: 1e10)
        patch.setattr(step_timing, "BRIEF", 0.0)
        patch.setattr(step_timing, "_write", lambda store, what, values: None)
        yield
