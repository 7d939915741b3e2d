"""Crashes, power cuts, full disks, forged lines and copies: in none is spend under-counted, and each has a way out.

Oracles: the lines of the file, read with `json` and `hashlib` alone (`check_chain`), and the calls that a round really
makes (`os.write`, `os.fsync`, `os.replace`, ...), counted one by one, so that a new step of a round is a new case here.
A process that is killed is one of its own (`Machine`); a power cut keeps only what the recorded calls made durable.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_site import CONFIG, OPEN, instruction, round_of
from toy_federation import make_sites, toy_policy

import client.site
import shared.privacy.ledger as module
from client.site import Site, SiteConfig, SiteRefusal
from shared.data import open_dataset
from shared.errors import LedgerError
from shared.privacy.budget import Lifetime, Price
from shared.privacy.ledger import Ledger, Lineage, RunTerms
from shared.privacy.plan import PrivacyPlan
from shared.records import RefusalCode, RoundInstruction

ROOT = Path(__file__).resolve().parents[1]
LEDGER, REPLY = "lineages/of-site-0/ledger.jsonl", "replies/run.reply"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed site that was asked for nothing yet; its data are decoded already. Tests copy it."""
    (site,) = make_sites(tmp_path_factory.mktemp("faults"), sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    open_dataset(site / "data.npz", config=CONFIG.data, cache_dir=site / "cache")
    return site


@pytest.fixture
def site(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "site-0")


def answer(site: Path, asked: RoundInstruction) -> bytes:
    """By a process that was started anew."""
    return Site(site, simulated=False).answer(asked).envelope


def refusal_of(site: Path, asked: RoundInstruction) -> SiteRefusal:
    with pytest.raises(SiteRefusal) as refusal:
        answer(site, asked)
    return refusal.value


def check_chain(path: Path) -> list[dict[str, Any]]:
    """The entries of a ledger's whole lines, once each is what its hash and the line before say."""
    entries, previous = [], "0" * 64
    for place, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        entry = json.loads(line)
        digest = hashlib.sha256(line.split(b",", 1)[1]).hexdigest()
        assert (entry["hash"], entry["previous"], entry["seq"]) == (digest, previous, place)
        entries.append(entry)
        previous = digest
    return entries


def count(site: Path, kind: str, run: str = "run") -> int:
    """Entries of a kind in the ledger as it lies there, unfinished lines left out."""
    return sum(e["kind"] == kind and e.get("run", run) == run for e in check_chain(site / LEDGER))


def stored(site: Path, asked: RoundInstruction) -> bytes | None:
    if not (site / REPLY).exists():
        return None
    header, _, envelope = (site / REPLY).read_bytes().partition(b"\n")
    return envelope if json.loads(header)["instruction"] == asked.digest else None


def check_after_a_fault(site: Path, asked: RoundInstruction, *, left: int, charged_before: int) -> None:
    """What holds at whatever point a round was cut off, when `left` replies of the run had left by then."""
    whole_lines = (site / LEDGER).read_bytes().rpartition(b"\n")[0] + b"\n"
    torn = (site / LEDGER).read_bytes()[len(whole_lines) :]
    charges = sum(b'"kind":"charge"' in line for line in whole_lines.split(b"\n"))
    assert charges >= left, "a reply left that nothing was charged for"
    assert charges <= charged_before + 1
    kept = stored(site, asked)
    assert kept is None or charges > 0
    again = answer(site, asked)
    entries = check_chain(site / LEDGER)
    if kept is not None:
        assert again == kept
    # Asked again it is charged again, unless its bytes had been kept.
    assert count(site, "charge") == charges + (kept is None)
    # A line that was cut off is taken out, and that stands in the ledger.
    repairs = [entry for entry in entries if entry["kind"] == "repaired"]
    assert [entry["cut_sha256"] for entry in repairs] == ([hashlib.sha256(torn).hexdigest()] if torn else [])
    later = round_of(asked.server_round + 1)
    assert answer(site, later) != again
    spent = sum(entry["steps"] for entry in check_chain(site / LEDGER) if entry["kind"] == "charge")
    (run,) = (entry for entry in entries if entry["kind"] == "run")
    assert spent <= run["plan"]["reserved_steps"] == 7


# ---- the steps of a round


@dataclass
class Step:
    """One call by which a round changes the disk, or the beginning or end of training."""

    number: int
    name: str
    path: str
    make: Callable[[], Any] = lambda: None
    content: bytes = b""  # of a write

    def write_a_part(self) -> None:
        with open(self.path, "ab") as file:
            file.write(self.content[: len(self.content) // 2])


class Steps:
    """Calls `at` in place of each step, in order; it makes the step, or not."""

    NAMES = ("open", "write", "fsync", "replace", "ftruncate", "truncate", "mkdir", "unlink")

    def __init__(self, at: Callable[[Step], Any]) -> None:
        self.at, self.taken, self.inside = at, 0, False

    def _next(self, name: str, path: str = "", **more: Any) -> Any:
        self.taken, self.inside = self.taken + 1, True
        try:
            return self.at(Step(self.taken, name, path, **more))
        finally:
            self.inside = False

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self.inside:  # of `at` itself
                return real(*args, **named)
            if isinstance(args[0], int):
                path = os.readlink(f"/proc/self/fd/{args[0]}")
            else:
                path = os.path.abspath(args[1] if name == "replace" else args[0])
            # No spend depends on these; and a folder is opened to read it, when it is fsynced.
            if re.search("/cache(/|$)|/lock$|/site.log$", path) or (name == "open" and not args[1] & os.O_CREAT):
                return real(*args, **named)
            content = bytes(args[1]) if name == "write" else b""
            return self._next(name, path, make=lambda: real(*args, **named), content=content)

        return call

    def _around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def training(*args: Any, **named: Any) -> Any:
            self._next("train")
            payload = real(*args, **named)
            self._next("trained")
            return payload

        return training

    @contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self.NAMES:
                patch.setattr(os, name, self._wrap(name, getattr(os, name)))
            patch.setattr(client.site, "site_gradient", self._around(client.site.site_gradient))
            yield


def steps_of(site: Path, asked: RoundInstruction) -> list[str]:
    """Of a round that nothing disturbs, by name and file."""
    seen: list[str] = []

    def at(step: Step) -> Any:
        seen.append(f"{step.name} {os.path.relpath(step.path, site) if step.path else ''}".strip())
        return step.make()

    with Steps(at).watched():
        answer(site, asked)
    return seen


def test_what_is_counted_is_on_disk_before_what_it_allows(site: Path) -> None:
    answer(site, round_of(1))
    entry = [
        f"open {LEDGER}", f"write {LEDGER}", f"fsync {LEDGER}", "open anchor.json.tmp", "write anchor.json.tmp",
        "fsync anchor.json.tmp", "replace anchor.json", "fsync .",
    ]  # fmt: skip
    reply = [
        f"open {REPLY}.tmp", f"write {REPLY}.tmp", f"fsync {REPLY}.tmp", f"replace {REPLY}", "fsync replies",
    ]  # fmt: skip
    assert steps_of(site, round_of(2)) == [*entry, "train", "trained", *reply, *entry]


def test_the_first_round_of_a_run_is_reserved_on_disk_before_it_is_charged(site: Path) -> None:
    steps = steps_of(site, round_of(1))
    assert steps[: steps.index("train")].count(f"fsync {LEDGER}") == 2
    # The folder of the replies is new, and a name that is not on disk is lost with all that lies under it.
    assert steps[steps.index("trained") + 1 :][:2] == ["mkdir replies", "fsync ."]
    kinds = [entry["kind"] for entry in check_chain(site / LEDGER)]
    assert kinds == ["opened", "run", "charge", "commit"]


def test_a_new_ledger_and_all_folders_above_it_are_on_disk_before_anybody_relies_on_it(tmp_path: Path) -> None:
    seen = []

    def at(step: Step) -> Any:
        seen.append(f"{step.name} {os.path.relpath(step.path, tmp_path)}")
        return step.make()

    with Steps(at).watched():
        Ledger.create(tmp_path / "state/store/scans", Lineage("scans", "example", Lifetime(8.0, 1e-5)))
    for folder in ("state", "state/store", "state/store/scans"):
        assert f"fsync {os.path.normpath(os.path.join(folder, os.pardir))}" in seen[seen.index(f"mkdir {folder}") :]
    file = "state/store/scans/ledger.jsonl"
    assert seen[seen.index(f"write {file}") :] == [f"write {file}", f"fsync {file}", "fsync state/store/scans"]


# ---- killed


class Machine:
    """A process of its own that answers, and forks itself for every case: nobody waits for torch a hundred times."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def do(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(what, default=str), file=self.process.stdin, flush=True)
        answered = self.process.stdout.readline()
        assert answered, "the machine died"
        result: dict[str, Any] = json.loads(answered)
        return result


@pytest.fixture(scope="module")
def machine(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine()
    machine.do(do="warm up", site=shutil.copytree(pristine, tmp_path_factory.mktemp("machine") / "site-0"))
    yield machine
    machine.process.communicate(timeout=60)


def serve() -> None:
    """The machine's side: one JSON line asks, one answers."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        what = json.loads(line)
        if what["do"] == "warm up":  # what is loaded and priced here need not be in every child
            print(json.dumps({"said": answer(Path(what["site"]), round_of(1)).hex()}), flush=True)
            continue
        site, reading, writing = Path(what["site"]), *os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with contextlib.suppress(BaseException):  # whatever happens, this is the child, and it ends here
                in_a_child(site, what, writing)
            os._exit(0)
        os.close(writing)
        if what["do"] == "hold":
            said = os.read(reading, 100)  # it goes on; whoever asked ends it
            print(json.dumps({"pid": pid, "said": said.decode()}), flush=True)
            continue
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"killed": killed, "said": said.decode()}), flush=True)


