"""All messages and their only codec: down goes an instruction or a trained model, up comes a reply or a code.

    instruction: record "instruction": version, run-id, kind, server-round, attempt, config-json,
                 config-digest, prompts, heads;
                 arrays "weights": values (<f4), and with local steps "fakes": images (|u1), prompt-indices (<i4)
    offer:       record "model": version, run-id; arrays "files" (|u1), one a file of a released model
    reply:       record "reply": version, run-id, server-round, site-id; arrays "envelope": payload (|u1)
    refusal:     record "refusal": version, site-id, code

An envelope is a site's integers and then 32 bytes, the head of the run in the site's ledger. Between institutions
what goes down also has the record "signature" (version, keys, signature: `shared.protection.channel`), and what comes
up is always a reply whose payload is sealed, with a code inside it where it is none.

Arrays are raw little-endian bytes with their type and shape beside them: nothing is unpickled, no numpy
header is parsed, and an array of objects cannot be written down. Readers refuse another version, unknown
or missing names, other types, and anything over the limits below, with `ProtocolError`.
Not here: whether an instruction is admitted (`client.site`) and how replies are summed (`server.aggregation`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from shared.errors import ProtocolError
from shared.fakes import FakeBank

PROTOCOL_VERSION = 2

MAX_PARAMETERS = 2**26  # entries of one vector, down or up
MAX_FAKES = 2**16
MAX_FAKE_BYTES = 2**29
MAX_PROMPTS = 2**16
MAX_PROMPT_CHARACTERS = 8192
MAX_PROMPT_CHARACTERS_TOGETHER = 2**24
MAX_CONFIG_CHARACTERS = 2**16
MAX_ROUND = 2**20
MAX_SITES = 2**14
MAX_WEIGHTS_BYTES, MAX_CARD_BYTES = 2**29, 2**25  # of a released model's files
# A lattice value beyond this is refused at both ends: MAX_SITES of them add up below 2**62.
LATTICE_LIMIT = 2**48

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")  # run and site ids
DIGEST = re.compile(r"[0-9a-f]{64}")
HEAD_BYTES = 32
NOT_TOLD = "unknown"  # the run id of a refusal by a site that could not read which run it was asked about
RAW = "fedcanvas.raw"  # Flower's `stype`: how to read `data`

Kind = Literal["train", "moments"]
MESSAGE_TYPES: dict[Kind, str] = {"train": "train", "moments": "train.moments"}
OFFER_TYPE = "query"
# A released model (`shared.rundir`), name of a file to the most bytes that it may have.
GENERATOR_FILE = "generator.safetensors"
MODEL_FILES = {
    GENERATOR_FILE: MAX_WEIGHTS_BYTES, "discriminator.safetensors": MAX_WEIGHTS_BYTES,
    "model.json": MAX_CARD_BYTES,
}  # fmt: skip


class RefusalCode(StrEnum):
    """Why a site does not answer. All that depends on its data, or went wrong with it, is `SITE`."""

    MESSAGE = "message"  # malformed, oversize, of another protocol version, or out of place in the run
    CONFIG = "config"  # the settings do not validate, or are not those of the digest
    PLAN = "plan"  # the site's own plan cannot give the privacy that is asked for
    POLICY = "policy"  # the site's policy does not allow these settings, whatever its data are
    APPROVAL = "approval"  # no person at the site has decided about the run yet
    DENIED = "denied"  # a person at the site has denied the run, or ended it
    RELEASE = "release"  # the site's code is mixed from two releases
    SITE = "site"


class Confirmation(StrEnum):
    """What a site says to an offered model, where it does not refuse it; sealed, or not at all."""

    RECEIVED = "received"  # the site has it, whole and on its disk


@dataclass(frozen=True, eq=False)
class RoundInstruction:
    """What every site of a round receives; all of it is public.

    Attributes:
        run_id: ours, stable over restarts of the engine.
        server_round: from 1; 0 is the warm start's moments.
        attempt: from 1; counts how often this round was started.
        config_json: the canonical text of the `RunConfig` that `config_digest` names.
        weights: `(num_parameters,)` float32, the discriminator's, in the order of `flat_parameters`.
        fakes: only with `federation.local-steps` > 1.
        heads: for each site that answered before, the head of the run that its last reply carried. A site whose
            ledger does not know it was set back or copied, and stops.
    """

    run_id: str
    kind: Kind
    server_round: int
    attempt: int
    config_json: str
    config_digest: str
    prompts: tuple[str, ...]
    weights: np.ndarray
    fakes: FakeBank | None = None
    heads: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Names what is asked for, 64 hex digits; the same question asked again (attempt, heads) has the same."""
        table = [self.run_id, self.kind, self.server_round, self.config_digest, list(self.prompts)]
        digest = hashlib.sha256(json.dumps(table).encode())
        digest.update(self.weights.astype("<f4", copy=False).tobytes())
        if self.fakes is not None:
            digest.update(str(self.fakes.images.shape).encode())
            digest.update(self.fakes.images.tobytes())
            digest.update(self.fakes.prompt_indices.astype("<i4", copy=False).tobytes())
        return digest.hexdigest()

    @cached_property
    def prompts_digest(self) -> str:
        return hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class ModelOffer:
    """The released model of a run, for the sites that took part in it.

    Attributes:
        files: exactly those of `MODEL_FILES`.
    """

    run_id: str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class SiteReply:
    """All that leaves a site (PRIVACY rule 15). `envelope`: see `pack_envelope`."""

    run_id: str
    server_round: int
    site_id: str
    envelope: bytes


