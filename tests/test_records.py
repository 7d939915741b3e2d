"""The codec of a round's messages, the gate that builds replies, and the sum over sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from client.gate import Release, SealedStatement, build
from server.aggregation import RoundSum
from shared import records as wire
from shared.errors import ProtocolError
from shared.fakes import FakeBank
from shared.protection.sealed import MAGIC, OVERHEAD
from shared.records import (
    LATTICE_LIMIT,
    MAX_SITES,
    RAW,
    Refusal,
    RefusalCode,
    RoundInstruction,
    SiteReply,
    attach_signature,
    decode_instruction,
    decode_reply,
    detach_signature,
    encode_instruction,
    encode_reply,
    pack_envelope,
    records_digest,
)

HEAD = "0123456789abcdef" * 4


def instruction(**changes: Any) -> RoundInstruction:
    usual = RoundInstruction(
        run_id="0123456789abcdef",
        kind="train",
        server_round=3,
        attempt=1,
        config_json="{}",
        config_digest="0" * 64,
        prompts=("a red circle", "ein blaues Dreieck", "一个红色的圆", "دائرة حمراء"),
        weights=np.linspace(-1, 1, 7, dtype=np.float32),
        heads={"site-0": HEAD, "site-1": HEAD[::-1]},
    )
    return dataclasses.replace(usual, **changes)


REPLY = SiteReply("0123456789abcdef", 3, "site-0", pack_envelope(np.arange(-3, 4, dtype=np.int64), HEAD))


def over_the_wire(records: RecordDict) -> RecordDict:
    """Flower's own wire form: hashed objects, put together on the other side."""
    objects = {name: part.deflate() for name, part in get_all_nested_objects(records).items()}
    arrived = inflate_object_from_contents(records.object_id, objects)
    assert isinstance(arrived, RecordDict)
    return arrived


def test_an_instruction_arrives_as_it_was_sent():
    fakes = FakeBank(
        images=np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3),
        prompt_indices=np.array([3, 0], dtype=np.int32),
    )
    sent = instruction(fakes=fakes)
    arrived = decode_instruction(over_the_wire(encode_instruction(sent)))
    for field in dataclasses.fields(RoundInstruction):
        if field.name not in ("weights", "fakes"):
            assert getattr(arrived, field.name) == getattr(sent, field.name)
    assert arrived.weights.dtype == np.float32
    assert np.array_equal(arrived.weights, sent.weights)
    assert arrived.weights.flags.writeable
    assert arrived.fakes is not None
    assert np.array_equal(arrived.fakes.images, fakes.images)
    assert np.array_equal(arrived.fakes.prompt_indices, fakes.prompt_indices)


@pytest.mark.parametrize(
    "reply", [REPLY, *(Refusal("site-0", code) for code in RefusalCode), Refusal("", RefusalCode.SITE)]
)
def test_a_reply_arrives_as_it_was_sent(reply: SiteReply | Refusal):
    assert decode_reply(over_the_wire(encode_reply(reply))) == reply


def test_a_reply_holds_protocol_run_round_site_and_envelope_and_nothing_else():
    records = encode_reply(REPLY)
    assert set(records) == {"reply", "envelope"}
    assert dict(records["reply"].items()) == {
        "version": 2, "run-id": "0123456789abcdef", "server-round": 3, "site-id": "site-0",
    }  # fmt: skip
    (payload,) = records["envelope"].values()
    assert (payload.dtype, payload.shape, payload.stype) == ("|u1", (7 * 8 + 32,), "fedcanvas.raw")
    # Golden bytes: -3 and 3 as little-endian two's complement.
    assert payload.data[:8] == b"\xfd" + b"\xff" * 7
    assert payload.data[48:56] == b"\x03" + b"\x00" * 7
    assert payload.data[56:].hex() == HEAD


def test_a_refusal_holds_a_code_and_no_text():
    records = encode_reply(Refusal("site-0", RefusalCode.SITE))
    assert {name: dict(record.items()) for name, record in records.items()} == {
        "refusal": {"version": 2, "site-id": "site-0", "code": "site"}
    }
    assert [code.value for code in RefusalCode] == [
        "message", "config", "plan", "policy", "approval", "denied", "release", "site",
    ]  # fmt: skip