def in_a_child(site: Path, what: dict[str, Any], writing: int) -> None:
    if what["do"] == "hold":
        with Ledger(site / "lineages/of-site-0").locked():
            os.write(writing, b"held")
            time.sleep(120)
        return
    asked = round_of(what["round"])
    if what["do"] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (what["size"], what["size"]))
        try:
            said = answer(site, asked).hex()
        except SiteRefusal as refusal:
            said = f"refused: {refusal.code}: {refusal.reason}"
        os.write(writing, said.encode())
        return

    def at(step: Step) -> Any:
        if step.number == what["step"]:
            if what["half"]:
                step.write_a_part()
            os.kill(os.getpid(), signal.SIGKILL)
        return step.make()

    with Steps(at).watched():
        envelope = answer(site, asked)
    os.write(writing, envelope.hex().encode())


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_round_that_is_killed_at_any_of_its_steps_is_never_under_counted(
    first: int, pristine: Path, machine: Machine, tmp_path: Path
) -> None:
    """`first` = 1: with the reservation of the run; 2: with a reply of the run before it."""
    begun = shutil.copytree(pristine, tmp_path / "begun")
    if first == 2:
        answer(begun, round_of(1))
    names = steps_of(shutil.copytree(begun, tmp_path / "whole"), round_of(first))
    assert "train" in names
    # Before each step, in the middle of each write, and after the last step.
    cases = [
        (number, half) for number, name in enumerate(names, 1) for half in (False, True) if not half or "write" in name
    ]
    for number, half in [*cases, (len(names) + 1, False)]:
        site = shutil.copytree(begun, tmp_path / f"{number}-{half}")
        result = machine.do(do="round", site=site, round=first, step=number, half=half)
        over = number > len(names)
        assert result["killed"] == (0 if over else signal.SIGKILL)
        assert bool(result["said"]) == over
        assert not over or bytes.fromhex(result["said"]) == stored(site, round_of(first))
        left = (first - 1) + over
        check_after_a_fault(site, round_of(first), left=left, charged_before=first - 1)
        shutil.rmtree(site)


