"""The process that runs a chat template: a line of JSON with the chat in, a line with its text out.

Started by ``chat.ChatTemplate``. What the template may take is bounded here, by the system, since a template can loop
for hours without writing anything: 10 s of processor time for a chat (the signal ends the process) and 2 GiB.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime, tzinfo
from typing import Any

_SECONDS = 10.0
_MEMORY = 2 << 30  # beside what the libraries map
_LONGEST = 64 << 20  # characters of a rendered chat, as of a line of a trace


class _OneDay(datetime):
    """A day that does not change: templates that write the date must give the same tokens tomorrow."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _OneDay:
        return cls(2025, 1, 1, tzinfo=tz)


def main() -> None:
    """Answer one chat after the other until the input ends."""
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = _OneDay
    _bound_memory()
    setup = json.loads(sys.stdin.buffer.readline())
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        answer = _answer(chat_template_utils.render_jinja_template, setup, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _answer(render: Any, setup: dict[str, Any], line: bytes) -> bytes:
    try:
        (text,), _ = render([json.loads(line)], chat_template=setup["template"], **setup["tokens"])
        if len(text) > _LONGEST:
            raise ValueError("its text is longer than 64 MiB")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return b'{"error": "it takes more than 2 GiB"}'
    except Exception as error:  # noqa: BLE001 - whatever a template raises is an answer
        return json.dumps({"error": str(error) or type(error).__name__}).encode()


def _bound_memory() -> None:
    with contextlib.suppress(OSError, ValueError, IndexError):  # a stricter limit is set already; no Linux
        with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - not a path of ours
            pages = int(statm.read().split()[0])
        limit = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
