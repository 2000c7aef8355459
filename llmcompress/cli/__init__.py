"""The commands of `llmcompress`: their options, what they print, and how they end.

In: words of a command line. Out: text or JSON, and an exit code. Open `app.py` first.
"""


def main() -> None:
    """Run the program `llmcompress`. Ctrl-C ends it in one sentence from its first import on."""
    import signal

    from llmcompress.cli.process import stop_early

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody else handles it
        signal.signal(signal.SIGINT, stop_early)
    from llmcompress.cli.app import main as run

    run()