def test_a_second_process_is_refused_with_the_number_of_the_first_and_a_killed_one_holds_nothing(
    site: Path, machine: Machine
) -> None:
    held = machine.do(do="hold", site=site)
    assert held["said"] == "held"
    ledger = Ledger(site / "lineages/of-site-0")
    try:
        with (
            pytest.raises(LedgerError, match=f"in use by process {held['pid']}$") as refused,
            ledger.locked(wait_seconds=0.1),
        ):
            pass
        assert "died is free by itself" in str(refused.value.hint)
        assert Ledger(site / "lineages/of-site-0").head == ledger.head  # reading needs no lock
    finally:
        os.kill(held["pid"], signal.SIGKILL)
    with ledger.locked(wait_seconds=10.0):  # the kernel frees it as the process ends
        pass
    answer(site, round_of(1))


def test_two_writers_whose_lock_somebody_removed_do_not_break_the_chain(site: Path) -> None:
    answer(site, round_of(1))
    first, second = (Ledger(site / "lineages/of-site-0") for _ in range(2))
    with first.locked():
        (site / "lineages/of-site-0/lock").unlink()  # "a stale lock file"
        with second.locked():
            first.close("run", "by the first")
            with pytest.raises(LedgerError, match="another process has written"):
                second.close("run", "by the second")
    assert check_chain(site / LEDGER)[-1]["reason"] == "by the first"


# ---- power cut


