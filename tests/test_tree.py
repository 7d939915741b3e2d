"""Code of two releases in one process is noticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import shared.tree
from shared import __version__
from shared.errors import FederationError
from shared.tree import check_same_tree, code_digest

RELEASE = Path(__file__).resolve().parents[1]


def test_one_release_in_one_folder_is_accepted():
    assert check_same_tree(shared.tree.__file__) == RELEASE


@pytest.mark.parametrize("name", ["client", "client.app", "shared.config", "server.rounds", "simulations"])
def test_a_module_of_another_folder_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoy = ModuleType(name)
    decoy.__file__ = str(tmp_path / name.replace(".", "/") / "__init__.py")
    monkeypatch.setitem(sys.modules, name, decoy)
    with pytest.raises(FederationError, match=f"module '{name}' comes from {tmp_path}"):
        check_same_tree(shared.tree.__file__)


def test_a_folder_that_is_no_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "client", ModuleType("client"))  # what a folder without __init__.py becomes
    with pytest.raises(FederationError, match="without __init__"):
        check_same_tree(shared.tree.__file__)


def test_a_neighbour_whose_name_begins_like_ours_is_no_concern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = ModuleType("clients")
    other.__file__ = str(tmp_path / "clients.py")
    monkeypatch.setitem(sys.modules, "clients", other)
    assert check_same_tree(shared.tree.__file__) == RELEASE


def test_a_folder_whose_project_file_is_of_another_version_is_refused(tmp_path: Path):
    copy_release(tmp_path, version="9.9.9")
    run = check_in(tmp_path)
    assert f"of version 9.9.9, the code of {__version__}" in run.stderr
    assert run.returncode != 0


def test_an_installed_release_without_project_file_is_accepted(tmp_path: Path):
    copy_release(tmp_path, version=None)
    run = check_in(tmp_path)
    assert (run.returncode, run.stdout.strip()) == (0, str(tmp_path))


def copy_release(folder: Path, *, version: str | None) -> None:
    (folder / "shared").mkdir()
    for name in ("__init__.py", "tree.py", "errors.py"):
        shutil.copy(RELEASE / "shared" / name, folder / "shared" / name)
    if version:
        (folder / "pyproject.toml").write_text(f'[project]\nname = "fedcanvas"\nversion = "{version}"\n')


def check_in(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import shared.tree as tree; print(tree.check_same_tree(tree.__file__))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_the_digest_of_the_code_follows_its_content_and_not_its_place(tmp_path: Path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        for package in ("client", "shared"):
            shutil.copytree(RELEASE / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folders[2] / "client/site.py").write_text("# another release\n")
    first, second, third = map(code_digest, folders)
    assert first == second == code_digest(RELEASE)
    assert first != third
