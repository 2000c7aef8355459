"""`python -m llmcompress`, which launchers need: `accelerate launch -m llmcompress eval ...`."""

from llmcompress.cli import main

if __name__ == "__main__":
    main()
