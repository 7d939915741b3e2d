"""Receipts: every message that left, derived from the ledger alone, and the page that a person reads."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import stat
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_site import CHEAP, OPEN, ask, instruction
from toy_federation import COLOURS, make_site, make_sites, toy_config, toy_policy

import client.account
import client.receipts
from client.account import SiteAccount
from client.policy import SitePolicy
from client.receipts import receipts_page
from client.settings import SiteConfig, note_code
from client.site import Site
from client.spending import best_guess, charged_and_not_sent, percent, receipts, run_figures, spent_over_time, totals
from shared.cli import run
from shared.errors import LedgerError
from shared.privacy.accounting import composed_epsilon, renyi_cost
from shared.privacy.budget import Lifetime, as_spent
from shared.privacy.ledger import Ledger
from shared.records import RefusalCode


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run "one": moments and two rounds, the last one sent twice. Run "two": one round."""
    policy = toy_policy(**OPEN)
    (site,) = make_sites(tmp_path_factory.mktemp("history"), sizes=(40,), seed=None, policy=policy)
    config = toy_config({**CHEAP, "warm-start.enabled": True})
    assert ask(site, config, run_id="one", kind="moments", server_round=0) is None
    for server_round in (1, 2, 2):
        assert ask(site, config, run_id="one", server_round=server_round) is None
    assert ask(site, toy_config(CHEAP), run_id="two") is None
    return site


@pytest.fixture
def site(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(history, tmp_path / "klinik")
    return Path("klinik")


def ledger_of(site: Path) -> Ledger:
    return SiteAccount(site, store=site / "lineages", lineage="of-site-0").ledger


def lines_of(site: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site / "lineages/of-site-0/ledger.jsonl").read_text().splitlines()]


def page_of(site: Path) -> str:
    opened = ledger_of(site)
    return receipts_page(site, SiteConfig.read(site), opened, SitePolicy.read(site).ceiling(opened.lineage.lifetime))