def changed(records: RecordDict, name: str, key: str, value: Any) -> RecordDict:
    """A copy with one value replaced, or removed where `value` is None."""
    table = dict(records[name].items())
    table[key] = value
    kind = type(records[name])
    copy = {other: record for other, record in records.items() if other != name}
    return RecordDict({**copy, name: kind({k: v for k, v in table.items() if v is not None})})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("instruction", "version", 1),
        ("instruction", "version", True),
        ("instruction", "heads", ["site-0"]),
        ("instruction", "heads", ["site-0=" + "g" * 64]),
        ("instruction", "heads", ["../a=" + "0" * 64]),
        ("instruction", "heads", ["a=" + "0" * 64] * 2),
        ("instruction", "version", None),
        ("instruction", "version", "1"),
        ("instruction", "run-id", ""),
        ("instruction", "run-id", "x" * 65),
        ("instruction", "run-id", "a b"),
        ("instruction", "run-id", "../x"),
        ("instruction", "run-id", None),
        ("instruction", "kind", "evaluate"),
        ("instruction", "server-round", -1),
        ("instruction", "server-round", 2**20 + 1),
        ("instruction", "server-round", True),
        ("instruction", "server-round", 1.0),
        ("instruction", "attempt", 0),
        ("instruction", "config-json", "x" * (2**16 + 1)),
        ("instruction", "config-digest", "0" * 63),
        ("instruction", "config-digest", "G" * 64),
        ("instruction", "prompts", []),
        ("instruction", "prompts", [1, 2]),
        ("instruction", "prompts", ["a", ""]),
        ("instruction", "prompts", ["x" * 8193]),
        ("instruction", "prompts", "a red circle"),
        ("instruction", "clip", 5.0),
    ],
)
def test_an_instruction_with_one_thing_wrong_is_refused(name: str, key: str, value: Any):
    records = changed(encode_instruction(instruction()), name, key, value)
    with pytest.raises(ProtocolError):
        decode_instruction(over_the_wire(records))


def raw(dtype: str, shape: tuple[int, ...], data: bytes, stype: str = RAW) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


@pytest.mark.parametrize(
    "array",
    [
        raw("<f8", (2,), bytes(16)),
        raw(">f4", (2,), bytes(8)),
        raw("|O", (2,), bytes(16)),
        raw("object", (1,), b"cos\nsystem\n(S'true'\ntR."),
        raw("<f4", (2,), bytes(8), stype="numpy.ndarray"),
        Array(np.zeros(2, dtype=np.float32)),
        raw("<f4", (3,), bytes(8)),
        raw("<f4", (2, 1), bytes(8)),
        raw("<f4", (-2,), bytes(8)),
        raw("<f4", (2**62,), bytes(8)),
        raw("<f4", (1,), np.float32("nan").tobytes()),
        raw("<f4", (1,), np.float32("inf").tobytes()),
    ],
)
def test_weights_that_are_not_plain_finite_float32_are_refused(array: Array):
    records = encode_instruction(instruction())
    records["weights"] = ArrayRecord({"values": array})
    with pytest.raises(ProtocolError):
        decode_instruction(records)


def test_an_object_array_cannot_be_sent():
    with pytest.raises((TypeError, ValueError)):
        encode_instruction(instruction(weights=np.array([object()])))


def test_an_oversize_array_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "MAX_PARAMETERS", 6)
    with pytest.raises(ProtocolError, match="28, allowed is 0 to 24"):
        decode_instruction(encode_instruction(instruction()))
    with pytest.raises(ProtocolError, match="88, allowed is 0 to 80"):
        decode_reply(encode_reply(REPLY))


@pytest.mark.parametrize("extra", [ConfigRecord({"loss": 0.5}), MetricRecord({"loss": 0.5}), ArrayRecord()])
def test_a_record_that_has_no_name_in_the_layout_is_refused(extra: Any):
    down, up, no = encode_instruction(instruction()), encode_reply(REPLY), encode_reply(Refusal("s", RefusalCode.SITE))
    for records in (down, up, no):
        records["metrics"] = extra
    with pytest.raises(ProtocolError):
        decode_instruction(down)
    for records in (up, no):
        with pytest.raises(ProtocolError):
            decode_reply(records)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("reply", "version", 0),
        ("reply", "site-id", "a/b"),
        ("reply", "site-id", 7),
        ("reply", "server-round", -1),
        ("reply", "examples", 100),
        ("reply", "run-id", None),
    ],
)
def test_a_reply_with_one_thing_wrong_is_refused(name: str, key: str, value: Any):
    with pytest.raises(ProtocolError):
        decode_reply(changed(encode_reply(REPLY), name, key, value))


