"""The log of every process of a run, server or site: one event a line, in logfmt.

    event=excluded round=3 client=oslo reason="no reply within 600 s"

A person can read it, and a program can, too.
"""

import json
import logging
import re
import sys

log = logging.getLogger("bouquet")


def logfmt(event: str, **fields: object) -> str:
    """One event as key=value pairs; what is not a plain word is quoted, control characters too.

    >>> logfmt("excluded", round=3, client="oslo", reason="no reply")
    'event=excluded round=3 client=oslo reason="no reply"'
    """
    return " ".join(f"{name}={_value(value)}" for name, value in {"event": event, **fields}.items())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if re.fullmatch(r"[\w./:@+-]+", text) else json.dumps(text)


def log_to_stdout() -> None:
    """Show the log, unless whoever runs this process has said where it goes."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