@dataclass(frozen=True)
class Refusal:
    """`site_id` is empty where the site could not even read its own settings."""

    site_id: str
    code: RefusalCode


def encode_instruction(instruction: RoundInstruction) -> RecordDict:
    table: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "run-id": instruction.run_id,
        "kind": instruction.kind,
        "server-round": instruction.server_round,
        "attempt": instruction.attempt,
        "config-json": instruction.config_json,
        "config-digest": instruction.config_digest,
        "prompts": list(instruction.prompts),
        "heads": [f"{site}={head}" for site, head in sorted(instruction.heads.items())],
    }
    records = RecordDict(
        {
            "instruction": ConfigRecord(table),
            "weights": ArrayRecord({"values": _pack(instruction.weights, "<f4")}),
        }
    )
    if instruction.fakes is not None:
        arrays = {
            "images": _pack(instruction.fakes.images, "|u1"),
            "prompt-indices": _pack(instruction.fakes.prompt_indices, "<i4"),
        }
        records["fakes"] = ArrayRecord(arrays)
    return records


def decode_instruction(records: RecordDict) -> RoundInstruction:
    """The instruction in `records`; `ProtocolError` when it is anything else."""
    _check_names(records, {"instruction", "weights"}, optional={"fakes"})
    table = _read_table(records, "instruction", {
        "version": int, "run-id": str, "kind": str, "server-round": int, "attempt": int, "config-json": str,
        "config-digest": str, "prompts": list, "heads": list,
    })  # fmt: skip
    if table["kind"] not in MESSAGE_TYPES:
        raise ProtocolError("the instruction is of an unknown kind")
    _check_name(table["run-id"], "run id")
    _check_range(table["server-round"], 0, MAX_ROUND, "server round")
    _check_range(table["attempt"], 1, MAX_ROUND, "attempt")
    _check_range(len(table["config-json"]), 2, MAX_CONFIG_CHARACTERS, "length of the config")
    if not DIGEST.fullmatch(table["config-digest"]):
        raise ProtocolError("the config digest is not 64 hex digits")
    _check_range(len(table["prompts"]), 1, MAX_PROMPTS, "number of prompts")
    for prompt in table["prompts"]:
        if type(prompt) is not str:
            raise ProtocolError("a prompt is not a text")
        _check_range(len(prompt), 1, MAX_PROMPT_CHARACTERS, "length of a prompt")
    _check_range(sum(map(len, table["prompts"])), 1, MAX_PROMPT_CHARACTERS_TOGETHER, "length of all prompts")
    (weights,) = _read_arrays(records, "weights", {"values": ("<f4", 1, 4 * MAX_PARAMETERS)})
    if not np.isfinite(weights).all():
        raise ProtocolError("the weights are not finite")
    return RoundInstruction(
        run_id=table["run-id"],
        kind=table["kind"],
        server_round=table["server-round"],
        attempt=table["attempt"],
        config_json=table["config-json"],
        config_digest=table["config-digest"],
        prompts=tuple(table["prompts"]),
        weights=weights,
        fakes=_read_fakes(records, len(table["prompts"])) if "fakes" in records else None,
        heads=_read_heads(table["heads"]),
    )


def encode_offer(offer: ModelOffer) -> RecordDict:
    table: dict[str, Any] = {"version": PROTOCOL_VERSION, "run-id": offer.run_id}
    files = {name: _pack(np.frombuffer(content, np.uint8), "|u1") for name, content in offer.files.items()}
    return RecordDict({"model": ConfigRecord(table), "files": ArrayRecord(files)})


def decode_offer(records: RecordDict) -> ModelOffer:
    """The offer in `records`; `ProtocolError` when it is anything else. What is in the files is not looked at."""
    _check_names(records, {"model", "files"})
    table = _read_table(records, "model", {"version": int, "run-id": str})
    _check_name(table["run-id"], "run id")
    files = _read_arrays(records, "files", {name: ("|u1", 1, most) for name, most in MODEL_FILES.items()})
    return ModelOffer(table["run-id"], {name: file.tobytes() for name, file in zip(MODEL_FILES, files, strict=True)})


