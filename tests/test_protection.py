"""Keys, statements, envelopes and certificates: what was changed, swapped, replayed or read by others is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import TrustError
from shared.flower_runtime import Runtime
from shared.protection import certificates
from shared.protection.certificates import (
    check_issued,
    issue_server_certificate,
    make_authority,
    read_certificate,
    validity,
)
from shared.protection.keys import (
    OpeningKey,
    SealFor,
    SigningKey,
    VerifyKey,
    fingerprint,
    from_base64,
    passphrase_at_hand,
    read_node_key,
    to_base64,
    write_node_key,
)
from shared.protection.sealed import (
    OVERHEAD,
    Context,
    check_instruction,
    open_sealed,
    seal,
    sign_instruction,
)
from shared.protection.statements import canonical, read_statement, sign_statement

CONTEXT = Context("retina-2026", "0123456789abcdef", "st-anna", 7, "ab" * 32, "cd" * 32)
SECRET = b"nobody else may read this: \x00\x01\x02"
VECTORS = json.loads((Path(__file__).parent / "vectors/sealed-1.json").read_text())


@pytest.fixture(scope="module")
def opening() -> OpeningKey:
    return OpeningKey.generate()


@pytest.fixture(scope="module")
def signing() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def sealed(opening: OpeningKey, signing: SigningKey) -> bytes:
    return seal(SECRET, to=opening.public, by=signing, context=CONTEXT)


# ---- the sealed reply


def test_what_was_sealed_is_opened_by_its_recipient(sealed: bytes, opening: OpeningKey, signing: SigningKey) -> None:
    opened = open_sealed(sealed, keys={opening.public.id: opening}, by=signing.public, context=CONTEXT)
    assert opened == SECRET
    assert len(sealed) == len(SECRET) + OVERHEAD


def test_nothing_of_it_can_be_read_and_two_are_never_equal(
    sealed: bytes, opening: OpeningKey, signing: SigningKey
) -> None:
    assert not any(SECRET[place : place + 8] in sealed for place in range(len(SECRET) - 8))
    assert seal(SECRET, to=opening.public, by=signing, context=CONTEXT) != sealed


def test_every_flipped_byte_is_refused(sealed: bytes, opening: OpeningKey, signing: SigningKey) -> None:
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(TrustError):
            open_sealed(bytes(changed), keys={opening.public.id: opening}, by=signing.public, context=CONTEXT)


def test_what_is_cut_short_or_made_longer_is_refused(sealed: bytes, opening: OpeningKey, signing: SigningKey) -> None:
    for changed in (b"", sealed[:4], sealed[: OVERHEAD - 1], sealed[:-1], sealed + b"\0"):
        with pytest.raises(TrustError):
            open_sealed(changed, keys={opening.public.id: opening}, by=signing.public, context=CONTEXT)


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "retina-2027"}, {"run": "0123456789abcdee"}, {"site": "st-anne"}, {"server_round": 8},
        {"config_digest": "aa" * 32}, {"instruction_digest": "dd" * 32},
        {"federation": "retina-20260", "run": "123456789abcdef"},  # the same letters, cut elsewhere
    ],
)  # fmt: skip
def test_an_answer_to_another_question_is_refused(
    changes: dict[str, Any], sealed: bytes, opening: OpeningKey, signing: SigningKey
) -> None:
    other = dataclasses.replace(CONTEXT, **changes)
    with pytest.raises(TrustError, match="not signed by the key"):
        open_sealed(sealed, keys={opening.public.id: opening}, by=signing.public, context=other)


def test_a_site_that_signs_another_s_answer_is_refused_by_the_seal_itself(
    sealed: bytes, opening: OpeningKey, signing: SigningKey
) -> None:
    # The thief strips the signature and signs the ciphertext as its own: HPKE is bound to the site too.
    thief, rest = SigningKey.generate(), sealed[13 + 64 :]
    stolen = dataclasses.replace(CONTEXT, site="thief")
    own = seal(b"", to=opening.public, by=thief, context=stolen)
    from shared.protection import sealed as module

    header = own[:13]
    forged = header + thief.sign(module._signed(header, stolen.to_bytes(), rest)) + rest
    with pytest.raises(TrustError, match="cannot be opened"):
        open_sealed(forged, keys={opening.public.id: opening}, by=thief.public, context=stolen)


def test_another_signer_is_refused_before_anything_is_decrypted(
    sealed: bytes, opening: OpeningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpeningKey, "hpke", lambda self: pytest.fail("decrypted"))
    with pytest.raises(TrustError, match="not signed by the key"):
        open_sealed(
            sealed, keys={opening.public.id: opening}, by=SigningKey.generate().public, context=CONTEXT
        )


def test_while_keys_rotate_both_are_opened_and_afterwards_only_the_new_one(signing: SigningKey) -> None:
    old, new = OpeningKey.generate(), OpeningKey.generate()
    both = {key.public.id: key for key in (old, new)}
    for key in (old, new):
        message = seal(SECRET, to=key.public, by=signing, context=CONTEXT)
        assert open_sealed(message, keys=both, by=signing.public, context=CONTEXT) == SECRET
    message = seal(SECRET, to=old.public, by=signing, context=CONTEXT)
    with pytest.raises(TrustError, match="not in force"):
        open_sealed(message, keys={new.public.id: new}, by=signing.public, context=CONTEXT)


def test_frozen_vectors_are_opened_and_their_signature_is_made_again_bit_for_bit() -> None:
    table: Mapping[str, Any] = VECTORS
    opening = OpeningKey(
        MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(table["mlkem_seed"])),
        X25519PrivateKey.from_private_bytes(bytes.fromhex(table["x25519_private"])),
    )
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(table["ed25519_private"]))
    assert opening.public.id.hex() == table["recipient_id"]
    for vector in table["vectors"]:
        context, message = Context(**vector["context"]), bytes.fromhex(vector["sealed"])
        assert context.to_bytes().hex() == vector["context_bytes"]
        opened = open_sealed(
            message, keys={opening.public.id: opening}, by=SigningKey(private).public, context=context
        )
        assert opened.hex() == vector["content"]
        # As docs/protocol.md says, by hand.
        import hashlib

        signed = b"fedcanvas sealed 1\0" + message[:13] + context.to_bytes() + hashlib.sha256(message[77:]).digest()
        assert private.sign(signed) == message[13:77]


# ---- the signed instruction


def test_an_instruction_counts_only_as_it_was_signed_and_in_its_federation(signing: SigningKey) -> None:
    digest = bytes(range(32))
    signature = sign_instruction(digest, federation="retina-2026", by=signing)
    check_instruction(signature, digest, federation="retina-2026", by=signing.public)
    refused = [
        (signature, bytes(32), "retina-2026", signing.public), (signature, digest, "retina-2027", signing.public),
        (signature, digest, "retina-2026", SigningKey.generate().public), (b"", digest, "retina-2026", signing.public),
    ]  # fmt: skip
    for given, of, federation, by in refused:
        with pytest.raises(TrustError, match="the instruction is not signed"):
            check_instruction(given, of, federation=federation, by=by)


# ---- statements

FIELDS: dict[str, Any] = {"site": "st-anna", "serial": 3, "signing-key": "", "names": ["a", "b"], "simulated": False}
TYPES = {name: type(value) for name, value in FIELDS.items()}


def stated(key: SigningKey, **changes: Any) -> dict[str, Any]:
    return sign_statement("site", {**FIELDS, "signing-key": key.public.text, **changes}, key)


def test_a_statement_comes_back_as_it_was_signed(signing: SigningKey) -> None:
    made = json.dumps(stated(signing), indent=2).encode()  # blanks and order are not part of it
    for key in (signing.public, None):
        assert read_statement(made, "site", TYPES, key, what="x") == {**FIELDS, "signing-key": signing.public.text}
    public = Ed25519PublicKey.from_public_bytes(signing.public.raw)
    body = {name: value for name, value in stated(signing).items() if name != "signature"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    public.verify(from_base64(stated(signing)["signature"]), b"fedcanvas statement 1\0" + text)


def changed_after(**changes: Any) -> Callable[[SigningKey], Any]:
    return lambda key: {**stated(key), **changes}


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (changed_after(serial=4), "not signed by the key"),
        (changed_after(kind="aggregator"), "no statement of kind"),
        (changed_after(more=1), "unknown"),
        (lambda key: {k: v for k, v in stated(key).items() if k != "serial"}, "serial missing"),
        (lambda key: {k: v for k, v in stated(key).items() if k != "signature"}, "not signed"),
        (lambda key: stated(key, serial=True), "not of type int"),
        (lambda key: stated(key, names="ab"), "not of type list"),
        (changed_after(signature="AAAA"), "not signed by the key"),
        (changed_after(signature="A"), "not base64"),
        (changed_after(signature=7), "not signed"),
    ],
)  # fmt: skip
def test_a_changed_statement_is_refused(make: Callable[[SigningKey], Any], word: str, signing: SigningKey) -> None:
    with pytest.raises(TrustError, match=word):
        read_statement(json.dumps(make(signing)).encode(), "site", TYPES, signing.public, what="the request")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"kind": "site", "kind": "site"}', '{"kind": NaN}', '{"kind": 1.5}', "[" * 100_000, "\xff", "7"],
)
def test_what_is_no_json_object_or_says_a_thing_twice_is_refused(text: str, signing: SigningKey) -> None:
    with pytest.raises(TrustError):
        read_statement(text.encode("latin-1"), "site", TYPES, signing.public, what="the request")


def test_a_statement_that_names_its_own_key_proves_that_key_alone(signing: SigningKey) -> None:
    other = SigningKey.generate()
    forged = {**stated(other), "signing-key": signing.public.text}
    with pytest.raises(TrustError, match="not signed by the key"):
        read_statement(json.dumps(forged).encode(), "site", TYPES, None, what="the request")


def test_canonical_text_is_one() -> None:
    assert canonical({"b": 1, "a": "é"}) == b'{"a":"\\u00e9","b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


# ---- key files


@pytest.mark.parametrize("passphrase", [None, b"correct horse"])
@pytest.mark.parametrize("kind", [SigningKey, OpeningKey])
def test_a_key_file_is_read_back_by_its_owner_alone(
    kind: type[SigningKey] | type[OpeningKey], passphrase: bytes | None, tmp_path: Path
) -> None:
    key, path = kind.generate(), tmp_path / "keys/a.pem"
    key.write(path, passphrase=passphrase)
    assert path.stat().st_mode & 0o777 == 0o600
    assert kind.read(path, passphrase=passphrase).public == key.public
    assert (b"ENCRYPTED" in path.read_bytes()) == (passphrase is not None)
    assert [file.name for file in path.parent.iterdir()] == ["a.pem"]
    if passphrase is not None:
        for wrong, word in ((b"another", "wrong"), (None, "missing")):
            with pytest.raises(TrustError, match=f"passphrase of the key .* is {word}"):
                kind.read(path, passphrase=wrong)
    path.chmod(0o640)
    with pytest.raises(TrustError, match=r"can be read by others .*640"):
        kind.read(path, passphrase=passphrase)


@pytest.mark.parametrize("kind", [SigningKey, OpeningKey])
def test_keys_in_daily_use_have_the_passphrase_of_the_file_that_the_environment_names(
    kind: type[SigningKey] | type[OpeningKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passphrase_at_hand() is None
    secret, path = tmp_path / "secret.txt", tmp_path / "a.pem"
    secret.write_bytes(b"correct horse\r\nsecond line\n")
    secret.chmod(0o640)
    monkeypatch.setenv("FEDCANVAS_PASSPHRASE_FILE", str(secret))
    assert passphrase_at_hand() == b"correct horse"
    key = kind.generate()
    key.write(path, passphrase=passphrase_at_hand())
    assert kind.read(path).public == key.public
    kind.generate().write(tmp_path / "b.pem")
    kind.read(tmp_path / "b.pem")  # one without goes on as it is
    if kind is SigningKey:  # openssl, which is not ours, opens it with these words and without them does not
        for words, code in ((b"correct horse", 0), (b"second line", 1)):
            command = ["openssl", "pkey", "-in", str(path), "-passin", "stdin", "-noout"]
            assert subprocess.run(command, input=words, capture_output=True).returncode == code
    for content, mode, said in (
        ("another\n", 0o600, "is wrong"), ("\n", 0o600, "the first line of .* is empty"),
        ("correct horse\n", 0o604, "everybody on this machine can read"),
    ):  # fmt: skip
        secret.write_text(content)
        secret.chmod(mode)
        with pytest.raises(TrustError, match=rf"the passphrase of the key .*a\.pem.*{said}"):
            kind.read(path)
    secret.unlink()
    with pytest.raises(TrustError, match=r"secret\.txt cannot be read: No such file"):
        kind.read(path)
    monkeypatch.delenv("FEDCANVAS_PASSPHRASE_FILE")
    with pytest.raises(TrustError, match="is missing") as refused:
        kind.read(path)
    assert "FEDCANVAS_PASSPHRASE_FILE in the environment" in str(refused.value.hint)


def test_no_private_file_is_read_that_others_can_read(authority: Path) -> None:
    """Of TLS, of a Flower node, and the secret of a site's own processes, as those of the protocol above."""
    write_node_key(authority / "keys/node")
    Runtime.prepare(authority)
    reading: list[tuple[str, Callable[[], object]]] = [
        ("ca.key", lambda: issue(authority)), ("keys/node", lambda: read_node_key(authority / "keys/node")),
        ("keys/runtime-secret", lambda: Runtime.read(authority)),
    ]  # fmt: skip
    for name, read in reading:
        read()
        for mode in (0o640, 0o604, 0o620):
            (authority / name).chmod(mode)
            with pytest.raises(TrustError, match=f"can be read by others than its owner .mode {mode:o}") as refused:
                read()
            assert "chmod 600" in str(refused.value.hint)
        (authority / name).unlink()
        with pytest.raises(TrustError, match="cannot be read: No such file"):
            read()


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    first = SigningKey.generate()
    first.write(tmp_path / "a.pem")
    with pytest.raises(TrustError, match=r"a key at .* already"):
        SigningKey.generate().write(tmp_path / "a.pem")
    assert SigningKey.read(tmp_path / "a.pem").public == first.public


