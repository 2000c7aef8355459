"""Commands, their options, and how they speak and end.

In: words of a command line. Out: text or JSON, and an exit code. Open `app.py` first.
"""


def main() -> None:
    """Run the command `llmcompress`; see `llmcompress.cli.app`."""
    import signal

    from llmcompress.cli.stopping import stop_early

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it otherwise
        signal.signal(signal.SIGINT, stop_early)
    from llmcompress.cli.app import main as run

    run()