def test_a_refusal_with_a_code_of_its_own_is_refused():
    with pytest.raises(ProtocolError):
        decode_reply(changed(encode_reply(Refusal("a", RefusalCode.SITE)), "refusal", "code", "only 3 records"))


@pytest.mark.parametrize(
    ("images", "indices"), [((2, 4, 4, 3), 3), ((0, 4, 4, 3), 0), ((2, 4, 4), 2)]
)  # fmt: skip
def test_fakes_that_do_not_pair_with_prompts_are_refused(images: tuple[int, ...], indices: int):
    fakes = FakeBank(np.zeros(images, np.uint8), np.zeros(indices, np.int32))
    with pytest.raises(ProtocolError):
        decode_instruction(encode_instruction(instruction(fakes=fakes)))


def test_a_fake_of_an_unknown_prompt_is_refused():
    fakes = FakeBank(np.zeros((1, 4, 4, 3), np.uint8), np.array([4], np.int32))
    with pytest.raises(ProtocolError, match="not in the pool"):
        decode_instruction(encode_instruction(instruction(fakes=fakes)))


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=64), dtype=st.text(max_size=4), shape=st.lists(st.integers(-2, 9), max_size=3))
def test_arbitrary_arrays_are_read_or_refused_and_nothing_else(data: bytes, dtype: str, shape: list[int]):
    records = encode_instruction(instruction())
    records["weights"] = ArrayRecord({"values": raw(dtype, tuple(shape), data)})
    try:
        arrived = decode_instruction(records)
    except ProtocolError:
        return
    assert arrived.weights.tobytes() == data


# ---- the gate


def build_reply(
    payload: Any, *, instruction: RoundInstruction, site_id: str = "site-0", length: int = 3, head: str = HEAD
) -> SiteReply | Refusal:
    return build(Release(instruction, payload, head, length), site_id=site_id)


def test_the_gate_passes_a_vector_of_the_planned_length():
    values = np.array([0, LATTICE_LIMIT, -LATTICE_LIMIT], dtype=np.int64)
    expected = b"".join(int(value).to_bytes(8, "little", signed=True) for value in values)
    reply = build_reply(values, instruction=instruction())
    assert reply == SiteReply("0123456789abcdef", 3, "site-0", expected + bytes.fromhex(HEAD))


class Vector(np.ndarray):
    pass


@pytest.mark.parametrize(
    "payload",
    [
        np.zeros(3, dtype=np.float32),
        np.zeros(3, dtype=np.float64),
        np.array([np.nan, 0, 0]),
        np.zeros(3, dtype=np.int32),
        np.zeros(3, dtype=np.uint64),
        np.zeros(3, dtype=object),
        np.zeros((3, 1), dtype=np.int64),
        np.zeros(2, dtype=np.int64),
        np.zeros(4, dtype=np.int64),
        np.zeros(0, dtype=np.int64),
        np.array([0, 0, LATTICE_LIMIT + 1]),
        np.array([0, 0, -LATTICE_LIMIT - 1]),
        np.array([0, 0, np.iinfo(np.int64).min]),
        np.zeros(3, dtype=np.int64).view(Vector),
        [0, 0, 0],
        b"\x00" * 24,
        None,
    ],
)
def test_the_gate_lets_nothing_else_pass(payload: Any):
    with pytest.raises(ProtocolError):
        build_reply(payload, instruction=instruction())


@pytest.mark.parametrize("head", ["", "0" * 63, "G" * 64, "a red circle"])
def test_the_gate_lets_no_other_head_pass(head: str):
    with pytest.raises(ProtocolError):
        build_reply(np.zeros(3, np.int64), instruction=instruction(), head=head)


@pytest.mark.parametrize("content", ["site", "a red circle", None, RefusalCode, REPLY])
def test_a_refusal_is_a_code_and_never_a_text(content: Any):
    assert build(RefusalCode.SITE, site_id="site-0") == Refusal("site-0", RefusalCode.SITE)
    with pytest.raises(ProtocolError):
        build(content, site_id="site-0")


