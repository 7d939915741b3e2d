"""From the operator's folder to a site of the roster: kit, request, admission, revocation, rotation, as files."""

from __future__ import annotations

import itertools
import json
import shutil
import ssl
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from deployed_site import OPEN, round_of
from joined_sites import sent, signed
from killed_process import KillAtCall, Killed
from toy_federation import make_sites, toy_policy

import client.worker
from client.joining import Joined, join
from client.membership import open_channel
from client.site import forget_site
from server.cohort import opened
from server.federation import CERTIFICATE, CERTIFICATE_KEY, FederationFolder, split_address
from shared.errors import FederationError, TrustError, UsageError
from shared.protection.federation import SiteKeys
from shared.protection.keys import SigningKey, read_node_key
from shared.protection.kit import MOST_BYTES, NAMES, read_kit
from shared.protection.sealed import check_instruction
from shared.records import Refusal, SiteReply, encode_instruction


@pytest.fixture
def operator(tmp_path: Path) -> FederationFolder:
    return FederationFolder.create(tmp_path / "operator", name="simulation", address="fl.example.org:9443")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (made,) = make_sites(tmp_path / "sites", sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    return made


def joined(operator: FederationFolder, site: Path) -> Joined:
    operator.kit("site-0", site.parent / "kit.zip")
    return join(site, read_kit(site.parent / "kit.zip"), site_id="site-0")


def admitted(operator: FederationFolder, site: Path) -> SiteKeys:
    asked = operator.read_request(joined(operator, site).request.read_bytes(), what="the request")
    operator.admit(asked)
    forget_site(site)
    return asked


def answer(operator: FederationFolder, site: Path, server_round: int) -> Any:
    asked, channel = round_of(server_round), operator.channel()
    return opened(sent(site, signed(channel, asked)), channel, asked)


def test_a_site_joins_is_admitted_and_answers(operator: FederationFolder, site: Path) -> None:
    made = joined(operator, site)
    asked = operator.read_request(made.request.read_bytes(), what="the request")
    assert asked == made.keys
    assert asked.fingerprint == made.keys.fingerprint  # what both sides read to each other
    operator.admit(asked)
    assert operator.roster() == [asked]
    forget_site(site)
    assert isinstance(answer(operator, site, 1), SiteReply)


def test_no_secret_is_in_kit_or_request_and_private_files_are_their_owner_s_alone(
    operator: FederationFolder, site: Path
) -> None:
    admitted(operator, site)
    carried = (site / "request.json").read_bytes()
    with zipfile.ZipFile(site.parent / "kit.zip") as archive:
        assert sorted(archive.namelist()) == sorted(NAMES)
        carried += b"".join(archive.read(name) for name in NAMES)
    private = [*operator.path.glob("keys/*.pem"), *operator.path.glob("keys/*.key")]
    private += [site / "keys/signing.pem", site / "keys/node"]
    assert len(private) == 7
    for path in private:
        assert path.stat().st_mode & 0o077 == 0
        text = path.read_text()  # of the server's, the part that is its certificate is public
        lines = [line for line in text[text.index("PRIVATE KEY") :].splitlines() if "-----" not in line]
        assert lines
        assert not any(line.encode() in carried for line in lines if len(line) > 20)
    assert b"PRIVATE" not in carried
    assert operator.path.stat().st_mode & 0o077 == 0


def test_the_node_key_is_one_that_openssh_and_flower_read(operator: FederationFolder, site: Path) -> None:
    joined(operator, site)
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(site / "keys/node")], capture_output=True, text=True, check=True
    ).stdout
    assert shown.split()[:2] == read_node_key(site / "keys/node").split()[:2]


def test_joining_again_keeps_the_keys(operator: FederationFolder, site: Path) -> None:
    first = joined(operator, site)
    before = first.request.read_bytes()
    again = joined(operator, site)
    assert again.keys == first.keys
    assert again.request.read_bytes() == before


def test_a_site_has_one_federation(operator: FederationFolder, site: Path, tmp_path: Path) -> None:
    joined(operator, site)
    other = FederationFolder.create(tmp_path / "other", name="simulation", address="fl.example.org:9443")
    with pytest.raises(TrustError, match="belongs to federation 'simulation'"):
        joined(other, site)


