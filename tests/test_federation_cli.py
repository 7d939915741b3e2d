"""`fedcanvas server` and `fedcanvas client join`, as an operator and a partner type them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_federation import make_sites

from shared.cli import run
from shared.errors import FederationError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCANVAS_STATE", str(tmp_path / "lineages"))
    make_sites(tmp_path / "made", sizes=(60,))
    (tmp_path / "made/site-0/data.npz").rename(tmp_path / "data.npz")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) != 0
    return capsys.readouterr().err


INIT = ("server", "init", "fed", "--name", "retina-2026", "--address", "fl.example.org:9443")
KIT = ("server", "kit", "fed", "--site", "st-anna", "--out", "st-anna.zip")
SITE = ("--data", "data.npz", "--lineage", "scans-2026", "--max-epsilon", "8", "--delta", "1e-3")
JOIN = ("client", "join", "st-anna.zip", "site")


def test_from_init_to_a_roster_with_one_site(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = printed(capsys, *INIT)
    kit = printed(capsys, *KIT)
    joined = printed(capsys, *JOIN, *SITE, "--yes")
    # What the two people compare is the same at both ends.
    assert begun["fingerprint"] == kit["fingerprint"] == joined["federation_fingerprint"]
    admitted = printed(capsys, "server", "admit", "fed", "site/request.json", "--yes")
    assert admitted == {"site": "st-anna", "fingerprint": joined["fingerprint"]}
    status = printed(capsys, "server", "status", "fed")
    assert [(site["site"], site["fingerprint"], site["online"]) for site in status["sites"]] == [
        ("st-anna", joined["fingerprint"], False)
    ]
    assert status["started"] is False
    assert (status["keys"]["serial"], status["warnings"]) == (1, [])
    assert printed(capsys, "server", "rotate", "fed")["serial"] == 2
    assert printed(capsys, "server", "revoke", "fed", "st-anna", "--yes")["fingerprint"] == joined["fingerprint"]
    assert printed(capsys, "server", "status", "fed")["sites"] == []
    policy = (here / "site/policy.toml").read_text()
    assert 'federations = ["retina-2026"]' in policy
    assert "approve-each-run = true" in policy


def test_after_a_rotation_that_the_server_did_not_hear_of_a_person_knows(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed(capsys, *INIT)

    def deny(*_: object) -> None:
        raise FederationError("process 7 is another user's", hint="stop and start it as that user")

    monkeypatch.setattr("shared.supervisor.restart", deny)
    assert run(["server", "rotate", "fed", "--json"]) == 7
    out, err = capsys.readouterr()
    assert json.loads(out)["serial"] == 2  # they are made all the same
    assert "the server still uses the keys before: process 7 is another user's" in err
    assert "stop and start it as that user" in err


def test_a_person_is_asked_and_a_no_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = printed(capsys, *INIT)["fingerprint"]
    printed(capsys, *KIT)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    said = refused(capsys, *JOIN, *SITE)
    assert fingerprint in said
    assert "nothing was joined" in said
    assert not (here / "site").exists()
    joined = printed(capsys, *JOIN, *SITE, "--yes")
    said = refused(capsys, "server", "admit", "fed", "site/request.json")
    assert joined["fingerprint"] in said
    assert "nobody was admitted" in said
    printed(capsys, "server", "admit", "fed", "site/request.json", "--yes")
    assert "nothing was changed" in refused(capsys, "server", "revoke", "fed", "st-anna")
    assert len(printed(capsys, "server", "status", "fed")["sites"]) == 1


def test_a_site_that_is_there_joins_and_one_of_another_name_does_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, *INIT)
    printed(capsys, *KIT)
    assert "there is no site in site yet, and a new one needs --data, --lineage, --max-epsilon, --delta" in refused(
        capsys, *JOIN, "--yes"
    )
    printed(capsys, "client", "init", "site", *SITE)
    assert "the kit is for site st-anna, and site is site site" in refused(capsys, *JOIN, "--yes")
    printed(capsys, "client", "init", "other", *SITE, "--site-id", "st-anna")
    assert printed(capsys, "client", "join", "st-anna.zip", "other", "--yes")["site_id"] == "st-anna"


def test_a_passphrase_comes_from_a_file_and_stands_nowhere_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "secret.txt").write_text("correct horse\nsecond line\n")
    (here / "secret.txt").chmod(0o604)
    assert "everybody on this machine can read secret.txt" in refused(capsys, *INIT, "--passphrase-file", "secret.txt")
    (here / "secret.txt").chmod(0o600)
    printed(capsys, *INIT, "--passphrase-file", "secret.txt")
    printed(capsys, *KIT)
    printed(capsys, *JOIN, *SITE, "--yes")
    assert "is missing" in refused(capsys, "server", "admit", "fed", "site/request.json", "--yes")
    admit = ("server", "admit", "fed", "site/request.json", "--yes", "--passphrase-file", "secret.txt")
    assert printed(capsys, *admit)["site"] == "st-anna"
    (here / "secret.txt").write_text("\n")
    assert "is empty" in refused(capsys, "server", "rotate", "fed", "--passphrase-file", "secret.txt")
    (here / "secret.txt").unlink()
    files = [path for path in here.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not any(b"correct horse" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("server", "status", "nowhere"), "no federation's folder"),
        (("server", "init", "x", "--name", "A B", "--address", "h:1"), "no name of a federation"),
        (("server", "init", "x", "--name", "a", "--address", "h"), "no address of a server"),
        (("client", "join", "absent.zip", "site"), "cannot be read"),
        (("client", "join", "data.npz", "site"), "is no kit"),
        (("server", "kit", "fed", "--site", "../x", "--out", "x.zip"), "no name of a site"),
        (("server", "admit", "fed", "absent.json"), "cannot be read"),
        (("server", "admit", "fed", "data.npz"), "no JSON"),
        (("server", "revoke", "fed", "nobody", "--yes"), "no site 'nobody' to revoke"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], word: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, *INIT)
    before = sorted(str(path) for path in here.rglob("*"))
    said = refused(capsys, *arguments)
    assert word in said
    assert "hint: " in said or "cannot be read" in said or "is no kit" in said or "no JSON" in said
    assert sorted(str(path) for path in here.rglob("*")) == before