@pytest.mark.parametrize("site_id", ["a red circle", "../a", "a" * 65])
def test_no_text_leaves_as_a_site_id(site_id: str):
    with pytest.raises(ProtocolError):
        build(RefusalCode.SITE, site_id=site_id)


def test_the_gate_lets_no_unknown_kind_pass():
    with pytest.raises(ProtocolError):
        build_reply(np.zeros(3, np.int64), instruction=instruction(kind="metrics"))


def test_replies_of_sites_of_different_size_have_one_schema_and_length():
    lengths = {
        tuple((name, key, len(getattr(value, "data", b""))) for name, record in encode_reply(reply).items()
              for key, value in record.items())
        for reply in (
            build_reply(np.full(3, value), instruction=instruction())
            for value in (0, 1, -(2**47), 2**48)
        )
    }  # fmt: skip
    assert len(lengths) == 1


# ---- the sum


def reply_of(values: list[int], site_id: str = "a", **changes: Any) -> SiteReply:
    envelope = pack_envelope(np.array(values, dtype=np.int64), HEAD)
    return dataclasses.replace(REPLY, site_id=site_id, envelope=envelope, **changes)


def total_of(replies: list[SiteReply], length: int = 2) -> tuple[np.ndarray, int]:
    summed = RoundSum(run_id=REPLY.run_id, server_round=3, length=length)
    for reply in replies:
        summed.add(reply)
    assert summed.heads == {reply.site_id: HEAD for reply in replies}
    return summed.total, summed.replies


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-LATTICE_LIMIT, LATTICE_LIMIT), min_size=3, max_size=3), min_size=1, max_size=8),
    data=st.data(),
)
def test_the_sum_is_that_of_plain_integers_in_any_order(rows: list[list[int]], data: st.DataObject):
    replies = [reply_of(row, f"site-{i}") for i, row in enumerate(rows)]
    total, count = total_of(data.draw(st.permutations(replies)), length=3)
    assert [int(value) for value in total] == [sum(column) for column in zip(*rows, strict=True)]
    assert count == len(rows)


def test_the_sum_of_the_most_sites_at_the_limit_does_not_wrap_around():
    assert MAX_SITES * LATTICE_LIMIT < 2**63


@pytest.mark.parametrize(
    "wrong",
    [
        reply_of([1, 2]),
        reply_of([1, 2, 3], "b"),
        reply_of([1, 2], "b", run_id="another"),
        reply_of([1, 2], "b", server_round=2),
        reply_of([1, LATTICE_LIMIT + 1], "b"),
        reply_of([1, -LATTICE_LIMIT - 1], "b"),
        dataclasses.replace(REPLY, site_id="b", envelope=b"\x00" * 15),
        dataclasses.replace(REPLY, site_id="b", envelope=b"\x00" * 16),
    ],
)
def test_a_reply_that_does_not_belong_to_the_sum_leaves_it_as_it_was(wrong: SiteReply):
    summed = RoundSum(run_id=REPLY.run_id, server_round=3, length=2)
    summed.add(reply_of([1, 2]))
    with pytest.raises(ProtocolError):
        summed.add(wrong)
    assert (summed.total.tolist(), summed.heads, summed.replies) == ([1, 2], {"a": HEAD}, 1)


def test_the_digest_of_an_instruction_names_all_that_is_asked_for_and_not_how_often():
    asked = instruction()
    for changes in ({"attempt": 2}, {"heads": {}}):
        assert dataclasses.replace(asked, **changes).digest == asked.digest
    fakes = FakeBank(np.zeros((1, 4, 4, 3), np.uint8), np.array([1], np.int32))
    others = [
        {"run_id": "a"}, {"kind": "moments"}, {"server_round": 4}, {"config_digest": "1" * 64}, {"prompts": ("a",)},
        {"weights": np.nextafter(asked.weights, np.float32(2))}, {"fakes": fakes},
        {"fakes": dataclasses.replace(fakes, prompt_indices=np.array([2], np.int32))},
    ]  # fmt: skip
    digests = {dataclasses.replace(asked, **changes).digest for changes in others}
    assert len(digests | {asked.digest}) == len(others) + 1


# ---- what an aggregator signs


