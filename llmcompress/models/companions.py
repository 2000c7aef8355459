"""The files beside a model's weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmcompress.models import file_names
from llmcompress.models.checkpoint import MANIFEST
from llmcompress.models.integrity import INDEX


def copy_companions(folder: Path, target: Path) -> None:
    """Copy the tokenizer, chat template, generation config and licence of the model in `folder` to `target`."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix in COMPANIONS or path.name.startswith("LICENSE")) and path.name not in OURS:
            shutil.copyfile(path, target / path.name)


COMPANIONS = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
OURS = {"config.json", INDEX, MANIFEST, file_names.REPORT, file_names.SCORES, file_names.GENERATIONS}
