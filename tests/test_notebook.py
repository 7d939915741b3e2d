"""The notebook runs from top to bottom on a released model, and what it shows is what the model draws.

Its code cells run here in order, in one namespace, as a kernel would run them; a kernel itself is not needed for that.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from signed_release import signed_run

from fedcanvas import Generator

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    return signed_run(folder / "runs/a", {"privacy.sampling-rate": 1.0}).release(folder / "model")


def run_cells(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All names after the last cell; what cell `id` shows is under that id."""
    monkeypatch.setenv("FEDCANVAS_MODEL", str(model))
    names: dict[str, Any] = {}
    for cell in (cell for cell in CELLS if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]), filename=cell["id"])
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if isinstance(last, ast.Expr):
            names[f"shown {cell['id']}"] = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
    return names


def test_the_notebook_runs_and_shows_what_the_model_draws(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_cells(model, monkeypatch)
    out, _ = capsys.readouterr()
    generator = Generator.load(model)
    assert generator.line in out
    assert f"epsilon {generator.privacy['epsilon_max']:.3g} at delta 0.0001, add/remove one example" in out
    first = generator.generate([generator.prompts[0]], seed=1)[0]
    assert (np.asarray(names["shown one"]) == first.array).all()
    assert names["shown grid"].size == (4 * 6 * 8, 4 * 4 * 8)
    assert names["shown png"]["model"] == generator.digest
    assert names["shown png"]["truncation"] == "0.8"


def test_the_notebook_is_one_of_format_4_and_holds_no_output() -> None:
    about = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (about["nbformat"], about["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (wanted | {"outputs", "execution_count"} if cell["cell_type"] == "code" else wanted)
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
