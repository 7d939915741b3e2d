"""The round loop: order of charge and message, who stops a run and how it is named, and resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from toy_federation import PROMPTS, make_run, make_sites, toy_config

import client.site
import server.app
from client.app import make_app
from server.cohort import Cohort
from server.rounds import Outcome, run_rounds
from server.training import ServerTraining
from shared.config import RunConfig
from shared.errors import BudgetExhausted, FederationError, ProtocolError
from shared.observer import SilentObserver
from shared.privacy.plan import make_plan
from shared.records import Refusal, RefusalCode, decode_reply, encode_reply
from shared.rundir import RunDirectory
from shared.text import build_encoder
from simulations.engines import LocalGrid, run_local

NOT_PRIVATE = {"privacy.name": "none", "federation.rounds": 2}  # no noise to calibrate: quick
WARM = {"warm-start.enabled": True, "warm-start.steps": 3, "privacy.target-epsilon": 1.0}  # priced quicker


class Watcher(SilentObserver):
    """Remembers, and raises after round `stop_after` as Ctrl-C does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rounds: list[int] = []
        self.warm_steps: list[tuple[int, int]] = []
        self.stop_after = stop_after

    def on_warm_start(self, step: int, steps: int) -> None:
        self.warm_steps.append((step, steps))

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        self.rounds.append(server_round)
        if server_round == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def sites_of_other_tests_are_forgotten():
    yield
    client.site._SITES.clear()


@pytest.fixture
def site_dirs(tmp_path: Path) -> list[Path]:
    return make_sites(tmp_path / "sites")


def run(path: Path, config: RunConfig, site_dirs: list[Path], observer: Watcher | None = None) -> Outcome:
    rundir = RunDirectory.resume(path) if RunDirectory.exists(path) else make_run(path, config)
    with rundir:
        return run_local(
            config, site_dirs=site_dirs, rundir=rundir, prompts=PROMPTS, observer=observer or Watcher()
        )


def serve(grid: LocalGrid, rundir: RunDirectory) -> Outcome:
    observer = SilentObserver()
    return server.app.serve(Cohort(grid, rundir.config.federation, observer), rundir, observer)


def charges(path: Path) -> list[tuple[int, int, int]]:
    lines = [json.loads(line) for line in (path / "spent.jsonl").read_text().splitlines()]
    return [(line["server_round"], line["attempt"], line["steps"]) for line in lines]


# ---- a run


@pytest.mark.parametrize("local_steps", [1, 3])
def test_a_run_takes_and_charges_every_round_once(local_steps: int, site_dirs: list[Path], tmp_path: Path):
    config, watcher = toy_config({"privacy.name": "none", "federation.local-steps": local_steps}), Watcher()
    outcome = run(tmp_path / "run", config, site_dirs, watcher)
    assert (outcome.rounds, outcome.steps_charged) == (4, 4 * local_steps)
    assert charges(tmp_path / "run") == [(n, 1, local_steps) for n in (1, 2, 3, 4)]
    assert watcher.rounds == [1, 2, 3, 4]
    with RunDirectory.open(tmp_path / "run") as rundir:
        assert [event["server_round"] for event in rundir.events()] == [1, 2, 3, 4]


def test_the_warm_start_comes_first_and_takes_no_steps(site_dirs: list[Path], tmp_path: Path):
    config, watcher = toy_config(WARM), Watcher()
    run(tmp_path / "run", config, site_dirs, watcher)
    assert watcher.rounds == [0, 1, 2, 3, 4]
    assert watcher.warm_steps == [(1, 3), (2, 3), (3, 3)]
    assert charges(tmp_path / "run")[:2] == [(0, 1, 0), (1, 1, 1)]


