"""Lines of a service's log: one for each request, without what was asked for.

A prompt may be about a person; it stands in a line only where the operator asked for that. What a client chose (its
path, its address behind a proxy) appears only where it is one of ours, or without control characters.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Literal

from shared.cli import printable

LOG = logging.getLogger("fedcanvas.serve")


class Lines(logging.Formatter):
    """A time, a text, and the fields of `extra={"fields": ...}`."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = getattr(record, "fields", {})
        text = printable(record.getMessage().strip())
        if self._form == "json":
            about = {"time": when, "level": record.levelname.lower(), "text": text, **fields}
            return json.dumps(about, ensure_ascii=False)
        said = " ".join([text, *(f"{name}={printable(str(value))}" for name, value in fields.items())])
        return f"{when} {said}"


def log_to_stderr(form: Literal["text", "json"]) -> None:
    """The service's lines, and the server's own complaints, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(form))
    for logger, level in ((LOG, logging.INFO), (logging.getLogger("uvicorn"), logging.ERROR)):
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def where(error: BaseException) -> str:
    """The kind of an error and the lines it went through, in one line: its message could repeat a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-8:]))])