def test_a_second_site_with_a_stolen_kit_is_told_apart(operator: FederationFolder, site: Path, tmp_path: Path) -> None:
    own = admitted(operator, site)
    (thief,) = make_sites(tmp_path / "thief", sizes=(8,), seed=None)
    request = join(thief, read_kit(site.parent / "kit.zip"), site_id="site-0").request
    with pytest.raises(UsageError, match=f"admitted already, with other keys: {own.fingerprint}"):
        operator.read_request(request.read_bytes(), what="the request")


def test_two_sites_with_one_key_are_refused(operator: FederationFolder, site: Path) -> None:
    admitted(operator, site)
    copied = join(site, read_kit(site.parent / "kit.zip"), site_id="site-1").request
    with pytest.raises(TrustError, match="holds a key of site site-0"):
        operator.read_request(copied.read_bytes(), what="the request")


def test_a_request_for_another_federation_is_refused(operator: FederationFolder, site: Path, tmp_path: Path) -> None:
    other = FederationFolder.create(tmp_path / "other", name="elsewhere", address="fl.example.org:9443")
    with pytest.raises(TrustError, match="asks to join federation 'elsewhere'"):
        operator.read_request(joined(other, site).request.read_bytes(), what="the request")


def test_a_revoked_site_is_no_site_at_once_and_may_come_back_with_new_keys(
    operator: FederationFolder, site: Path
) -> None:
    before = admitted(operator, site)
    assert operator.revoke("site-0") == before
    assert operator.roster() == []
    with pytest.raises(TrustError, match="'site-0' is no site of federation"):
        answer(operator, site, 1)
    with pytest.raises(UsageError, match="no site 'site-0' to revoke"):
        operator.revoke("site-0")
    for name in ("keys/signing.pem", "keys/node"):
        (site / name).unlink()
    assert admitted(operator, site) != before
    assert isinstance(answer(operator, site, 2), SiteReply)


def test_an_admission_that_was_revoked_does_not_count_wherever_it_is_copied(
    operator: FederationFolder, site: Path
) -> None:
    admitted(operator, site)
    channel, path = operator.channel(), operator.path / "sites/site-0.json"
    admission, request = path.read_bytes(), (site / "request.json").read_bytes()
    operator.revoke("site-0")
    path.write_bytes(admission)
    assert operator.roster() == []
    assert operator.warnings() == ["sites/site-0.json holds keys that were revoked: it does not count, remove it"]
    assert "site-0" not in channel.sites
    with pytest.raises(TrustError, match="holds a key that was revoked"):
        operator.read_request(request, what="the request")
    # New keys for one of the two are not new keys; and in the old file's place they are no other site's.
    (site / "keys/signing.pem").unlink()
    with pytest.raises(TrustError, match="holds a key that was revoked"):
        admitted(operator, site)
    (site / "keys/node").unlink()
    fresh = admitted(operator, site)
    assert (operator.roster(), operator.warnings()) == ([fresh], [])
    # Revoked again, each admission keeps its file.
    operator.revoke("site-0")
    path.write_bytes(admission)
    operator.revoke("site-0")
    (operator.path / "revoked/site-0-1.json").unlink()
    (site / "keys/signing.pem").unlink()
    (site / "keys/node").unlink()
    admitted(operator, site)
    operator.revoke("site-0")
    assert len(list((operator.path / "revoked").iterdir())) == 3


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, b"[" * 100_000, b"{}", "another's", "a folder"])
def test_what_is_no_admission_costs_its_own_site_and_no_other(
    content: bytes | str, operator: FederationFolder, site: Path, tmp_path: Path
) -> None:
    asked, channel = admitted(operator, site), operator.channel()
    place = operator.path / "sites/st-bruno.json"
    if isinstance(content, bytes):
        place.write_bytes(content)
    elif content == "a folder":
        place.mkdir()
    else:  # of the same name, by somebody else's identity
        other = FederationFolder.create(tmp_path / "other", name=operator.federation.name, address="other.org:1")
        place.write_text(json.dumps(asked.admission(SigningKey.read(other.path / "keys/identity.pem"))))
    assert (list(channel.sites), "st-bruno" in channel.sites) == (["site-0"], False)
    assert isinstance(answer(operator, site, 1), SiteReply)
    (words,) = operator.warnings()
    assert words.startswith(f"a file in sites/ is no admission and does not count: {place} ")


