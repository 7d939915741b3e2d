"""The README's lines for somebody who was given a model: copied into a shell they end in the model's own picture.

The first of them makes a virtual environment, which other checks do; a command of this checkout stands in its place.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from signed_release import signed_run

from fedcanvas import Generator

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large red circle on a white background"


def lines() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The model in someone's hands")[2]
    block = re.search(r"```\n(python3 -m venv .*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


@pytest.mark.slow
def test_five_copied_lines_end_in_a_picture(tmp_path: Path) -> None:
    install, check, serve, ask, fetch = lines()
    assert "--constraint constraints.txt" in install
    assert PROMPT in ask
    signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0}).release(tmp_path / "model")
    command = tmp_path / ".venv/bin/fedcanvas"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m shared.cli "$@"\n')
    command.chmod(0o755)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    # Somebody else may listen at 8000 here.
    serve, ask = serve.removesuffix(" &") + f" --port {port} &", ask.replace(":8000/", f":{port}/")
    script = "\n".join([check, serve, ask, fetch])
    shell = subprocess.Popen(
        ["bash", "-e", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert shell.wait(120) == 0
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        said, _ = shell.communicate(timeout=30)
    assert "signed by" in said
    (picture,) = Generator.load(tmp_path / "model").generate([PROMPT], seed=1)
    assert (tmp_path / "circle.png").read_bytes() == picture.png()
    with Image.open(tmp_path / "circle.png") as drawn:
        assert drawn.info["prompt"] == PROMPT