def records_digest(records: RecordDict) -> bytes:
    """SHA-256 of everything in `records` but the record "signature", whatever it means: what an aggregator signs.

    Over the names in ascending order, each with its values as canonical JSON or, of arrays, type, shape and bytes; all
    with their length before them, so that no two contents have one text. `ProtocolError` where it holds anything that
    has no such form.
    """
    digest = hashlib.sha256()
    for name in sorted(records.keys() - {"signature"}):
        record = records[name]
        if type(record) is ConfigRecord:
            values = dict(record.items())
            if not all(_is_plain(value) for value in values.values()):
                raise ProtocolError("a record holds a value that cannot be signed")
            _add(digest, b"config", name.encode(), json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
        elif type(record) is ArrayRecord:
            _add(digest, b"arrays", name.encode(), str(len(record)).encode())
            for key in sorted(record.keys()):
                array = record[key]
                about = json.dumps([array.dtype, list(array.shape), array.stype]).encode()
                _add(digest, key.encode(), about, array.data)
        else:
            raise ProtocolError("a message holds a record that cannot be signed")
    return digest.digest()


def attach_signature(records: RecordDict, *, keys: bytes, signature: bytes) -> None:
    """Adds the record "signature": the statement of the aggregator's keys, and its signature over `records_digest`."""
    table: dict[str, Any] = {"version": PROTOCOL_VERSION, "keys": keys.decode(), "signature": signature}
    records["signature"] = ConfigRecord(table)


def detach_signature(records: RecordDict) -> tuple[bytes, bytes]:
    """(statement of keys, signature); the record is gone then. `ProtocolError` where it is missing or malformed."""
    if "signature" not in records:
        raise ProtocolError("the instruction is not signed")
    table = _read_table(records, "signature", {"version": int, "keys": str, "signature": bytes})
    del records["signature"]
    return table["keys"].encode(), table["signature"]


def encode_reply(reply: SiteReply | Refusal) -> RecordDict:
    if isinstance(reply, Refusal):
        refusal: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "site-id": reply.site_id,
            "code": reply.code.value,
        }
        return RecordDict({"refusal": ConfigRecord(refusal)})
    table: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "run-id": reply.run_id,
        "server-round": reply.server_round,
        "site-id": reply.site_id,
    }
    payload = Array(dtype="|u1", shape=(len(reply.envelope),), stype=RAW, data=reply.envelope)
    return RecordDict({"reply": ConfigRecord(table), "envelope": ArrayRecord({"payload": payload})})


def decode_reply(records: RecordDict) -> SiteReply | Refusal:
    """The reply or refusal in `records`; `ProtocolError` when it is anything else."""
    if "refusal" in records:
        _check_names(records, {"refusal"})
        table = _read_table(records, "refusal", {"version": int, "site-id": str, "code": str})
        if table["site-id"]:
            _check_name(table["site-id"], "site id")
        if table["code"] not in set(RefusalCode):
            raise ProtocolError("the refusal has an unknown code")
        return Refusal(table["site-id"], RefusalCode(table["code"]))
    _check_names(records, {"reply", "envelope"})
    table = _read_table(records, "reply", {"version": int, "run-id": str, "server-round": int, "site-id": str})
    _check_name(table["run-id"], "run id")
    _check_name(table["site-id"], "site id")
    _check_range(table["server-round"], 0, MAX_ROUND, "server round")
    (payload,) = _read_arrays(records, "envelope", {"payload": ("|u1", 1, 8 * MAX_PARAMETERS + HEAD_BYTES)})
    return SiteReply(table["run-id"], table["server-round"], table["site-id"], payload.tobytes())


def pack_lattice(values: np.ndarray) -> bytes:
    """`(n,)` int64 to `8 n` little-endian bytes."""
    return values.astype("<i8", copy=False).tobytes()


def unpack_lattice(envelope: bytes, *, length: int) -> np.ndarray:
    """`(length,)` int64; `ProtocolError` for another length or a value beyond `LATTICE_LIMIT`."""
    if len(envelope) != 8 * length:
        raise ProtocolError(f"an envelope holds {len(envelope)} bytes, the plan says {8 * length}")
    values = np.frombuffer(envelope, dtype="<i8").astype(np.int64, copy=False)
    if length and (values.min() < -LATTICE_LIMIT or values.max() > LATTICE_LIMIT):
        raise ProtocolError("an envelope holds a value beyond the lattice's limit")
    return values


def pack_envelope(values: np.ndarray, head: str) -> bytes:
    """`(n,)` int64 and 64 hex digits to `8 n + 32` bytes."""
    return pack_lattice(values) + bytes.fromhex(head)


