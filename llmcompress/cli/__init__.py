"""The command line: commands, their options, and how they speak and end."""


def main() -> None:
    """Run the command `llmcompress`; see `llmcompress.cli.app`."""
    from llmcompress.cli.app import main as run

    run()