class Disk:
    """What of a folder would survive a power cut: contents as of their last fsync, names as of their folder's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[str, dict[str, int]] = {}
        self._held = []  # so that no inode is used twice
        for folder, _, files in os.walk(root):
            self.names[folder] = self._listed(folder)
            for name in files:
                descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
                self._held.append(descriptor)
                self.contents[os.fstat(descriptor).st_ino] = Path(folder, name).read_bytes()

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    @staticmethod
    def _listed(folder: str) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(folder)}

    def did(self, name: str, path: str) -> None:
        """After a step: what it made durable, or which file appeared."""
        if name == "open":
            self._held.append(os.open(path, os.O_RDONLY))
        elif name == "fsync" and os.path.isdir(path):
            self.names[path] = self._listed(path)
        elif name == "fsync":
            self.contents[os.stat(path).st_ino] = Path(path).read_bytes()

    def write_out(self, target: Path, kind: str) -> None:
        """The folder after the cut.

        Args:
            kind: "lost": nothing that was not made durable is there. "renamed": names are all there, their contents
                are not. "zeros": names and lengths are there, with zeros where contents are not.
        """
        here = {entry.inode(): entry for folder, _, _ in os.walk(self.root) for entry in os.scandir(folder)}

        def copy(folder: str, into: Path) -> None:
            into.mkdir()
            names = self.names.get(folder, {}) if kind == "lost" else self._listed(folder)
            for name, inode in names.items():
                path = os.path.join(folder, name)
                if inode in here and here[inode].is_dir():
                    copy(path, into / name)
                    continue
                content = self.contents.get(inode, b"")
                if kind == "zeros" and inode in here:
                    length = here[inode].stat().st_size
                    content = content[:length] + b"\0" * (length - len(content))
                (into / name).write_bytes(content)

        copy(str(self.root), target)


@pytest.mark.parametrize("kind", ["lost", "renamed", "zeros"])
def test_a_power_cut_at_any_step_of_a_round_is_never_under_counted(kind: str, site: Path, tmp_path: Path) -> None:
    disk, states, trained = Disk(site), [], []
    seen: set[str] = set()

    def cut(name: str) -> None:
        target = tmp_path / f"{kind}-{len(states)}"
        disk.write_out(target, kind)
        files = sorted(path for path in target.rglob("*") if path.is_file() and path.name not in ("lock", "site.log"))
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.relative_to(target)} ".encode() + path.read_bytes())
        if name == "train":
            trained.append(target)
        if digest.hexdigest() in seen and name not in ("train", "left"):
            shutil.rmtree(target)
        else:
            seen.add(digest.hexdigest())
            states.append((name, target))

    def at(step: Step) -> Any:
        if step.name == "train":
            cut(step.name)
        result = step.make()
        if step.path:
            disk.did(step.name, step.path)
            cut(step.name)
        return result

    with Steps(at).watched():
        envelope = answer(site, round_of(1))
    cut("left")
    disk.close()
    assert [count(target, "charge") for target in trained] == [1], "training began before its charge was on disk"
    last = states[-1][1]
    assert (count(last, "charge"), count(last, "commit"), stored(last, round_of(1))) == (1, 1, envelope)
    for name, target in states:
        check_after_a_fault(target, round_of(1), left=int(name == "left"), charged_before=0)


# ---- disks that refuse


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("write", errno.ENOSPC), ("fsync", errno.EIO), ("open", errno.EROFS), ("replace", errno.EROFS),
        ("mkdir", errno.ENOSPC),
    ],
)  # fmt: skip
def test_when_the_disk_refuses_any_step_nothing_leaves_and_nothing_is_under_counted(
    name: str, number: int, pristine: Path, tmp_path: Path
) -> None:
    failed = 0
    for place in range(1, 100):
        site = shutil.copytree(pristine, tmp_path / str(place))
        hits = 0

        def at(step: Step, place: int = place) -> Any:
            nonlocal hits
            hits += step.name == name
            if step.name == name and hits == place:
                if name == "write":
                    step.write_a_part()
                raise OSError(number, os.strerror(number))
            return step.make()

        with Steps(at).watched():
            refusal, envelope = None, b""
            try:
                envelope = answer(site, round_of(1))
            except SiteRefusal as refused:
                refusal = refused
            if refusal is not None:
                failed += 1
                assert refusal.code == RefusalCode.SITE
                assert os.strerror(number) in refusal.reason
                assert "nothing leaves the site until it can" in refusal.reason
                assert not (site / LEDGER).read_bytes().rpartition(b"\n")[2], "a part of a line was left in the ledger"
            else:
                assert envelope == stored(site, round_of(1))
                assert hits < place, "a step failed and a reply left all the same"
                break
        check_after_a_fault(site, round_of(1), left=0, charged_before=0)
        shutil.rmtree(site)
    else:
        pytest.fail("the round has no end")
    assert failed >= {"write": 7, "fsync": 10, "open": 7, "replace": 4, "mkdir": 1}[name]


def test_a_line_that_can_neither_be_finished_nor_taken_back_is_cut_before_the_next_entry(site: Path) -> None:
    answer(site, round_of(1))
    ledger = Ledger(site / "lineages/of-site-0", anchor=site / "anchor.json")

    def at(step: Step) -> Any:
        if step.name == "write":
            step.write_a_part()
        if step.name in ("write", "ftruncate"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return step.make()

    with ledger.locked():
        with Steps(at).watched(), pytest.raises(LedgerError, match="Input/output error"):
            ledger.note("records", reason="lost")
        assert not (site / LEDGER).read_bytes().endswith(b"\n")
        ledger.note("records", reason="kept")  # in the same breath, the disk is well again
    assert [entry["kind"] for entry in check_chain(site / LEDGER)][-2:] == ["repaired", "records"]


def test_a_file_system_that_is_full_is_met_for_real(pristine: Path, machine: Machine, tmp_path: Path) -> None:
    """The kernel cuts the writes here (RLIMIT_FSIZE), in the middle of whatever reaches the limit."""
    size, outcomes = (pristine / LEDGER).stat().st_size, set()
    for place, limit in enumerate([size, size + 7, size + 1200, size + 1900, 3000, 5000, 7000]):
        site = shutil.copytree(pristine, tmp_path / str(place))
        said = machine.do(do="limit", site=site, round=1, size=limit)["said"]
        outcomes.add(said.partition(":")[0] == "refused")
        if said.startswith("refused"):
            assert said.startswith("refused: site: ")
            assert "cannot be written: File too large" in said
        check_after_a_fault(site, round_of(1), left=int(not said.startswith("refused")), charged_before=0)
    assert outcomes == {True, False}


def test_a_site_whose_disk_is_read_only_answers_nothing_and_can_still_be_read(site: Path) -> None:
    answer(site, round_of(1))
    before = (site / LEDGER).read_bytes()

    def at(step: Step) -> Any:
        if step.name.startswith("train"):
            pytest.fail("trained on a disk that cannot hold the charge")
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with Steps(at).watched():
        for asked in (round_of(1), round_of(2)):  # not even what was sent before: that it left again must be noted
            refused = refusal_of(site, asked)
            assert refused.code == RefusalCode.SITE
            assert "Read-only file system" in refused.reason
        assert Ledger(site / "lineages/of-site-0", anchor=site / "anchor.json").runs["run"].charges == 1
    assert (site / LEDGER).read_bytes() == before


# ---- clocks


def test_a_clock_that_was_set_back_changes_neither_order_nor_spend(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(site, round_of(1))
    back = datetime.now(UTC) - timedelta(days=400)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return back

    monkeypatch.setattr(module, "datetime", Clock)
    answer(site, round_of(2))
    entries = check_chain(site / LEDGER)
    assert [entry["kind"] for entry in entries] == ["opened", "run", "charge", "commit", "charge", "commit"]
    times = [entry["time"] for entry in entries]
    assert times == sorted(times)
    assert entries[4]["clock_behind"] == back.isoformat(timespec="milliseconds")
    assert Ledger(site / "lineages/of-site-0").runs["run"].steps == 2


# ---- lines that somebody damaged


PLAN = PrivacyPlan(
    private=True, noise_multiplier=3.0, sampling_rate=0.1, clipping_norm=2.0, expected_batch_size=100.0, steps=40,
    reserved_steps=45, delta=1e-6, warm_start_noise_multiplier=None, unit="example", sites=2,
)  # fmt: skip
TERMS = RunTerms("run", "retina", "c" * 64, "d" * 64, "e" * 64, PLAN)


def spend(ledger: Ledger, *rounds: int) -> None:
    with ledger.locked():
        for server_round in rounds:
            charge = ledger.charge(
                "run", server_round=server_round, attempt=1, release="gradient", steps=1, instruction_digest="a" * 64,
                nonce=os.urandom(16),
            )  # fmt: skip
            ledger.commit(charge, size=9, sha256="b" * 64, fields=[])


def make_ledger(folder: Path, name: str = "scans") -> Ledger:
    """Seven entries, the last one a commit. Simulated: these tests are of lines, not of fsyncs."""
    lineage = Lineage(name, "example", Lifetime(8.0, 1e-5), simulated=True)
    ledger = Ledger.create(folder / "lineage", lineage, anchor=folder / "anchor.json")
    with ledger.locked():
        ledger.reserve(TERMS, Price(1.0, 1e-6, None, ((0, 0.0, 0.0, 0.0), (45, 1.0, 1.0, 1.0))))
    spend(ledger, 1, 2)
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return make_ledger(tmp_path)


def lines_of(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


def reopened(ledger: Ledger, *, anchor: bool = True) -> Ledger:
    return Ledger(ledger.folder, anchor=ledger.anchor if anchor else None)


def set_anchor(ledger: Ledger, seq: int) -> None:
    entry = json.loads(lines_of(ledger)[seq])
    assert ledger.anchor is not None
    ledger.anchor.write_text(json.dumps({"lineage": "scans", "seq": seq, "hash": entry["hash"]}))


def forged(line: bytes, **changes: Any) -> bytes:
    """The line with other values, under its old hash."""
    entry = {**json.loads(line), **changes}
    digest = entry.pop("hash")
    body = json.dumps(entry, separators=(",", ":"), sort_keys=True)[1:]
    return f'{{"hash":"{digest}",{body}\n'.encode()


def rehashed(lines: list[bytes], start: int, *, follow: bool) -> list[bytes]:
    """The lines with the hash of line `start` made anew, and with `follow` the chain of all later ones."""
    lines, previous = list(lines), None
    for place in range(start, len(lines) if follow else start + 1):
        if previous is not None:
            lines[place] = forged(lines[place], previous=previous)
        body = lines[place].rstrip(b"\n").split(b",", 1)[1]
        previous = hashlib.sha256(body).hexdigest()
        lines[place] = b'{"hash":"' + previous.encode() + b'",' + body + b"\n"
    return lines


@pytest.mark.parametrize("damage", ["cut off", "zeros", "zeros and an end of line"])
def test_a_last_line_that_was_being_written_is_cut_at_whatever_byte_and_that_is_noted(
    damage: str, ledger: Ledger
) -> None:
    whole, (last, kept) = ledger.path.read_bytes(), (lines_of(ledger)[-1], len(lines_of(ledger)[-1]))
    rest = whole[:-kept]
    set_anchor(ledger, 4)  # a crash came before the anchor knew of the line
    assert ledger.anchor is not None
    noted = ledger.anchor.read_bytes()
    for offset in range(1, kept - 1):
        torn = last[:offset]
        if damage != "cut off":
            torn += b"\0" * (kept - offset - 1) + (b"\0" if damage == "zeros" else b"\n")
        ledger.path.write_bytes(rest + torn)
        ledger.anchor.write_bytes(noted)
        opened = reopened(ledger)
        assert (opened.runs["run"].charges, opened.runs["run"].commits) == (2, 1)
        if offset % 10 and offset < kept - 2:
            continue  # what comes next costs milliseconds
        spend(opened, 3)
        entries = check_chain(ledger.path)
        assert [entry["kind"] for entry in entries[5:]] == ["repaired", "charge", "commit"]
        assert (entries[5]["cut_bytes"], entries[5]["cut_sha256"]) == (len(torn), hashlib.sha256(torn).hexdigest())


def test_a_line_that_this_site_had_seen_whole_is_never_taken_for_one_that_was_being_written(ledger: Ledger) -> None:
    whole, last = ledger.path.read_bytes(), lines_of(ledger)[-1]
    for offset in range(len(last) - 1):
        for torn in (last[:offset], last[:offset] + b"\0" * (len(last) - offset)):
            ledger.path.write_bytes(whole[: -len(last)] + torn)
            with pytest.raises(LedgerError, match="behind what this site has noted: entry 5 is missing") as refused:
                reopened(ledger)
            assert "restore the newest ledger" in str(refused.value.hint)
    # All but its end of line: the entry is there, and its end is not; it counts as missing as well.
    ledger.path.write_bytes(whole[:-1])
    with pytest.raises(LedgerError, match="behind"):
        reopened(ledger)


def test_a_ledger_cut_short_by_whole_lines_or_put_back_is_refused(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    for kept in range(1, len(lines)):
        ledger.path.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(LedgerError, match="behind what this site has noted"):
            reopened(ledger)
    ledger.path.write_bytes(b"")
    with pytest.raises(LedgerError, match="is empty") as refused:
        reopened(ledger)
    assert "restore it from a copy" in str(refused.value.hint)
    # The way out: the newest copy.
    ledger.path.write_bytes(b"".join(lines))
    assert reopened(ledger).runs["run"].charges == 2


def test_a_process_notices_a_ledger_that_is_set_back_under_it_even_without_an_anchor(ledger: Ledger) -> None:
    opened, lines = reopened(ledger, anchor=False), lines_of(ledger)
    for kept in range(1, len(lines)):
        ledger.path.write_bytes(b"".join(lines[:kept]))
        for _ in range(2):  # it does not get used to it
            with pytest.raises(LedgerError, match="behind"), opened.locked():
                pass
    ledger.path.write_bytes(b"".join(lines))
    with opened.locked():
        assert opened.runs["run"].charges == 2


CHARGE_FIELDS = {
    "kind": "resent", "seq": 3, "time": "2020-01-01T00:00:00.000+00:00", "previous": "f" * 64, "run": "another",
    "server_round": 7, "attempt": 2, "release": "update", "mechanism": "none", "sampling_rate": 0.01,
    "noise_multiplier": 30.0, "clipping_norm": 200.0, "steps": 0, "unit": "subject", "adjacency": "replace",
    "code_digest": "0" * 64, "config_digest": "0" * 64, "instruction_digest": "0" * 64, "nonce": "0" * 32,
}  # fmt: skip


def test_the_fields_that_are_forged_below_are_all_there_are(ledger: Ledger) -> None:
    charge = json.loads(lines_of(ledger)[2])
    assert (charge["kind"], {*charge} - {"hash"}) == ("charge", set(CHARGE_FIELDS))
    assert all(charge[name] != value for name, value in CHARGE_FIELDS.items())


@pytest.mark.parametrize("name", CHARGE_FIELDS)
@pytest.mark.parametrize("effort", ["the line", "its hash too", "all later hashes too"])
def test_a_charge_that_was_edited_is_noticed_whatever_else_was_made_to_fit(
    effort: str, name: str, ledger: Ledger
) -> None:
    lines = lines_of(ledger)
    for place in (2, 4):
        changed = [*lines[:place], forged(lines[place], **{name: CHARGE_FIELDS[name]}), *lines[place + 1 :]]
        if effort != "the line":
            changed = rehashed(changed, place, follow=effort == "all later hashes too")
        ledger.path.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError) as refused:
            reopened(ledger)
        assert "restore the" in str(refused.value.hint)
        if effort == "the line":
            assert f"line {place + 1} of" in refused.value.message


def test_the_last_line_edited_with_its_hash_is_noticed_by_the_anchor(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join(rehashed([*lines[:-1], forged(lines[-1], bytes=1)], len(lines) - 1, follow=True)))
    with pytest.raises(LedgerError, match="behind"):
        reopened(ledger)


def test_who_edits_a_line_all_later_hashes_and_the_anchor_is_not_noticed(ledger: Ledger) -> None:
    """A limit that docs/ledger.md states: a person with write access to both."""
    lines = lines_of(ledger)
    lines[2] = forged(lines[2], steps=0)
    ledger.path.write_bytes(b"".join(rehashed(lines, 2, follow=True)))
    set_anchor(ledger, 5)
    assert reopened(ledger).runs["run"].steps == 1


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 4, 5, 2, 3], [0, 1, 3, 2, 4, 5], [0, 1, 2, 3, 4, 5, 5], [0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 4, 5],
        [0, 1, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 5],
    ],
)  # fmt: skip
def test_lines_that_were_swapped_doubled_or_removed_are_noticed(order: list[int], ledger: Ledger) -> None:
    lines = lines_of(ledger)
    ledger.path.write_bytes(b"".join(lines[place] for place in order))
    for anchor in (True, False):
        with pytest.raises(LedgerError, match=r"line \d of .* was changed or does not follow"):
            reopened(ledger, anchor=anchor)


def test_every_flipped_byte_of_a_ledger_is_noticed(ledger: Ledger) -> None:
    whole = ledger.path.read_bytes()
    for place in range(0, len(whole), 7):
        ledger.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(LedgerError):
            reopened(ledger)


def test_another_lineage_s_ledger_in_its_place_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    for name, word in (("others", "the ledger of 'others'"), ("scans", "behind what this site has noted")):
        (tmp_path / name).mkdir()
        other = make_ledger(tmp_path / name, name)
        shutil.copy(other.path, ledger.path)
        with pytest.raises(LedgerError, match=word):
            reopened(ledger)


@pytest.mark.parametrize("content", [None, "", "no json", "[]", '{"lineage": "scans", "seq": 1}', "\xff"])
def test_a_lost_anchor_stops_the_site_until_a_person_renews_it(content: str | None, ledger: Ledger) -> None:
    assert ledger.anchor is not None
    ledger.anchor.unlink()
    if content is not None:
        ledger.anchor.write_text(content, encoding="latin-1")
    with pytest.raises(LedgerError, match="is missing or damaged") as refused:
        reopened(ledger)
    assert "--renew-anchor" in str(refused.value.hint)
    with reopened(ledger, anchor=False).locked():
        pass
    assert ledger.anchor is not None
    reopened(ledger, anchor=False).renew_anchor(ledger.anchor)
    assert reopened(ledger).runs["run"].charges == 2


@pytest.mark.parametrize("changes", [{"seq": 9}, {"seq": 4}, {"hash": "0" * 64}, {"lineage": "others"}, {"seq": -1}])
def test_an_anchor_that_was_edited_does_not_fit(changes: dict[str, Any], ledger: Ledger) -> None:
    assert ledger.anchor is not None
    anchor = {**json.loads(ledger.anchor.read_text()), **changes}
    if changes == {"seq": -1}:  # a Python list would take it for the last
        anchor["hash"] = json.loads(lines_of(ledger)[0])["hash"]
    ledger.anchor.write_text(json.dumps(anchor))
    with pytest.raises(LedgerError):
        reopened(ledger)


def test_a_ledger_that_is_gone_is_not_begun_anew(site: Path) -> None:
    answer(site, round_of(1))
    shutil.move(site / LEDGER, site / "elsewhere")
    with pytest.raises(LedgerError, match="there is no ledger") as refused:
        Site(site, simulated=False)
    assert "never begin a new one for the same records" in str(refused.value.hint)
    assert not (site / LEDGER).exists()
    shutil.move(site / "elsewhere", site / LEDGER)
    answer(site, round_of(2))


# ---- copies


def of_one_store(tmp_path: Path) -> tuple[Path, Path]:
    """A site whose store is the machine's own, as `fedcanvas client init` makes it, and its ledger."""
    store = tmp_path / "store"
    (site,) = make_sites(tmp_path, sizes=(40,), seed=None, policy=toy_policy(**OPEN), store=str(store))
    return site, store / "of-site-0/ledger.jsonl"