def test_what_a_killed_process_left_of_a_key_goes_with_the_next_writing(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from shared.protection.keys import SigningKey\n"
        "os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "SigningKey.generate().write(Path(sys.argv[1]))"
    )
    path = tmp_path / "a.pem"
    root = Path(__file__).resolve().parents[1]
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script, str(path)], cwd=root).returncode == -9
        (left,) = tmp_path.iterdir()  # that of the first one is gone
        assert b"PRIVATE KEY" in left.read_bytes()
    kept = [tmp_path / f".a.pem.{os.getpid()}.x", tmp_path / ".a.pem.note", tmp_path / f".b.pem.{2**22 + 1}.x"]
    for other in kept:  # of a process that lives, of nobody, and of another key
        other.touch()
    SigningKey.generate().write(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


@pytest.mark.parametrize(
    "content", [b"", b"rubbish", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    for kind in (SigningKey, OpeningKey):
        with pytest.raises(TrustError, match="no private key"):
            kind.read(path)
    OpeningKey.generate().write(tmp_path / "b.pem")
    with pytest.raises(TrustError, match="no private key"):
        SigningKey.read(tmp_path / "b.pem")


def test_nothing_of_a_private_key_is_in_its_text(signing: SigningKey, opening: OpeningKey) -> None:
    assert repr(signing) == "SigningKey()"
    assert repr(opening) == "OpeningKey()"
    assert str(signing) == "SigningKey()"


def test_a_fingerprint_is_six_groups_of_base32_that_hold_120_bits_of_sha_256() -> None:
    text = fingerprint(b"fedcanvas")
    assert re.fullmatch(r"([a-z2-7]{4} ){5}[a-z2-7]{4}", text)
    shown = subprocess.run(
        "printf fedcanvas | sha256sum | cut -c1-30", shell=True, capture_output=True, text=True, check=True
    ).stdout.strip()
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    number = 0
    for letter in text.replace(" ", ""):
        number = 32 * number + letters.index(letter)
    assert f"{number:030x}" == shown


@pytest.mark.parametrize("text", ["", "AAAA", "é", to_base64(bytes(31)), to_base64(bytes(33)), "A" * 43 + "B="])
def test_a_public_key_of_another_size_or_spelling_is_refused(text: str) -> None:
    with pytest.raises(TrustError):
        VerifyKey.from_text(text)
    with pytest.raises(TrustError):
        SealFor.from_text(text)


# ---- certificates


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    make_authority("retina-2026", certificate=tmp_path / "ca.crt", key=tmp_path / "ca.key")
    return tmp_path


def issue(folder: Path, *names: str, **more: Any) -> None:
    issue_server_certificate(
        names or ("fl.example.org", "127.0.0.1"), authority=folder / "ca.crt", authority_key=folder / "ca.key",
        certificate=folder / "server.pem", key=folder / "server.key", **more,
    )  # fmt: skip


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)


def test_openssl_accepts_the_chain_for_its_names_and_no_others(authority: Path) -> None:
    issue(authority)
    verify = ("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", authority / "ca.crt")
    for names in (("-verify_hostname", "fl.example.org"), ("-verify_ip", "127.0.0.1")):
        found = openssl(*verify, *names, authority / "server.pem")
        assert found.returncode == 0, found.stderr
    assert openssl(*verify, "-verify_hostname", "evil.example.org", authority / "server.pem").returncode != 0
    shown = openssl("x509", "-in", authority / "server.pem", "-noout", "-text").stdout
    for line in ("prime256v1", "CA:FALSE", "TLS Web Server Authentication", "DNS:fl.example.org, IP Address:127.0.0.1"):
        assert line in shown
    above = openssl("x509", "-in", authority / "ca.crt", "-noout", "-text").stdout
    assert "CA:TRUE, pathlen:0" in above
    assert "Certificate Sign, CRL Sign" in above


def test_a_server_certificate_cannot_sign_another_one(authority: Path, tmp_path: Path) -> None:
    issue(authority)
    (tmp_path / "below").mkdir()
    issue_server_certificate(
        ["evil.example.org"], authority=authority / "server.pem", authority_key=authority / "server.key",
        certificate=tmp_path / "below/evil.pem", key=tmp_path / "below/evil.key",
    )  # fmt: skip
    found = openssl(
        "verify", "-CAfile", authority / "ca.crt", "-untrusted", authority / "server.pem", tmp_path / "below/evil.pem"
    )
    assert found.returncode != 0


def test_renewing_keeps_the_authority_and_brings_another_key(authority: Path) -> None:
    issue(authority)
    before = (authority / "server.pem").read_bytes(), (authority / "server.key").read_bytes()
    issue(authority)
    after = (authority / "server.pem").read_bytes(), (authority / "server.key").read_bytes()
    assert before[0] != after[0]
    assert before[1] != after[1]
    check_issued(read_certificate(authority / "server.pem"), read_certificate(authority / "ca.crt"))


def test_another_authority_s_certificate_is_told(authority: Path, tmp_path: Path) -> None:
    issue(authority)
    (tmp_path / "other").mkdir()
    make_authority("retina-2026", certificate=tmp_path / "other/ca.crt", key=tmp_path / "other/ca.key")
    with pytest.raises(TrustError, match="not by this federation's authority"):
        check_issued(read_certificate(authority / "server.pem"), read_certificate(tmp_path / "other/ca.crt"))
    with pytest.raises(TrustError, match="is not the key of"):
        issue_server_certificate(
            ["x"], authority=authority / "ca.crt", authority_key=tmp_path / "other/ca.key",
            certificate=tmp_path / "x.pem", key=tmp_path / "x.key",
        )  # fmt: skip


def test_what_is_wrong_with_the_times_of_a_certificate_is_said_in_time(authority: Path) -> None:
    issue(authority)
    found = validity(read_certificate(authority / "server.pem"))
    now = datetime.datetime.now(datetime.UTC)
    assert found.warning(now) == ""
    assert "ends in 29 days" in found.warning(found.not_after - datetime.timedelta(days=29))
    assert "ended on" in found.warning(found.not_after + datetime.timedelta(seconds=1))
    assert "is the clock right?" in found.warning(found.not_before - datetime.timedelta(days=1))


def test_a_server_certificate_never_outlives_its_authority(authority: Path) -> None:
    end = validity(read_certificate(authority / "ca.crt")).not_after
    issue(authority, now=end - datetime.timedelta(days=9))
    assert validity(read_certificate(authority / "server.pem")).not_after == end


def test_private_keys_of_certificates_are_their_owner_s_alone(authority: Path) -> None:
    issue(authority)
    for name in ("ca.key", "server.key"):
        assert (authority / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(TrustError, match="already"):
        make_authority("again", certificate=authority / "ca.crt", key=authority / "ca.key")
    assert certificates.AUTHORITY_DAYS > certificates.SERVER_DAYS