def test_the_charge_is_on_disk_before_an_instruction_leaves(site_dirs: list[Path], tmp_path: Path):
    seen: list[list[tuple[int, int, int]]] = []

    class Looking(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            seen.append(charges(tmp_path / "run"))
            return super().push_messages(messages)

    config = toy_config(NOT_PRIVATE)
    with make_run(tmp_path / "run", config) as rundir, Looking(make_app(site_dirs), sites=2, parallel_sites=1) as grid:
        serve(grid, rundir)
    assert seen == [[(1, 1, 1)], [(1, 1, 1), (2, 1, 1)]]


def test_nothing_of_a_site_s_captions_is_in_the_run_directory(tmp_path: Path):
    folders = make_sites(tmp_path / "sites")
    for folder in folders:
        with np.load(folder / "data.npz") as data:
            arrays = dict(data)
        np.savez(folder / "data.npz", **{**arrays, "class_names": np.array(["hemangioma", "melanoma", "nevus"])})
    run(tmp_path / "run", toy_config(WARM), folders)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        assert not any(word in path.read_bytes() for word in (b"hemangioma", b"melanoma", b"nevus")), path


def test_evaluation_comes_every_few_rounds_and_after_the_last(site_dirs: list[Path], tmp_path: Path):
    config, evaluated = toy_config({**NOT_PRIVATE, "federation.rounds": 5, "evaluation.every": 2}), list[int]()
    rounds_with(tmp_path, config, LocalGrid(make_app(site_dirs), sites=2, parallel_sites=2), evaluate=evaluated.append)
    assert evaluated == [2, 4, 5]


# ---- interruption


@pytest.mark.parametrize(
    "stop_after", [0, 2, 4, *(pytest.param(later, marks=pytest.mark.slow) for later in (1, 3))]
)
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(stop_after: int, site_dirs: list[Path], tmp_path: Path):
    config = toy_config(WARM)
    undisturbed = run(tmp_path / "a", config, site_dirs)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", config, site_dirs, Watcher(stop_after))
    client.site._SITES.clear()  # as in a new process
    assert run(tmp_path / "b", config, site_dirs) == undisturbed
    assert (tmp_path / "a/events.jsonl").read_bytes() == (tmp_path / "b/events.jsonl").read_bytes()


def test_a_round_whose_replies_were_lost_is_charged_again(site_dirs: list[Path], tmp_path: Path):
    class Losing(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            if len(charges(tmp_path / "b")) == 4:
                raise KeyboardInterrupt
            return super().pull_messages(message_ids)

    config = toy_config(WARM)
    undisturbed = run(tmp_path / "a", config, site_dirs)
    grid = Losing(make_app(site_dirs), sites=2, parallel_sites=2)
    with make_run(tmp_path / "b", config) as rundir, grid, pytest.raises(KeyboardInterrupt):
        serve(grid, rundir)
    resumed = run(tmp_path / "b", config, site_dirs)
    assert resumed.digest == undisturbed.digest
    assert charges(tmp_path / "b") == [(0, 1, 0), (1, 1, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1), (4, 1, 1)]
    assert resumed.steps_charged == 5


def test_a_run_that_used_up_its_slack_stops(site_dirs: list[Path], tmp_path: Path):
    config = toy_config({"privacy.name": "none", "privacy.retry-slack": 1})
    with make_run(tmp_path / "run", config) as rundir:
        for _ in range(2):
            rundir.charge(1, steps=1, reserved_steps=5)
    with pytest.raises(BudgetExhausted, match="round 4"):
        run(tmp_path / "run", config, site_dirs)
    assert len(charges(tmp_path / "run")) == 5  # what was refused was not charged


def test_a_warm_start_with_fresh_noise_is_never_asked_for_in_two_ways(site_dirs: list[Path], tmp_path: Path):
    config = toy_config({"privacy.name": "none", "warm-start.enabled": True})
    rundir = RunDirectory.create(tmp_path / "run", config=config, prompts=PROMPTS.texts, entropy="system")
    with rundir, LocalGrid(make_app(site_dirs), sites=2, parallel_sites=2) as grid:
        rundir.charge(0, steps=0, reserved_steps=9)
        with pytest.raises(BudgetExhausted, match="warm start"):
            serve(grid, rundir)


# ---- sites that do not answer as they should

Answer = Callable[[Message, Context], Message]


def rounds_with(tmp_path: Path, config: RunConfig, grid: LocalGrid, **settings: Any) -> Outcome:
    plan, encoder = make_plan(config), build_encoder(config.text)
    with make_run(tmp_path / "run", config) as rundir, grid:
        return run_rounds(
            Cohort(grid, config.federation, SilentObserver()), config=config, plan=plan,
            training=ServerTraining(config, plan, PROMPTS, encoder), rundir=rundir, prompts=PROMPTS,
            observer=SilentObserver(), **settings,
        )  # fmt: skip


def second_site(site_dirs: list[Path], answer: Callable[[Answer, Message, Context], Message]) -> LocalGrid:
    """A grid whose second site answers as told; `answer` is given the real app."""
    real = make_app(site_dirs)

    def app(message: Message, context: Context) -> Message:
        return real(message, context) if context.node_config["partition-id"] == 0 else answer(real, message, context)

    return LocalGrid(app, sites=2, parallel_sites=2)


@pytest.mark.parametrize("code", list(RefusalCode))
def test_a_refusing_site_stops_the_run_under_its_name_and_code(
    code: RefusalCode, site_dirs: list[Path], tmp_path: Path
):
    grid = second_site(site_dirs, lambda _, m, c: Message(encode_reply(Refusal("klinik", code)), reply_to=m))
    with pytest.raises(FederationError, match=f"round 1: site klinik refused with code '{code}'"):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), grid)
    assert charges(tmp_path / "run") == [(1, 1, 1)]