def test_a_copy_of_a_site_s_folder_on_one_machine_spends_from_the_same_account(tmp_path: Path) -> None:
    site, path = of_one_store(tmp_path)
    first = answer(site, round_of(1))
    copy = shutil.copytree(site, tmp_path / "copy")
    assert answer(copy, round_of(1)) == first  # the copy has the reply too: the same bytes, at no cost
    second, of_copy = answer(site, round_of(2)), answer(copy, round_of(2))
    assert second != of_copy
    charges = [entry["server_round"] for entry in check_chain(path) if entry["kind"] == "charge"]
    assert charges == [1, 2, 2]  # fresh noise about the same records is another release
    for server_round in (3, 4):
        answer(site, round_of(server_round))
        answer(copy, round_of(server_round))
    zeros = np.zeros_like(round_of(4).weights)
    for folder in (copy, site):
        assert refusal_of(folder, round_of(4, attempt=2, weights=zeros)).code == RefusalCode.SITE
        assert refusal_of(folder, round_of(1)).code == RefusalCode.MESSAGE
    assert sum(entry["steps"] for entry in check_chain(path) if entry["kind"] == "charge") == 7


def test_a_copy_of_site_and_store_is_noticed_by_a_server_that_remembers(site: Path, tmp_path: Path) -> None:
    answer(site, round_of(1))
    clone = shutil.copytree(site, tmp_path / "clone/site-0")
    head = answer(site, round_of(2))[-32:].hex()
    shown = {"site-0": head}
    before = (clone / LEDGER).read_bytes()
    refused = refusal_of(clone, round_of(3, heads=shown))
    assert refused.code == RefusalCode.SITE
    assert "the server shows a release that this ledger does not have" in refused.reason
    assert (clone / LEDGER).read_bytes() == before
    answer(site, round_of(3, heads=shown))
    # Both answered the same question: the heads differ all the same, and whichever is shown stops the other.
    other = answer(clone, round_of(2))[-32:].hex()
    assert other != head
    assert refusal_of(site, round_of(4, heads={"site-0": other})).code == RefusalCode.SITE
    assert refusal_of(clone, round_of(4, heads=shown)).code == RefusalCode.SITE


