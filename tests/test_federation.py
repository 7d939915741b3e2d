"""Who a federation is and who belongs to it: statements that only the right key can make, at the right time."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.protection.channel import NEWEST, AggregatorChannel, SiteChannel
from shared.protection.federation import CLOCKS, AggregatorKeys, Federation, SiteKeys
from shared.protection.keys import OpeningKey, SealFor, SigningKey, VerifyKey
from shared.protection.sealed import Context

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
IDENTITY, SITE = SigningKey.generate(), SigningKey.generate()
PEM = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
FEDERATION = Federation("retina-2026", "fl.example.org:9443", PEM, IDENTITY.public)
KEYS = AggregatorKeys(
    "retina-2026", 1, SigningKey.generate().public, OpeningKey.generate().public, NOW, NOW + timedelta(days=90)
)


def node_key(curve: ec.EllipticCurve) -> str:
    public = ec.generate_private_key(curve).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


NODE = node_key(ec.SECP384R1())
ST_ANNA = SiteKeys("retina-2026", "st-anna", SITE.public, NODE)


def written(statement: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**statement, **changes}).encode()


def test_a_federation_is_read_back_and_its_fingerprint_does_not_depend_on_where_it_is() -> None:
    read = Federation.read(written(FEDERATION.statement(IDENTITY)), what="the kit")
    assert read == FEDERATION
    moved = dataclasses.replace(FEDERATION, address="other.example.org:443")
    assert moved.fingerprint == FEDERATION.fingerprint
    for changes in ({"name": "retina-2027"}, {"authority": PEM.replace("A", "B")}, {"identity": SITE.public}):
        assert dataclasses.replace(FEDERATION, **changes).fingerprint != FEDERATION.fingerprint


def test_a_kit_that_somebody_changed_says_so_or_has_another_fingerprint() -> None:
    with pytest.raises(TrustError, match="not signed"):
        Federation.read(written(FEDERATION.statement(IDENTITY), address="evil.example.org:9443"), what="the kit")
    thief = SigningKey.generate()
    forged = dataclasses.replace(FEDERATION, identity=thief.public)
    read = Federation.read(written(forged.statement(thief)), what="the kit")  # well made, and of somebody else
    assert read.fingerprint != FEDERATION.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        # What a terminal would show as the fingerprint of somebody else's federation.
        {"address": "fl.example.org:9443\nfingerprint: aaaa aaaa\n\x1b[8m"}, {"address": "fl.example.org:9443, x"},
        {"address": "fl.example.org"}, {"address": ""}, {"authority": ""}, {"authority": "/etc/passwd"},
        {"authority": PEM + "\x1b[8m"},
    ],
)  # fmt: skip
def test_a_kit_s_address_and_authority_are_what_they_must_be(changes: dict[str, Any]) -> None:
    wrong = dataclasses.replace(FEDERATION, **changes)
    with pytest.raises(TrustError, match=r"no host and port|no certificate in PEM"):
        Federation.read(written(wrong.statement(IDENTITY)), what="the kit")


@pytest.mark.parametrize("name", ["", "Retina", "a b", "-a", "a" * 41, "ä"])
def test_a_federation_with_an_impossible_name_is_refused(name: str) -> None:
    wrong = dataclasses.replace(FEDERATION, name=name)
    with pytest.raises(TrustError, match="small letters"):
        Federation.read(written(wrong.statement(IDENTITY)), what="the kit")


def test_the_aggregator_s_keys_count_while_they_are_in_force() -> None:
    content = written(KEYS.statement(IDENTITY))
    for now in (NOW - CLOCKS, NOW, NOW + timedelta(days=90) + CLOCKS):
        assert AggregatorKeys.read(content, FEDERATION, now=now) == KEYS
    for now in (NOW - 2 * CLOCKS, NOW + timedelta(days=91)):
        with pytest.raises(TrustError, match="in force from 2026-11-26 to 2027-02-24"):
            AggregatorKeys.read(content, FEDERATION, now=now)


def test_the_aggregator_s_keys_are_nobody_else_s_and_of_no_other_federation() -> None:
    with pytest.raises(TrustError, match="not signed"):
        AggregatorKeys.read(written(KEYS.statement(SITE)), FEDERATION, now=NOW)
    with pytest.raises(TrustError, match="not signed"):
        AggregatorKeys.read(written(KEYS.statement(IDENTITY), serial=2), FEDERATION, now=NOW)
    other = dataclasses.replace(KEYS, federation="retina-2027")
    with pytest.raises(TrustError, match="of federation 'retina-2027'"):
        AggregatorKeys.read(written(other.statement(IDENTITY)), FEDERATION, now=NOW)


@pytest.mark.parametrize("time", ["", "2026-11-26", "2026-11-26T12:00:00", "yesterday"])
def test_a_time_in_another_form_is_refused(time: str) -> None:
    from shared.protection.statements import sign_statement

    table = {name: value for name, value in KEYS.statement(IDENTITY).items() if name not in ("kind", "signature")}
    signed = sign_statement("aggregator-keys", {**table, "not-before": time}, IDENTITY)
    with pytest.raises(TrustError, match="no time such as"):
        AggregatorKeys.read(written(signed), FEDERATION, now=NOW)


def test_a_request_is_the_site_s_own_and_an_admission_the_federation_s() -> None:
    request, admission = written(ST_ANNA.request(SITE)), written(ST_ANNA.admission(IDENTITY))
    assert SiteKeys.read_request(request, what="the request") == ST_ANNA
    assert SiteKeys.read_admission(admission, IDENTITY.public, what="the roster") == ST_ANNA
    with pytest.raises(TrustError, match="kind"):  # neither passes for the other
        SiteKeys.read_admission(request, IDENTITY.public, what="the roster")
    with pytest.raises(TrustError, match="kind"):
        SiteKeys.read_request(admission, what="the request")
    with pytest.raises(TrustError, match="not signed"):
        SiteKeys.read_admission(written(ST_ANNA.admission(SITE)), IDENTITY.public, what="the roster")


def test_a_request_with_somebody_else_s_key_in_it_is_refused() -> None:
    # A stolen kit is worth nothing without the site's key; a thief's own key has another fingerprint.
    thief = SigningKey.generate()
    with pytest.raises(TrustError, match="not signed"):
        SiteKeys.read_request(written(ST_ANNA.request(SITE), **{"signing-key": thief.public.text}), what="the request")
    theirs = SiteKeys.read_request(
        written(dataclasses.replace(ST_ANNA, signing=thief.public).request(thief)), what="the request"
    )
    assert theirs.fingerprint != ST_ANNA.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "../st-anna"}, {"site": ""}, {"federation": "a/b"}, {"node": "ssh-rsa AAAA"},
        {"node": NODE + "\nevil"}, {"node": ""}, {"node": node_key(ec.SECP256R1())},
        {"node": "ecdsa-sha2-nistp384 " + "A" * 182 + "=="},  # made up
        {"node": NODE[:120] + ("A" if NODE[120] != "A" else "B") + NODE[121:]},  # no point of the curve
        {"node": NODE.replace("nistp384", "nistp521", 1)},
        {"node": node_key(ec.SECP256R1()).replace("nistp256", "nistp384", 1)},
    ],
)  # fmt: skip
def test_a_request_with_a_name_or_node_key_that_could_not_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TrustError):
        SiteKeys.read_request(written(dataclasses.replace(ST_ANNA, **changes).request(SITE)), what="the request")


def test_the_fingerprint_of_an_aggregator_names_both_of_its_keys_and_no_dates() -> None:
    signing, sealing = SigningKey.generate().public, OpeningKey.generate().public
    keys = AggregatorKeys("retina-2026", 1, signing, sealing, NOW, NOW + timedelta(days=90))
    about = {"federation": "retina-2026", "instruction-key": base64.b64encode(signing.raw).decode(),
             "sealing-key": base64.b64encode(sealing.raw).decode()}  # fmt: skip
    text = b"fedcanvas aggregator 1\0" + json.dumps(about, separators=(",", ":")).encode()
    letters = base64.b32encode(hashlib.sha256(text).digest())[:24].decode().lower()
    assert keys.fingerprint.replace(" ", "") == letters
    assert dataclasses.replace(keys, serial=2, not_after=NOW).fingerprint == keys.fingerprint
    for changes in (
        {"signing": SigningKey.generate().public}, {"sealing": OpeningKey.generate().public}, {"federation": "other"},
    ):  # fmt: skip
        assert dataclasses.replace(keys, **changes).fingerprint != keys.fingerprint


# ---- the channel

CONTEXT = Context("retina-2026", "0123456789abcdef", "st-anna", 3, "ab" * 32, "cd" * 32)
DIGEST = bytes(range(32))


class Aggregator:
    """Keys of one serial, and the channel that has them."""

    def __init__(self, serial: int, *, before: Aggregator | None = None) -> None:
        self.signing, self.opening = SigningKey.generate(), OpeningKey.generate()
        self.keys = AggregatorKeys(
            "retina-2026", serial, self.signing.public, self.opening.public, NOW, NOW + timedelta(days=90)
        )
        self.statement = written(self.keys.statement(IDENTITY))
        opening = (self.opening, before.opening) if before else (self.opening,)
        self.channel = AggregatorChannel(
            "retina-2026", statement=self.statement, signing=self.signing, opening=opening,
            sites={"st-anna": SITE.public},
        )  # fmt: skip

    def sent(self, digest: bytes = DIGEST) -> dict[str, Any]:
        return {"statement": self.statement, "signature": self.channel.sign(digest), "now": NOW}


@pytest.fixture
def first() -> Aggregator:
    return Aggregator(1)


@pytest.fixture
def site(first: Aggregator, tmp_path: Path) -> SiteChannel:
    (tmp_path / NEWEST).write_bytes(first.statement)
    return SiteChannel(tmp_path, FEDERATION, site="st-anna", signing=SITE)


def test_an_instruction_is_checked_and_its_answer_is_opened(first: Aggregator, site: SiteChannel) -> None:
    site.check(DIGEST, **first.sent())
    for kind in ("reply", "code"):
        opened = first.channel.open(site.seal(kind, b"12345", context=CONTEXT), context=CONTEXT)
        assert (opened.kind, opened.content) == (kind, b"12345")


def test_what_the_aggregator_did_not_sign_is_refused(first: Aggregator, site: SiteChannel) -> None:
    with pytest.raises(TrustError, match="the instruction is not signed"):
        site.check(bytes(32), **first.sent())
    thief = Aggregator(1)
    with pytest.raises(TrustError, match="the instruction is not signed"):
        site.check(DIGEST, **{**thief.sent(), "statement": first.statement})
    with pytest.raises(TrustError, match="two statements of the aggregator's keys 1"):
        site.check(DIGEST, **thief.sent())
    with pytest.raises(TrustError, match="too long"):
        site.check(DIGEST, **{**first.sent(), "statement": b" " * 2**15})


def test_rotated_keys_are_taken_up_at_once_and_older_ones_never_again(
    first: Aggregator, site: SiteChannel, tmp_path: Path
) -> None:
    second = Aggregator(2, before=first)
    in_flight = site.seal("reply", b"x", context=CONTEXT)
    site.check(DIGEST, **second.sent())
    assert second.channel.open(in_flight, context=CONTEXT).content == b"x"  # two valid keys in overlap
    answer = site.seal("reply", b"y", context=CONTEXT)
    assert second.channel.open(answer, context=CONTEXT).content == b"y"
    with pytest.raises(TrustError, match="not in force"):
        first.channel.open(answer, context=CONTEXT)
    for again in (site, SiteChannel(tmp_path, FEDERATION, site="st-anna", signing=SITE)):  # also after a restart
        with pytest.raises(TrustError, match="the keys 2 have been in force here already"):
            again.check(DIGEST, **first.sent())


def test_keys_that_came_with_a_forged_instruction_are_not_taken_up(first: Aggregator, site: SiteChannel) -> None:
    second = Aggregator(2, before=first)
    with pytest.raises(TrustError, match="not signed"):
        site.check(bytes(32), **second.sent())
    site.check(DIGEST, **first.sent())


VALID = OpeningKey.generate().public.raw


@pytest.mark.parametrize("sealing", [b"\xff" * 1184 + VALID[1184:], VALID[:1184] + bytes(32)])
def test_keys_that_nothing_can_be_sealed_to_are_not_taken_up(
    sealing: bytes, first: Aggregator, site: SiteChannel, tmp_path: Path
) -> None:
    """No coefficients of ML-KEM, and a point of X25519 with which every secret is zero; both of the right length."""
    second = Aggregator(2, before=first)
    keys = dataclasses.replace(second.keys, sealing=SealFor(sealing))
    second.statement = written(keys.statement(IDENTITY))
    with pytest.raises(TrustError, match="public"):
        site.check(DIGEST, **second.sent())
    site.check(DIGEST, **first.sent())
    assert first.channel.open(site.seal("reply", b"x", context=CONTEXT), context=CONTEXT).content == b"x"
    (tmp_path / NEWEST).write_bytes(second.statement)
    with pytest.raises(TrustError):
        SiteChannel(tmp_path, FEDERATION, site="st-anna", signing=SITE)


def test_nobody_answers_for_another_site(first: Aggregator, site: SiteChannel) -> None:
    answer = site.seal("reply", b"x", context=CONTEXT)
    for changes, word in (({"site": "st-bruno"}, "no site of"), ({"federation": "other"}, "no site of")):
        with pytest.raises(TrustError, match=word):
            first.channel.open(answer, context=dataclasses.replace(CONTEXT, **changes))


class Vanishing(dict[str, VerifyKey]):
    """A roster whose site is revoked after one look."""

    def get(self, site: str, default: Any = None) -> Any:
        return self.pop(site, default)

    def __contains__(self, site: object) -> bool:
        return self.pop(str(site), None) is not None


def test_a_site_that_is_revoked_while_its_answer_is_opened_is_no_error_of_ours(
    first: Aggregator, site: SiteChannel
) -> None:
    answer = site.seal("reply", b"x", context=CONTEXT)
    first.channel.sites = Vanishing(first.channel.sites)
    assert first.channel.open(answer, context=CONTEXT).content == b"x"
    with pytest.raises(TrustError, match="no site of"):
        first.channel.open(answer, context=CONTEXT)


@pytest.mark.parametrize("content", [None, b"", b"rubbish"])
def test_a_site_without_the_keys_of_its_kit_says_so(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / NEWEST).write_bytes(content)
    with pytest.raises(TrustError):
        SiteChannel(tmp_path, FEDERATION, site="st-anna", signing=SITE)