@pytest.mark.parametrize("code", list(RefusalCode))
def test_a_run_goes_on_without_a_site_that_refuses_while_enough_answer(
    code: RefusalCode, site_dirs: list[Path], tmp_path: Path
):
    asked: list[str] = []

    def answer(real: Answer, message: Message, context: Context) -> Message:
        asked.append(message.metadata.group_id)
        return Message(encode_reply(Refusal("klinik", code)), reply_to=message)

    config = toy_config({**NOT_PRIVATE, "federation.fewest-sites": 1})
    assert rounds_with(tmp_path, config, second_site(site_dirs, answer)).rounds == 2
    assert asked == ["1"]  # and is not asked again
    with RunDirectory.open(tmp_path / "run") as rundir:
        assert rundir.sites_left() == {"klinik": {"server_round": 1, "code": code.value}}
        assert set(rundir.heads()) == {"site-0"}


def test_the_run_without_a_site_is_divided_by_the_sites_that_answered(site_dirs: list[Path], tmp_path: Path):
    """One of two sites alone gives the weights of a federation of that one site with half the published records."""
    refuses = second_site(site_dirs, lambda _, m, c: Message(encode_reply(Refusal("b", RefusalCode.SITE)), reply_to=m))
    rounds_with(tmp_path / "a", toy_config({**NOT_PRIVATE, "federation.fewest-sites": 1}), refuses)
    shutil.rmtree(site_dirs[0] / "lineages")
    make_site_again = make_sites(tmp_path / "again", sizes=(40,))
    alone = toy_config({**NOT_PRIVATE, "federation.sites": 1, "federation.published-records": 32})
    rounds_with(tmp_path / "b", alone, LocalGrid(make_app(make_site_again), sites=1, parallel_sites=1))
    events = [(tmp_path / name / "run/events.jsonl").read_bytes() for name in ("a", "b")]
    assert events[0] == events[1]


def test_a_site_that_was_set_back_is_noticed_by_a_server_that_remembers(site_dirs: list[Path], tmp_path: Path):
    config = toy_config({"privacy.name": "none", "compute.checkpoint-every": 1})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", config, site_dirs, Watcher(1))
    kept = tmp_path / "kept"
    shutil.copytree(site_dirs[1], kept)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", config, site_dirs, Watcher(2))
    shutil.rmtree(site_dirs[1])  # the whole site as it was a round ago: ledger, anchor and all
    shutil.copytree(kept, site_dirs[1])
    client.site._SITES.clear()
    with pytest.raises(FederationError, match="site-1 refused with code 'site'"):
        run(tmp_path / "run", config, site_dirs)
    assert "does not have" in (site_dirs[1] / "site.log").read_text()


def test_a_failing_site_stops_the_run_and_its_text_is_not_repeated(site_dirs: list[Path], tmp_path: Path):
    error = Error(code=8, reason="<class 'ValueError'>:<'a photo of a red'>")
    grid = second_site(site_dirs, lambda _, m, c: Message(error, reply_to=m))
    with pytest.raises(FederationError, match="round 1: node 1002 did not answer: its client app died") as caught:
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), grid)
    assert "photo" not in f"{caught.value.message} {caught.value.hint}"