class Words(HTMLParser):
    """The text of a page, by the tag that it stands in, and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f"{data} "


# ---- figures


def test_each_receipt_is_a_commit_of_the_ledger_with_its_charge(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["client", "receipts", "klinik", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["receipts"]
    lines = lines_of(site)
    left = [line for line in lines if line["kind"] in ("commit", "resent")]
    assert len(shown) == len(left) == 5
    for receipt, line in zip(shown, left, strict=True):
        assert (receipt["run"], receipt["server_round"]) == (line["run"], line["server_round"])
        assert (receipt["bytes"], receipt["sha256"]) == (line["bytes"], line["sha256"])
        assert receipt["federation"] == "simulation"
        if line["kind"] == "resent":
            assert (receipt["again"], receipt["steps"], receipt["charge"]) == (True, 0, 0)
            assert (receipt["kind"], receipt["fields"]) == ("gradient", shown[2]["fields"])
        else:
            charge = lines[line["of"]]
            assert (receipt["kind"], receipt["steps"]) == (charge["release"], charge["steps"])
            assert (receipt["epsilon_before"], receipt["epsilon_after"]) == (
                line["epsilon_before"], line["epsilon_after"],
            )  # fmt: skip
            assert receipt["fields"] == line["fields"]
            assert receipt["bytes"] == 8 * receipt["fields"][0][2][0] + 32
    assert [receipt["kind"] for receipt in shown] == ["moments", "gradient", "gradient", "gradient", "gradient"]


def test_the_kept_reply_has_the_hash_of_its_receipt_by_the_command_on_the_page(site: Path) -> None:
    last = [receipt for receipt in receipts(ledger_of(site)) if receipt.run == "one"][-1]
    commands = re.findall(r"<pre><code>(.*?)</code></pre>", page_of(site), flags=re.DOTALL)
    assert not [command for command in commands if "&lt;" in command]
    of_reply = next(command for command in commands if "RUN.reply" in command).replace("RUN", "one")
    assert subprocess.check_output(of_reply, shell=True, text=True).split()[0] == last.sha256
    envelope = (site / "replies/one.reply").read_bytes().partition(b"\n")[2]
    assert hashlib.sha256(envelope).hexdigest() == last.sha256
    # And the two commands about the chain's last line agree.
    of_chain = next(command for command in commands if "cut -c" in command).replace("&#x27;", "'")
    stated, computed = (
        subprocess.check_output(line, shell=True, text=True).split()[0] for line in of_chain.splitlines()
    )
    assert stated == computed == ledger_of(site).head
    for command in commands:
        assert shlex.split(command.splitlines()[0])


def test_totals_are_those_of_the_lines(site: Path) -> None:
    opened, lines = ledger_of(site), lines_of(site)
    counted = totals(opened, opened.lineage.lifetime)
    after = {line["run"]: line["epsilon_after"] for line in lines if line["kind"] == "commit"}
    assert counted.spent == pytest.approx(sum(after.values()))
    assert counted.reserved == pytest.approx(sum(line["epsilon"] for line in lines if line["kind"] == "run"))
    assert counted.left.epsilon == pytest.approx(8 - counted.reserved)
    charged = [as_spent(a.terms.plan, a.steps, unsampled=a.unsampled > 0) for a in opened.runs.values()]
    assert [(part.steps, part.unsampled_noise_multiplier is not None) for part in charged] == [(2, True), (1, False)]
    assert counted.composed.epsilon == composed_epsilon(charged, delta=1e-3).epsilon
    points = spent_over_time(opened)
    assert points[0][1:] == (0, 0)
    assert points[-1][1:] == (pytest.approx(counted.spent), pytest.approx(counted.reserved))
    assert [spent for _, spent, _ in points] == sorted(spent for _, spent, _ in points)


def test_with_a_renyi_filter_divergences_add_up(tmp_path: Path) -> None:
    policy, lifetime = toy_policy(**OPEN), Lifetime(8.0, 1e-3, "renyi", 3.0)
    folder = make_site(tmp_path / "site-0", seed=None, policy=policy, lifetime=lifetime)
    labels = np.arange(40) % 3
    np.savez(folder / "data.npz", x_train=np.zeros((40, 8, 8, 3), np.uint8), y_train=labels,
             class_names=np.array(list(COLOURS)))  # fmt: skip
    for name in ("one", "two"):
        assert ask(folder, toy_config(CHEAP), run_id=name) is None
    opened = ledger_of(folder)
    counted = totals(opened, lifetime)
    cost = sum(renyi_cost(as_spent(a.terms.plan, a.steps), order=3.0) for a in opened.runs.values())
    assert counted.spent == pytest.approx(cost + 8.0 - lifetime.renyi_budget)
    assert counted.reserved + counted.left.epsilon == pytest.approx(8.0 + 8.0 - lifetime.renyi_budget)
    assert spent_over_time(opened)[-1][1:] == (pytest.approx(counted.spent), pytest.approx(counted.reserved))
    assert "Rényi divergences of order 3" in page_of(folder)


def test_a_charge_whose_message_never_left_is_counted_and_named(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(CHEAP)

    def crash(*_: Any, **__: Any) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(SiteAccount, "store_reply", crash)
    assert ask(site, config, run_id="two", server_round=2) == RefusalCode.SITE
    opened = ledger_of(site)
    assert [(entry["run"], entry["server_round"]) for entry in charged_and_not_sent(opened)] == [("two", 2)]
    assert {figures.run: figures.steps for figures in run_figures(opened)} == {"one": 2, "two": 2}
    words = Words(page_of(site)).text
    assert re.search(r"charged, and no message left .*? 1 ", words)


def test_a_reply_that_was_kept_and_not_noted_has_its_receipt_when_it_leaves(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A crash between the reply on disk and its line in the ledger: the same instruction then gets the kept bytes.
    config, real = toy_config(CHEAP), Ledger.commit
    monkeypatch.setattr(Ledger, "commit", lambda *_, **__: (_ for _ in ()).throw(LedgerError("power cut")))
    assert ask(site, config, run_id="two", server_round=2) == RefusalCode.SITE
    monkeypatch.setattr(Ledger, "commit", real)
    assert ask(site, config, run_id="two", server_round=2) is None
    assert ask(site, config, run_id="two", server_round=2) is None
    first, second = receipts(ledger_of(site))[-2:]
    assert (first.kind, first.steps, first.again, second.again) == ("gradient", 1, False, True)
    assert first.epsilon_after > first.epsilon_before > 0
    assert second.charge == 0
    assert charged_and_not_sent(ledger_of(site)) == []


@pytest.mark.parametrize(
    ("epsilon", "delta", "share"),
    [(0.0, 0.0, 0.5), (1.0, 0.0, math.e / (1 + math.e)), (8.0, 1e-6, (math.exp(8) + 1e-6) / (1 + math.exp(8))),
     (1000.0, 0.0, 1.0), (math.inf, 1e-6, 1.0)],
)  # fmt: skip
def test_the_best_guess_is_that_of_hypothesis_testing(epsilon: float, delta: float, share: float) -> None:
    assert best_guess(epsilon, delta) == pytest.approx(share)


def test_percents_are_rounded_up_and_never_certainty() -> None:
    assert percent(best_guess(8.0, 0.0)) == "99.97 %"
    assert percent(best_guess(1.0, 0.0)) == "73.11 %"
    assert percent(best_guess(0.0, 0.0)) == "50 %"
    assert percent(best_guess(30.0, 0.0)) == percent(1.0) == "more than 99.99 %"


# ---- text


def test_the_list_ends_with_the_latest_message_and_the_totals(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_code(site, RefusalCode.POLICY, "greedy", 1)
    with open(site / "refusals.jsonl", "a") as file:
        file.write("torn")
    assert run(["client", "receipts", "klinik"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "charged"
    assert " two " in lines[5]
    assert " one " in lines[4]
    assert "gradient, again" in lines[4]
    left = [line for line in lines_of(site) if line["kind"] in ("commit", "resent")]
    assert f"5, {sum(line['bytes'] for line in left):,} bytes in all; 1 were the same bytes again" in "\n".join(lines)
    assert "1 x policy, 1 x unreadable" in lines[-1]


def test_a_site_that_sent_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site,) = make_sites(tmp_path, sizes=(3,), seed=None)
    assert run(["client", "receipts", str(site)]) == 0
    assert capsys.readouterr().out.startswith("nothing has left this site")
    words = Words(page_of(site)).text
    assert "Nothing has left this site yet" in words
    assert "No request was refused" in words


# ---- the page


def test_figures_on_the_page_are_those_of_the_ledger_s_lines(site: Path) -> None:
    lines, words = lines_of(site), Words(page_of(site)).text
    left = [line for line in lines if line["kind"] in ("commit", "resent")]
    priced = [line for line in lines if line["kind"] == "run"]
    spent = sum({line["run"]: line["epsilon_after"] for line in lines if line["kind"] == "commit"}.values())
    reserved = sum(line["epsilon"] for line in priced)
    assert f"Nothing but {len(left)} messages" in words
    assert f"{sum(line['bytes'] for line in left) / 1000:.3g} kB" in words
    assert f"spent: {spent:.4g}" in words
    assert (
        f"Of a lifetime epsilon of 8, {spent:.4g} is spent, {reserved:.4g} is reserved in all, and"
        f" {8 - reserved:.4g} is left."
    ) in words
    for line in priced:
        assert f"{line['epsilon']:.4g}" in words
    for line in left:
        assert line["sha256"] in words
    for epsilon in (spent, reserved, 8):
        assert f"{math.ceil(best_guess(epsilon, 1e-3) * 10_000) / 100:g} %" in words
    assert lines[-1]["previous"] not in words
    assert ledger_of(site).head in words
    assert f"from the {len(lines)} lines of their ledger" in words


def test_the_page_loads_nothing_runs_nothing_and_names_its_pictures(site: Path) -> None:
    page = page_of(site)
    assert not re.search(r"https?://|<script|javascript:|@import|url\(|<link|<img|<iframe| on\w+=", page)
    assert "default-src 'none'" in page
    parsed = Words(page)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("h1") == 1
    assert tags.count("h2") == 6
    assert tags.count("details") == 2
    for tag, attributes in parsed.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 40
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "html":
            assert attributes["lang"] == "en"
    assert tags.count("svg") == 2
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_what_others_wrote_is_escaped(site: Path) -> None:
    with (account := SiteAccount(site, store=site / "lineages", lineage="of-site-0")).locked():
        account.ledger.note("ceiling", max_epsilon=9.0, delta=1e-3, filter="sum", order=None,
                            reason="<script>alert('x')</script>\"&")  # fmt: skip
    page = page_of(site)
    assert "<script" not in page
    assert "Reason given: <script>alert('x')</script>\"&" in Words(page).text
    note = site / "refusals.jsonl"
    note.write_text('{"time": "", "code": "<b>", "run": "<i>", "server_round": 1}\n')
    assert "<b>policy" not in page_of(site)
    assert "&lt;b&gt;" in page_of(site)


def test_no_caption_class_or_file_name_is_on_the_page(site: Path) -> None:
    page = page_of(site)
    assert not re.search(rf"\b({'|'.join(COLOURS)})\b", Words(page).text)
    assert "data.npz" not in page


def test_many_messages_are_shown_by_their_first_and_last(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.receipts, "MOST_MESSAGES", 3)
    monkeypatch.setattr(client.receipts, "SHOWN_OF_RUN", 1)
    words = Words(page_of(site)).text
    of_one = [receipt for receipt in receipts(ledger_of(site)) if receipt.run == "one"]
    assert of_one[0].sha256 in words
    assert of_one[-1].sha256 in words
    assert of_one[1].sha256 not in words
    assert "2 of 4 messages" in words
    assert "fedcanvas client receipts klinik --json" in words


def test_the_unit_decides_the_words(site: Path) -> None:
    opened = ledger_of(site)
    config, ceiling = SiteConfig.read(site), opened.lineage.lifetime
    assert "not one person" in receipts_page(site, config, opened, ceiling)
    object.__setattr__(opened.lineage, "unit", "subject")
    words = Words(receipts_page(site, config, opened, ceiling)).text
    assert "one person with all their pictures" in words
    assert "not one person" not in words


def test_a_simulated_site_and_a_run_without_privacy_say_so(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path, sizes=(40,))
    Site(site, simulated=True).answer(instruction(toy_config({"privacy.name": "none"})))
    words = Words(page_of(site)).text
    assert "This is a simulated site." in words
    assert "epsilon is infinite" in words
    assert "in runs with privacy, and in no others, with random noise" in words
    assert run(["client", "receipts", str(site), "--json"]) == 0
    assert run(["client", "ledger", str(site)]) == 0


def test_a_simulated_site_without_a_limit_still_shows_what_was_spent(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path, sizes=(40,))
    Site(site, simulated=True).answer(instruction(toy_config(CHEAP)))
    words = Words(page_of(site)).text
    assert "no limit" in words
    assert "epsilon is infinite" not in words
    assert f"{receipts(ledger_of(site))[0].epsilon_after:.4g}" in words
    assert "below one divided by the number of records" not in words


def test_the_page_is_written_whole_and_for_its_owner(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["client", "receipts", "klinik", "--html", "out.html"]) == 0
    out, err = capsys.readouterr()
    assert out == "out.html\n"
    assert "open it in a browser" in err
    assert stat.S_IMODE(Path("out.html").stat().st_mode) == 0o600
    assert Words(Path("out.html").read_text()).text
    assert run(["client", "receipts", "klinik", "--html", "out.html", "--json"]) == 0  # a newer one takes its place
    assert json.loads(capsys.readouterr().out)["html"] == "out.html"
    assert run(["client", "receipts", "klinik", "--html", "absent/out.html"]) == 2
    assert run(["client", "receipts", "klinik", "--html", "klinik"]) == 2
