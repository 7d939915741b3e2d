"""What every test runs under: one thread, no telemetry, its own Flower home, and no silent skips.

Environment variables are set before anything heavy is imported, since torch and Flower read them once.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Generator

import pytest
from hypothesis import settings

# A skip is a hole in the promise that CI keeps, so each reason that is acceptable stands here with its why.
ALLOWED_SKIPS = {
    "needs chromium": "not every machine has a browser; CI fails without, and `.ci/run` installs it",
    "needs a CUDA device": "CI has none; the same tests run on the CPU",
    "needs nftables": "not every system has them, or lets anybody load rules; `.ci/run` installs them",
    "needs user namespaces": "some kernels forbid them; a record of calls shows the same, in a test beside it",
}

FLOWER_HOME = tempfile.mkdtemp(prefix="fedcanvas-flower-")
atexit.register(shutil.rmtree, FLOWER_HOME, ignore_errors=True)

os.environ.update(
    OMP_NUM_THREADS="1",  # bit-equal results need a fixed number of threads; two test processes share two cores
    MPLBACKEND="Agg",
    HF_HUB_OFFLINE="1",  # no test downloads anything
    FLWR_HOME=FLOWER_HOME,
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
)

# A time limit for an example fails on a busy machine; a fixed derivation fails the same way everywhere.
settings.register_profile("fedcanvas", deadline=None, derandomize=True, database=None)
settings.load_profile("fedcanvas")

# A file stays in one process, for what its tests share: a long one that began last would run alone. The longest first.
LONGEST = (
    "test_kills.py", "test_deployed_federation.py", "test_simulate.py", "test_arithmetic.py", "test_engines.py",
    "test_page.py", "test_hospital_network.py", "test_site_processes.py", "test_site_certificates.py",
    "test_client_deployment.py", "test_planner.py", "test_evaluate.py", "test_rounds.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    torch = sys.modules.get("torch")  # tests that need no torch do not wait for its import
    if torch is not None:
        torch.set_num_threads(1)  # a test before may have set another number


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield  # a whole module that skips itself, for example by importorskip
    if report.skipped:
        fail_unexpected_skip(report)
    return report


def fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip whose reason is not in `ALLOWED_SKIPS` into a failure."""
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if reason.removeprefix("Skipped: ") not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"unexpected skip: {reason} (reasons that may skip stand in tests/conftest.py)"