def test_a_damaged_admission_ends_its_site_s_part_until_it_is_admitted_again(
    operator: FederationFolder, site: Path
) -> None:
    asked, place = admitted(operator, site), operator.path / "sites/site-0.json"
    whole = place.read_bytes()
    place.write_bytes(whole.replace(b"site-0", b"site-1"))
    assert (operator.roster(), len(operator.warnings())) == ([], 1)
    operator.admit(asked)
    assert (place.read_bytes(), operator.warnings()) == (whole, [])


def test_a_revoked_key_does_not_come_back_under_another_name(operator: FederationFolder, site: Path) -> None:
    admitted(operator, site)
    operator.revoke("site-0")
    operator.kit("site-1", site.parent / "kit.zip")
    request = join(site, read_kit(site.parent / "kit.zip"), site_id="site-1").request
    with pytest.raises(TrustError, match="holds a key that was revoked"):
        operator.read_request(request.read_bytes(), what="the request")


def test_a_request_is_looked_at_again_when_it_is_admitted(operator: FederationFolder, site: Path) -> None:
    """Between the two a person reads a fingerprint out, and another command may have changed the roster."""
    asked = operator.read_request(joined(operator, site).request.read_bytes(), what="the request")
    operator.admit(asked)
    with pytest.raises(UsageError, match="admitted already, with the same keys"):
        operator.admit(asked)
    operator.revoke("site-0")
    with pytest.raises(TrustError, match="holds a key that was revoked"):
        operator.admit(asked)
    assert operator.roster() == []


def test_one_command_at_a_time_changes_a_federation(operator: FederationFolder, site: Path) -> None:
    asked = admitted(operator, site)
    holder = subprocess.Popen(
        ["flock", str(operator.path / "lock"), "sh", "-c", "echo held; cat"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    for change in (operator.rotate, lambda: operator.admit(asked), lambda: operator.revoke("site-0")):
        with pytest.raises(FederationError, match="another command is changing"):
            change()
    assert (operator.keys.serial, operator.roster()) == (1, [asked])  # reading needs no lock
    holder.kill()
    holder.communicate()
    operator.revoke("site-0")


def test_a_rotation_that_is_cut_off_anywhere_leaves_keys_and_certificate_that_fit(
    operator: FederationFolder, tmp_path: Path
) -> None:
    serials = set()
    for number in itertools.count(1):
        folder = FederationFolder.open(shutil.copytree(operator.path, tmp_path / f"cut-{number}"))
        with pytest.MonkeyPatch.context() as patch:
            kill = KillAtCall(number, patch)
            kill.watch(of_os=("fsync", "link", "replace"), of_path=("rename", "unlink"))
            try:
                folder.rotate()
            except Killed:
                pass
            else:
                break
        # OpenSSL says whether a key is that of a certificate.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            folder.path / CERTIFICATE, folder.path / CERTIFICATE_KEY
        )
        digest = bytes(32)
        check_instruction(
            folder.channel().sign(digest), digest, federation="simulation", by=folder.keys.signing
        )
        serials.add(folder.keys.serial)
        # The next one is whole, and leaves nothing of what came before.
        serial = folder.rotate().serial
        left = sorted(path.name for path in folder.path.glob("keys/aggregator-*"))
        assert left == sorted(
            [f"aggregator-{serial - 1}-opening.pem", f"aggregator-{serial}-opening.pem",
             f"aggregator-{serial}-signing.pem"]
        )  # fmt: skip
    assert number > 15
    assert serials == {1, 2}


def test_a_revocation_counts_for_a_run_that_is_going_on(operator: FederationFolder, site: Path) -> None:
    admitted(operator, site)
    asked, channel = round_of(1), operator.channel()
    reply = sent(site, signed(channel, asked))
    operator.revoke("site-0")
    with pytest.raises(TrustError, match="is no site of federation"):
        opened(reply, channel, asked)


def test_a_newer_kit_brings_newer_keys_and_an_older_one_changes_nothing(operator: FederationFolder, site: Path) -> None:
    joined(operator, site)
    old = (site.parent / "kit.zip").rename(site.parent / "old.zip")
    operator.rotate()
    joined(operator, site)
    newest = (site / "aggregator-keys.json").read_bytes()
    assert json.loads(newest)["serial"] == 2
    join(site, read_kit(old), site_id="site-0")
    assert (site / "aggregator-keys.json").read_bytes() == newest
    (site / "aggregator-keys.json").write_text("damaged")
    joined(operator, site)
    assert (site / "aggregator-keys.json").read_bytes() == newest


def test_a_site_whose_federation_was_taken_away_does_not_answer_in_clear(
    operator: FederationFolder, site: Path
) -> None:
    admitted(operator, site)
    (site / "federation.json").unlink()
    for records in (encode_instruction(round_of(1)), signed(operator.channel(), round_of(1))):
        assert isinstance(sent(site, records), Refusal)
    assert "federation.json is missing" in (site / "site.log").read_text()


def test_no_worker_answers_for_a_site_that_joined_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["worker", str(site)])
    with pytest.raises(SystemExit, match="joined no federation"):
        client.worker.main()