def test_a_site_set_back_with_all_it_has_is_noticed_by_a_server_that_remembers(site: Path, tmp_path: Path) -> None:
    answer(site, round_of(1))
    backup = shutil.copytree(site, tmp_path / "backup/site-0")
    shown = {"site-0": answer(site, round_of(2))[-32:].hex()}
    shutil.rmtree(site)
    shutil.copytree(backup, site)
    for server_round in (1, 2, 3):  # not even what is kept leaves again
        assert refusal_of(site, round_of(server_round, heads=shown)).code == RefusalCode.SITE
    assert count(site, "charge") == 1


def test_what_a_machine_alone_cannot_notice(site: Path, tmp_path: Path) -> None:
    """The limits that docs/ledger.md states, so that nobody takes them for kept: PRIVACY rule 27."""
    answer(site, round_of(1))
    clone = shutil.copytree(site, tmp_path / "clone/site-0")
    answer(site, round_of(2))
    # A server that does not show what it remembers: the clone spends what was spent already.
    assert answer(clone, round_of(2))
    # And a new run, of which no head is known yet, is reserved at both: two accounts of one set of records.
    assert answer(clone, instruction(CONFIG, run_id="new"))
    assert answer(site, instruction(CONFIG, run_id="new"))
    for path in (site, clone):
        assert (count(path, "run", "run"), count(path, "run", "new")) == (1, 1)


def test_a_clone_under_another_name_has_another_head_but_no_other_ledger(site: Path, tmp_path: Path) -> None:
    """A server knows sites by their ids: under a new one the clone is a new site to it. Also a stated limit."""
    answer(site, round_of(1))
    clone = shutil.copytree(site, tmp_path / "clone/site-9")
    settings = SiteConfig.read(clone)
    (clone / "site.toml").unlink()
    settings.model_copy(update={"site_id": "site-9"}).write(clone)
    shown = {"site-0": answer(site, round_of(2))[-32:].hex()}
    assert answer(clone, round_of(3, heads=shown))


def test_files_of_a_site_are_its_owner_s_after_faults_too(site: Path) -> None:
    answer(site, round_of(1))
    for path in (LEDGER, REPLY, "anchor.json"):
        assert stat.S_IMODE(os.stat(site / path).st_mode) == 0o600


if __name__ == "__main__":
    serve()
