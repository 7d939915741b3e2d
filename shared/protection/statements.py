"""Short texts that somebody signed: which keys are in force, who is in a federation, what a site asks for.

A statement is one JSON object with the fields that its kind has and no other, `kind` among them, and `signature`:
Ed25519 over `fedcanvas statement 1`, a zero byte, and the object without its signature as canonical JSON (keys
sorted, no blanks, ASCII). So a statement of one kind can never pass for one of another, and a reader that knows
fewer fields refuses rather than guesses. Formats: docs/protocol.md.
Not here: what a statement means, and whose key may sign it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.errors import TrustError
from shared.protection.keys import SigningKey, VerifyKey, from_base64, to_base64

DOMAIN = b"fedcanvas statement 1\0"
MOST_BYTES = 2**20  # of a statement whose kind needs no more


def sign_statement(kind: str, fields: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """The statement, ready to be written as JSON."""
    assert not {"kind", "signature"} & fields.keys()
    body = {"kind": kind, **fields}
    return {**body, "signature": to_base64(key.sign(DOMAIN + canonical(body)))}


def read_statement(
    content: bytes | Mapping[str, Any], kind: str, types: Mapping[str, type], key: VerifyKey | None, *, what: str,
    most_bytes: int = MOST_BYTES,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a statement, without kind and signature.

    Args:
        types: of every field; exact, so that no `bool` is an `int`.
        key: who must have signed. `None`: the statement's own field `signing-key`, which proves that whoever wrote it
            has that key and nothing else.
        what: names it to a person, such as "the request request.json".
    Raises:
        TrustError: no JSON, longer than `most_bytes`, another kind, other fields, or another signature.
    """
    table = _parse(content, what, most_bytes) if isinstance(content, bytes) else dict(content)
    if table.get("kind") != kind:
        raise TrustError(f"{what} is no statement of kind '{kind}'")
    signature = table.pop("signature", None)
    if set(table) != {"kind", *types}:
        missing, more = sorted(set(types) - set(table)), sorted(set(table) - set(types) - {"kind"})
        raise TrustError(
            f"{what} does not have the fields of this release: {', '.join(missing) or 'none'} missing,"
            f" {', '.join(map(repr, more)) or 'none'} unknown",
            hint="both sides need the same release",
        )
    for name, wanted in types.items():
        if type(table[name]) is not wanted:
            raise TrustError(f"{what}: '{name}' is not of type {wanted.__name__}")
    if type(signature) is not str:
        raise TrustError(f"{what} is not signed")
    key = key or VerifyKey.from_text(table["signing-key"])
    key.check(from_base64(signature), DOMAIN + canonical(table), what)
    del table["kind"]
    return table


def canonical(table: Mapping[str, Any]) -> bytes:
    """The one way to write it; equal tables have equal bytes."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _parse(content: bytes, what: str, most_bytes: int) -> dict[str, Any]:
    if len(content) > most_bytes:
        raise TrustError(f"{what} is longer than {most_bytes} bytes")
    try:
        # A name that stands twice could mean one thing to who signed and another to who reads.
        table = json.loads(content, object_pairs_hook=each_once, parse_constant=_refuse, parse_float=_refuse)
    except (ValueError, RecursionError) as error:
        raise TrustError(f"{what} is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise TrustError(f"{what} is no JSON object")
    return table


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: `ValueError` where a name stands twice in an object."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not allowed here")