def unpack_envelope(envelope: bytes, *, length: int) -> tuple[np.ndarray, str]:
    """`(length,)` int64 and the run's head; `ProtocolError` for another length or a value beyond the limit."""
    if len(envelope) != 8 * length + HEAD_BYTES:
        raise ProtocolError(f"an envelope holds {len(envelope)} bytes, the plan says {8 * length + HEAD_BYTES}")
    return unpack_lattice(envelope[:-HEAD_BYTES], length=length), envelope[-HEAD_BYTES:].hex()


def _is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(type(one) in (str, int, bool) for one in value)
    return type(value) in (str, int, bool)


def _add(digest: Any, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)


def _read_heads(lines: list[Any]) -> dict[str, str]:
    _check_range(len(lines), 0, MAX_SITES, "number of heads")
    heads: dict[str, str] = {}
    for line in lines:
        site, _, head = line.partition("=") if type(line) is str else ("", "", "")
        if not NAME.fullmatch(site) or not DIGEST.fullmatch(head) or site in heads:
            raise ProtocolError("a head is not one site and 64 hex digits")
        heads[site] = head
    return heads


def _read_fakes(records: RecordDict, num_prompts: int) -> FakeBank:
    images, indices = _read_arrays(
        records, "fakes", {"images": ("|u1", 4, MAX_FAKE_BYTES), "prompt-indices": ("<i4", 1, 4 * MAX_FAKES)}
    )
    if len(images) != len(indices) or not len(images):
        raise ProtocolError("the fakes and their prompts do not pair up")
    if indices.min() < 0 or indices.max() >= num_prompts:
        raise ProtocolError("a fake names a prompt that is not in the pool")
    return FakeBank(images=images, prompt_indices=indices.astype(np.int32, copy=False))


def _pack(values: np.ndarray, dtype: str) -> Array:
    data = np.ascontiguousarray(values, dtype=dtype).tobytes()
    return Array(dtype=dtype, shape=tuple(values.shape), stype=RAW, data=data)


def _unpack(array: Array, dtype: str, dimensions: int, max_bytes: int, name: str) -> np.ndarray:
    """A writable copy; the type is the reader's, never the sender's."""
    if array.stype != RAW or array.dtype != dtype:
        raise ProtocolError(f"array '{name}' is not raw {dtype}")
    if len(array.shape) != dimensions or any(side < 0 for side in array.shape):
        raise ProtocolError(f"array '{name}' does not have {dimensions} dimensions")
    _check_range(len(array.data), 0, max_bytes, f"size of array '{name}'")
    if math.prod(array.shape) * np.dtype(dtype).itemsize != len(array.data):
        raise ProtocolError(f"array '{name}' does not fill its shape")
    return np.frombuffer(array.data, dtype=dtype).reshape(array.shape).copy()


def _read_arrays(records: RecordDict, name: str, layout: Mapping[str, tuple[str, int, int]]) -> list[np.ndarray]:
    """The arrays of record `name` in the layout's order: name to (dtype, dimensions, most bytes)."""
    record = records[name]
    if type(record) is not ArrayRecord or set(record.keys()) != set(layout):
        raise ProtocolError(f"record '{name}' does not hold exactly {', '.join(layout)}")
    return [_unpack(record[key], *layout[key], f"{name}.{key}") for key in layout]


def _read_table(records: RecordDict, name: str, types: Mapping[str, type]) -> dict[str, Any]:
    record = records[name]
    if type(record) is not ConfigRecord or not 0 < len(record) <= len(types):
        raise ProtocolError(f"record '{name}' does not hold exactly {', '.join(types)}")
    version = record.get("version")
    if type(version) is not int or version != PROTOCOL_VERSION:
        shown = version if type(version) is int else "no"
        raise ProtocolError(
            f"a message of protocol version {shown}, this release speaks {PROTOCOL_VERSION}",
            hint="install the same release on both sides",
        )
    if set(record.keys()) != set(types):
        raise ProtocolError(f"record '{name}' does not hold exactly {', '.join(types)}")
    for key, kind in types.items():
        if type(record[key]) is not kind:  # exact: a bool is no int here
            raise ProtocolError(f"'{key}' of record '{name}' is not of type {kind.__name__}")
    return dict(record.items())


def _check_names(records: RecordDict, required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    names = set(records.keys())
    if not required <= names or names - required - optional:
        raise ProtocolError(f"a message does not hold exactly the records {', '.join(sorted(required))}")


def _check_name(text: str, what: str) -> None:
    if not NAME.fullmatch(text):
        raise ProtocolError(f"the {what} is not 1 to 64 letters, digits, dots, dashes or underscores")


def _check_range(value: int, low: int, high: int, what: str) -> None:
    if not low <= value <= high:
        raise ProtocolError(f"{what} is {value}, allowed is {low} to {high}")