def test_a_rotation_that_cannot_be_whole_changes_nothing(operator: FederationFolder) -> None:
    (operator.path / "keys/authority.key").rename(operator.path / "offline.key")
    before = {path.name: path.read_bytes() for path in (operator.path / "keys").iterdir()}
    with pytest.raises(TrustError, match=r"authority\.key cannot be read"):
        operator.rotate()
    assert operator.keys.serial == 1
    assert {path.name: path.read_bytes() for path in (operator.path / "keys").iterdir()} == before


def test_keys_and_certificate_rotate_without_a_new_kit(operator: FederationFolder, site: Path) -> None:
    admitted(operator, site)
    assert isinstance(answer(operator, site, 1), SiteReply)
    certificate = (operator.path / CERTIFICATE).read_bytes()
    for serial in (2, 3):
        assert operator.rotate().serial == serial
        assert isinstance(answer(operator, site, serial), SiteReply)
    assert (operator.path / CERTIFICATE).read_bytes() != certificate
    left = sorted(path.name for path in operator.path.glob("keys/aggregator-*"))
    assert left == ["aggregator-2-opening.pem", "aggregator-3-opening.pem", "aggregator-3-signing.pem"]


def test_an_identity_with_a_passphrase_is_asked_for_only_to_sign_statements(tmp_path: Path, site: Path) -> None:
    operator = FederationFolder.create(
        tmp_path / "locked", name="simulation", address="localhost:9443", passphrase=b"correct horse"
    )
    asked = operator.read_request(joined(operator, site).request.read_bytes(), what="the request")
    with pytest.raises(TrustError, match=r"passphrase of the key .* is missing"):
        operator.admit(asked)
    operator.admit(asked, passphrase=b"correct horse")
    forget_site(site)
    assert isinstance(answer(operator, site, 1), SiteReply)


