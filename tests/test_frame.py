"""The test frame itself: what may skip, what a warning does, which tests run by default, one version everywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from conftest import LONGEST
from packaging.requirements import Requirement

import shared

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


SUITE = {
    "unlisted_skip": "def test_it():\n    pytest.skip('no time today')",
    "unlisted_mark": "@pytest.mark.skip(reason='no time today')\ndef test_it(): ...",
    "missing_module": "pytest.importorskip('a_module_that_is_missing')\ndef test_it(): ...",
    "listed_skip": "def test_it():\n    pytest.skip('needs a CUDA device')",
    "expected_failure": "@pytest.mark.xfail(reason='known')\ndef test_it():\n    raise OSError",
    "unexpected_pass": "@pytest.mark.xfail(reason='known')\ndef test_it(): ...",
    "warning": "def test_it():\n    warnings.warn('old', DeprecationWarning)",
    "misspelt_marker": "@pytest.mark.slwo\ndef test_it(): ...",
    "slow": "@pytest.mark.slow\ndef test_it(): ...",
    "plain": "def test_it(): ...",
}


def outcomes(folder: Path, *arguments: str) -> dict[str, str]:
    """Runs `SUITE` under this repository's pytest settings and conftest; `{"plain": "PASSED", ...}`."""
    (folder / "tests").mkdir(exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests/conftest.py", folder / "tests")
    for name, test in SUITE.items():
        (folder / f"tests/test_{name}.py").write_text(f"import warnings\nimport pytest\n{test}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-rA"]
    result = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    found = re.findall(r"^([A-Z]{4,}) .*?tests/test_(\w+)\.py", result.stdout, flags=re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_only_listed_skips_and_expected_failures_do_not_fail_a_session(tmp_path: Path) -> None:
    assert outcomes(tmp_path) == {
        "unlisted_skip": "FAILED",
        "unlisted_mark": "ERROR",
        "missing_module": "ERROR",
        "listed_skip": "SKIPPED",
        "expected_failure": "XFAIL",
        "unexpected_pass": "FAILED",
        "warning": "FAILED",
        "misspelt_marker": "ERROR",
        "plain": "PASSED",
    }


def test_slow_tests_run_when_they_are_asked_for(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "-m", "slow")
    assert (found["slow"], "plain" in found) == ("PASSED", False)


def test_the_files_that_begin_first_are_there_and_no_option_puts_them_elsewhere() -> None:
    # A name that is gone would be passed over, and pytest-xdist puts files with many tests first.
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
    assert "--dist loadfile --no-loadscope-reorder" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_version_is_one_in_code_and_project() -> None:
    assert PYPROJECT["project"]["version"] == shared.__version__


def test_constraints_pin_every_package_that_is_asked_for_within_its_range() -> None:
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in map(Requirement, asked):
        assert pins[requirement.name.lower()] in requirement.specifier, requirement


def test_constraints_admit_every_build_of_a_version_and_name_no_host() -> None:
    # A local part such as `+cpu` would refuse the CUDA build of the same version.
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("+" not in pin and "@" not in pin and "/" not in pin for pin in pins)