def test_a_site_that_failed_later_is_named_as_it_named_itself(site_dirs: list[Path], tmp_path: Path):
    def answer(real: Answer, message: Message, context: Context) -> Message:
        return real(message, context) if message.metadata.group_id == "1" else Message(Error(5), reply_to=message)

    with pytest.raises(FederationError, match="round 2: site site-1 did not answer: its node is not reachable"):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), second_site(site_dirs, answer))


def test_an_app_that_raises_is_an_error_reply_as_in_flower(site_dirs: list[Path], tmp_path: Path):
    def answer(real: Answer, message: Message, context: Context) -> Message:
        raise RuntimeError("secret")

    with pytest.raises(FederationError, match="its client app raised"):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), second_site(site_dirs, answer))


def test_a_silent_site_stops_the_run_at_the_deadline(site_dirs: list[Path], tmp_path: Path):
    class Silent(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [m for m in super().pull_messages(message_ids) if m.metadata.src_node_id == 1001]

    grid = Silent(make_app(site_dirs), sites=2, parallel_sites=2)
    with pytest.raises(FederationError, match="round 1: no reply from node 1002 within 2 s"):
        rounds_with(tmp_path, toy_config({**NOT_PRIVATE, "federation.deadline-seconds": 2.0}), grid)


def test_late_second_and_foreign_replies_are_ignored(site_dirs: list[Path], tmp_path: Path):
    class Repeating(LocalGrid):
        """Hands out everything twice, and everything of earlier rounds again."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.all: list[Message] = []

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            fresh = super().pull_messages(message_ids)
            self.all += fresh
            return [*self.all, *fresh, *fresh]

    app, config = make_app(site_dirs), toy_config(NOT_PRIVATE)
    plain = rounds_with(tmp_path / "a", config, LocalGrid(app, sites=2, parallel_sites=2))
    repeated = rounds_with(tmp_path / "b", config, Repeating(app, sites=2, parallel_sites=2))
    assert repeated == plain


def test_a_reply_of_another_round_is_refused(site_dirs: list[Path], tmp_path: Path):
    first: list[Any] = []

    def answer(real: Answer, message: Message, context: Context) -> Message:
        first.append(decode_reply(real(message, context).content))
        return Message(encode_reply(first[0]), reply_to=message)  # a replay of round 1 in round 2

    with pytest.raises(ProtocolError, match="answers round 1"):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), second_site(site_dirs, answer))


def test_two_nodes_under_one_name_are_refused(site_dirs: list[Path], tmp_path: Path):
    grid = LocalGrid(make_app([site_dirs[0], site_dirs[0]]), sites=2, parallel_sites=1)
    with pytest.raises(ProtocolError, match="two nodes answer as this site"):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), grid)


def test_a_node_that_changes_its_name_is_refused(tmp_path: Path):
    folders = make_sites(tmp_path / "sites", sizes=(20, 20, 20))

    def answer(real: Answer, message: Message, context: Context) -> Message:
        context.node_config["partition-id"] = int(message.metadata.group_id)
        return real(message, context)

    with pytest.raises(ProtocolError, match="site site-1 answers as site site-2"):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), second_site(folders, answer))


def test_a_reply_that_is_none_names_its_site(site_dirs: list[Path], tmp_path: Path):
    grid = second_site(site_dirs, lambda _, m, c: Message(m.content, reply_to=m))
    with pytest.raises(ProtocolError, match="round 1: node 1002: "):
        rounds_with(tmp_path, toy_config(NOT_PRIVATE), grid)


@pytest.mark.parametrize("present", [1, 3])
def test_another_number_of_sites_than_the_plan_s_is_refused(present: int, tmp_path: Path):
    grid = LocalGrid(make_app(make_sites(tmp_path / "sites", sizes=(9,) * present)), sites=present, parallel_sites=1)
    with pytest.raises(FederationError, match=f"{present} sites are there, federation.sites says 2"):
        rounds_with(tmp_path, toy_config({**NOT_PRIVATE, "federation.deadline-seconds": 0.3}), grid)
    assert not (tmp_path / "run/spent.jsonl").exists()  # nobody was asked, so nothing is charged