def test_with_a_passphrase_at_hand_neither_end_has_a_key_in_clear(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    monkeypatch.setenv("FEDCANVAS_PASSPHRASE_FILE", str(secret))
    operator = FederationFolder.create(
        tmp_path / "locked", name="simulation", address="localhost:9443", passphrase=b"battery staple"
    )
    asked = operator.read_request(joined(operator, site).request.read_bytes(), what="the request")
    operator.admit(asked, passphrase=b"battery staple")
    forget_site(site)
    assert isinstance(answer(operator, site, 1), SiteReply)
    operator.rotate(passphrase=b"battery staple")
    assert isinstance(answer(operator, site, 2), SiteReply)
    for path in (site / "keys/signing.pem", *operator.path.glob("keys/*.pem")):
        assert ("server.pem" in path.name) or b"ENCRYPTED" in path.read_bytes()
    secret.write_text("another\n")
    with pytest.raises(TrustError, match=r"passphrase of the key .*aggregator-2-signing.* is wrong"):
        operator.rotate(passphrase=b"battery staple")
    monkeypatch.delenv("FEDCANVAS_PASSPHRASE_FILE")
    with pytest.raises(UsageError, match="new ones would have none"):
        operator.rotate(passphrase=b"battery staple")
    assert operator.keys.serial == 2
    with pytest.raises(TrustError, match=r"passphrase of the key .*aggregator-2-signing.* is missing"):
        operator.channel()
    with pytest.raises(TrustError, match=r"passphrase of the key .*signing\.pem is missing"):
        open_channel(site, "site-0")


def test_keys_get_a_passphrase_only_while_no_server_is_started_that_could_not_read_them(
    operator: FederationFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    monkeypatch.setenv("FEDCANVAS_PASSPHRASE_FILE", str(secret))
    with monkeypatch.context() as patched:
        patched.setattr("server.federation.is_held", lambda folder: True)
        with pytest.raises(UsageError, match="was started without one"):
            operator.rotate()
    assert operator.rotate().serial == 2
    assert b"ENCRYPTED" in (operator.path / "keys/aggregator-2-opening.pem").read_bytes()
    operator.channel()  # what was sealed to the keys before, which have none, is opened too


def test_what_somebody_wrote_into_the_roster_makes_no_site(operator: FederationFolder, site: Path) -> None:
    keys = admitted(operator, site)
    path = operator.path / "sites/site-0.json"
    good = json.loads(path.read_text())
    other_key = {**good, "node-key": keys.node[:-4] + "AAAA"}
    for changed, name in (({**good, "site": "site-1"}, "site-1"), (other_key, "site-0")):
        path.unlink(missing_ok=True)
        (operator.path / f"sites/{name}.json").write_text(json.dumps(changed))
        assert (list(operator.channel().sites), len(operator.warnings())) == ([], 1)
        (operator.path / f"sites/{name}.json").unlink()
    (operator.path / "sites/another.json").write_text(json.dumps(good))
    assert list(operator.channel().sites) == []
    assert "another.json is the admission of another site or federation" in operator.warnings()[0]


def zipped(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return path


def test_what_is_no_kit_is_refused_and_nothing_of_it_is_unpacked(operator: FederationFolder, tmp_path: Path) -> None:
    operator.kit("site-0", tmp_path / "kit.zip")
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        good = {name: archive.read(name) for name in NAMES}
    wrong = {
        "one more": {**good, "../evil.py": b"x"}, "one less": {name: good[name] for name in NAMES[:3]},
        "a site that is a path": {**good, "site.json": b'{"site": "../../etc"}'},
        "no site": {**good, "site.json": b"[]"}, "no federation": {**good, "federation.json": b"{}"},
        "a bomb": {**good, "README.txt": b"0" * (MOST_BYTES + 1)},
        "other keys": {**good, "aggregator-keys.json": good["federation.json"]},
    }  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    for parts in wrong.values():
        with pytest.raises(TrustError):
            read_kit(zipped(tmp_path / "kit.zip", parts))
    for content in (b"", b"PK", b"rubbish" * 1000, b"0" * (MOST_BYTES + 1)):
        (tmp_path / "kit.zip").write_bytes(content)
        with pytest.raises(TrustError):
            read_kit(tmp_path / "kit.zip")
    with pytest.raises(TrustError, match="cannot be read"):
        read_kit(tmp_path / "absent.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_equal_kits_are_equal_files_and_say_the_fingerprint(operator: FederationFolder, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        operator.kit("site-0", tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert operator.federation.fingerprint in archive.read("README.txt").decode()


@pytest.mark.parametrize(
    "address", ["", "fl.example.org", ":9443", "fl.example.org:", "fl.example.org:0", "fl.example.org:99999", "a b:1",
                "https://fl.example.org:1"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_and_nothing_is_left(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no address of a server"):
        FederationFolder.create(tmp_path / "x", name="simulation", address=address)
    assert list(tmp_path.iterdir()) == []
    assert split_address("[::1]:9443") == ("[::1]", 9443)


def test_a_folder_that_is_there_is_not_touched(operator: FederationFolder) -> None:
    before = (operator.path / "federation.json").read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        FederationFolder.create(operator.path, name="simulation", address="localhost:1")
    assert (operator.path / "federation.json").read_bytes() == before


def test_what_ends_soon_is_said(operator: FederationFolder) -> None:
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    assert operator.warnings(now=now) == []
    assert operator.warnings(now=now + timedelta(days=70)) == ["the aggregator's keys 1 end in 20 days"]
    late = operator.warnings(now=now + timedelta(days=340))
    assert any("keys/server.pem ends in" in words for words in late)
    assert any("keys 1 ended on" in words for words in late)
