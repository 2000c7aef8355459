"""A process that renders chat templates: they come with models, and may loop for ever or fill the memory.

`chat.py` starts it as a script. It reads one request a line and answers one line, in transformers' sandbox, within a
limit of memory and the time that its parent waits.
"""

import json
import signal
import sys
from typing import Any

import psutil

MEMORY = 4 << 30  # bytes of addresses, beside those of libraries, which torch for a GPU has several GB of
ALONE = 60  # seconds for one chat, after which the system ends this process if its parent is gone


def main() -> None:
    """Answer until the input ends: `{"text": ...}`, or `{"refusal": ...}` for an error of the template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(ALONE)
        _say(_answer(render_jinja_template, request))
        signal.alarm(0)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()


def _answer(render: Any, request: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        [text], _ = render([request["messages"]], chat_template=request["template"], **request["settings"])
    except MemoryError:
        return {"refusal": f"it needs more than {MEMORY >> 30} GB of memory"}
    except RecursionError:
        return {"refusal": "it calls itself without end"}
    except (TemplateError, SyntaxError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError) as error:
        return {"refusal": str(error)[:500] or type(error).__name__}
    if len(text) > request["most"]:
        return {"refusal": f"it writes {len(text):,} characters, and {request['most']:,} is the most"}
    return {"text": text}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MEMORY
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    main()
