"""What a client did wrong, or what the service cannot do now, in the shape of OpenAI's API.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}}

A message never repeats what the client sent: it may be a prompt, which belongs into no log, or no text at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import FedCanvasError

_CODES = {400: "bad_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed"}
_KINDS = {
    "extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter", "json_invalid": "invalid_json",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")
_SAID = {
    "unknown_parameter": "this API knows no such field", "missing_required_parameter": "is missing",
}  # fmt: skip


class ApiError(Exception):
    """An answer that is no success.

    Args:
        param: the field of the request that it is about.
        retry_after: whole seconds after which it may go better.
        close: whether the connection ends with it, for a request that was not read to its end.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after: int | None = None, headers: Mapping[str, str] | None = None, close: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status) or ("server_error" if status >= 500 else "invalid_value")
        self.headers = {"content-type": "application/json", **(headers or {})}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if close:
            self.headers["connection"] = "close"

    @property
    def kind(self) -> str:
        if self.status >= 500:
            return "server_error"
        return "requests" if self.status == 429 else "invalid_request_error"

    def body(self) -> bytes:
        about = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": about}).encode()


def of_ours(error: FedCanvasError, *, param: str | None = None) -> ApiError:
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return ApiError(400, message, code="invalid_value", param=param)


def of_validation(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's complaints about a request; the body or the query stands first in its place."""
    kind, place = str(found[0]["type"]), [str(part) for part in found[0]["loc"]]
    code = _KINDS.get(kind, "invalid_value")
    if code == "invalid_json":
        return ApiError(400, "the body is not JSON", code=code)
    if len(place) < 2:
        return ApiError(400, "the body is not a JSON object sent as application/json", code=code)
    named = ".".join(place[1:])
    if code == "unknown_parameter" and not _WORD.fullmatch(named):
        named = ""  # the client's own text: it is repeated only where it is a word
    said = str(found[0]["msg"])
    said = _SAID.get(code, said[:1].lower() + said[1:])
    return ApiError(400, f"{named}: {said}" if named else said, code=code, param=named or None)
