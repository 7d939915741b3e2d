"""Leaving a federation: what goes, what stays to the byte, and that a leaving that was cut off can be ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deployed_site import OPEN, ask
from flower_processes import ROOT, eventually
from test_client_deployment import CONFIG
from test_supervisor import SUPERVISOR
from toy_federation import make_sites, toy_policy

import client.leaving
from client.deployment import programs
from client.joining import join
from client.membership import open_channel
from client.network import also_trust
from client.site import forget_site
from server.federation import FederationFolder
from shared.cli import run
from shared.errors import TrustError
from shared.protection.kit import read_kit
from shared.supervisor import status


@pytest.fixture
def operator(tmp_path: Path) -> FederationFolder:
    return FederationFolder.create(tmp_path / "operator", name="simulation", address="fl.example.org:9443")


@pytest.fixture
def site(tmp_path: Path, operator: FederationFolder) -> Path:
    """Admitted, started once, with an answer and a pending run behind it."""
    (made,) = make_sites(tmp_path / "sites", sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    assert ask(made, CONFIG) is None
    operator.kit("site-0", tmp_path / "kit.zip")
    joined = join(made, read_kit(tmp_path / "kit.zip"), site_id="site-0")
    operator.admit(operator.read_request(joined.request.read_bytes(), what="the request"))
    also_trust(made, operator.path / "keys/authority.crt")
    programs(made)
    (made / "logs").mkdir()
    (made / "logs/node.log").write_text("INFO\n")
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MEMBERSHIP = {  # written by hand
    "federation.json", "aggregator-keys.json", "request.json", "keys/signing.pem", "keys/node", "keys/trusted.crt",
    "keys/federation-authority.crt", "keys/also-trusted.crt", "keys/runtime.crt", "keys/runtime.key",
    "keys/runtime-secret", "keys/runtime-authority.crt", "run/runtime-address",
}  # fmt: skip


def test_keys_and_membership_go_and_everything_else_stays_to_the_byte(
    site: Path, operator: FederationFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before, (admitted,) = files(site), operator.roster()
    assert before.keys() > MEMBERSHIP
    assert run(["client", "leave", str(site), "--yes", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    after = files(site)
    assert after == {name: content for name, content in before.items() if name not in MEMBERSHIP}
    assert {"site.toml", "policy.toml", "anchor.json", "data.npz", "replies/run.reply"} <= after.keys()
    assert (said["federation"], said["fingerprint"]) == ("simulation", admitted.fingerprint)  # as the roster has it
    assert Path(said["ledger"]).read_bytes() == after["lineages/of-site-0/ledger.jsonl"]
    assert open_channel(site, "site-0") is None
    assert run(["client", "ledger", str(site), "--verify"]) == 0
    assert run(["client", "start", str(site)]) == 3


def test_a_person_is_asked_told_what_remains_and_what_may_go(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    before = files(site)
    assert run(["client", "leave", str(site)]) == 2
    assert files(site) == before
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert run(["client", "leave", str(site)]) == 0
    said = capsys.readouterr().out
    assert "fedcanvas server revoke DIR site-0" in said
    assert "--leave-federation simulation" in said
    assert f"{site}/lineages/of-site-0/ledger.jsonl: what was spent" in said
    deletable = [line.split(":")[0].strip() for line in said.partition("what can be deleted:")[2].splitlines() if line]
    assert deletable == [f"{site}/cache", f"{site}/logs", f"{site}/replies"]
    # What is said to be deletable is: the account still opens, and tells the same.
    for place in deletable:
        shutil.rmtree(place)
    assert run(["client", "ledger", str(site), "--verify"]) == 0
    assert run(["client", "receipts", str(site)]) == 0
    assert run(["client", "leave", str(site)]) == 0
    assert "belongs to no federation" in capsys.readouterr().out


@pytest.mark.parametrize("steps", range(1, 13))
def test_a_leaving_that_was_cut_off_answers_nothing_and_is_ended_by_leaving_again(
    site: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [steps]

    def counted(folder: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(client.leaving, "fsync_folder", counted)
        assert run(["client", "leave", str(site), "--yes"]) == 130
    forget_site(site)
    with pytest.raises(TrustError):
        open_channel(site, "site-0")  # never in clear
    assert run(["client", "start", str(site)]) in (3, 10)
    assert run(["client", "leave", str(site), "--yes"]) == 0
    assert not files(site).keys() & MEMBERSHIP


def test_a_site_at_work_is_stopped_first(site: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(site)], cwd=ROOT)
    eventually(lambda: (status(site) or {}).get("programs"), "a supervisor")
    assert run(["client", "leave", str(site), "--yes"]) == 0
    assert process.wait(timeout=30) == 0
    assert not (site / "run").exists()


def test_a_site_that_left_joins_again_with_other_keys(
    site: Path, operator: FederationFolder, tmp_path: Path
) -> None:
    (before,) = operator.roster()
    assert run(["client", "leave", str(site), "--yes"]) == 0
    operator.revoke("site-0")
    again = join(site, read_kit(tmp_path / "kit.zip"), site_id="site-0")
    assert again.keys.signing != before.signing
    assert again.keys.node != before.node
    operator.admit(operator.read_request(again.request.read_bytes(), what="the request"))