def changed_records() -> dict[str, Callable[[RecordDict], None]]:
    """Every way to change one thing of an instruction with fakes."""

    def value(name: str, key: str, new: Any) -> Callable[[RecordDict], None]:
        def change(records: RecordDict) -> None:
            records[name][key] = new

        return change

    def array(name: str, key: str, **changes: Any) -> Callable[[RecordDict], None]:
        def change(records: RecordDict) -> None:
            old = records[name][key]
            about = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data, **changes}
            records[name][key] = Array(**about)

        return change

    return {
        "run": value("instruction", "run-id", "0123456789abcdee"),
        "round": value("instruction", "server-round", 4),
        "attempt": value("instruction", "attempt", 2),
        "a bool for an int": value("instruction", "attempt", True),
        "prompts": value("instruction", "prompts", ["a red circle"]),
        "prompts cut elsewhere": value("instruction", "prompts", ["a red circleein blaues Dreieck"]),
        "heads": value("instruction", "heads", []),
        "one more value": value("instruction", "more", 1),
        "a weight": array("weights", "values", data=np.linspace(-1, 2, 7, dtype=np.float32).tobytes()),
        "shape": array("weights", "values", shape=(7, 1)),
        "type": array("weights", "values", dtype="<i4"),
        "how it is read": array("weights", "values", stype="numpy.ndarray"),
        "a fake": array("fakes", "prompt-indices", data=np.array([1, 1], "<i4").tobytes()),
        "no fakes": lambda records: records.__delitem__("fakes"),
        "one more record": lambda records: records.__setitem__("more", ConfigRecord({})),
        "one more record of arrays": lambda records: records.__setitem__("more", ArrayRecord({})),
        "one array more": lambda records: records["weights"].__setitem__("more", records["weights"]["values"]),
    }


def with_fakes() -> RecordDict:
    bank = FakeBank(images=np.zeros((2, 8, 8, 3), np.uint8), prompt_indices=np.array([0, 1], np.int32))
    return encode_instruction(instruction(fakes=bank))


def test_what_is_signed_is_the_same_at_both_ends_of_the_wire() -> None:
    records = with_fakes()
    before = records_digest(records)
    attach_signature(records, keys=b'{"kind":"aggregator-keys"}', signature=b"\x00\xff" * 32)
    arrived = over_the_wire(records)
    assert records_digest(arrived) == before
    assert detach_signature(arrived) == (b'{"kind":"aggregator-keys"}', b"\x00\xff" * 32)
    assert decode_instruction(arrived).digest == instruction(fakes=decode_instruction(with_fakes()).fakes).digest
    with pytest.raises(ProtocolError, match="is not signed"):
        detach_signature(arrived)


@pytest.mark.parametrize("what", changed_records())
def test_whatever_is_changed_has_another_digest(what: str) -> None:
    records, before = with_fakes(), records_digest(with_fakes())
    changed_records()[what](records)
    assert records_digest(records) != before


def test_what_has_no_one_form_is_not_signed() -> None:
    for record in (MetricRecord({"loss": 1.0}), ConfigRecord({"a": 1.5}), ConfigRecord({"a": b"x"}),
                   ConfigRecord({"a": [1.5]})):  # fmt: skip
        records = with_fakes()
        records["more"] = record
        with pytest.raises(ProtocolError, match="cannot be signed"):
            records_digest(records)


@pytest.mark.parametrize("length", [0, -1, 2**24 + 1])
def test_a_statement_beyond_the_bound_or_without_a_byte_does_not_pass(length: int) -> None:
    of_that_length = MAGIC + bytes(max(0, 1 + length + OVERHEAD - len(MAGIC)))
    with pytest.raises(ProtocolError, match="longer than any"):
        build(SealedStatement("run", of_that_length, length), site_id="site-0")


def test_a_sealed_statement_has_the_bytes_that_it_says() -> None:
    whole = MAGIC + bytes(1 + 1000 + OVERHEAD - len(MAGIC))
    reply = build(SealedStatement("run", whole, 1000), site_id="site-0")
    assert isinstance(reply, SiteReply)
    assert (reply.run_id, reply.server_round, reply.envelope) == ("run", 0, whole)
    for other in (whole[:-1], whole + b"\0", b"\0" * len(whole)):
        with pytest.raises(ProtocolError):
            build(SealedStatement("run", other, 1000), site_id="site-0")
