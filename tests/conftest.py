"""Settings of all tests."""

import os

os.environ.setdefault("LLMCOMPRESS_FAST", "exact")  # kernels everywhere, without rounded inputs
