"""Run directories with evaluations, as `fedcanvas evaluate` leaves them, made without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import RunConfig, Scalar
from shared.data.encoding import encode_png
from shared.metrics.figure import Figure, Interval
from shared.privacy.plan import make_plan
from shared.rundir import RunDirectory, to_json

HOSTILE = "<script>alert('x')</script> & $1 \"quoted\""
PROMPTS = ("a red circle", HOSTILE, "一个红色的圆")
CLASSES = ["red", HOSTILE, "blue"]
CONFIG = RunConfig.from_table(
    {
        "data": {"image-size": 8},
        "privacy": {"delta": 1e-4, "sampling-rate": 0.2},
        "federation": {"published-records": 400, "rounds": 4, "sites": 3},
        "discriminator": {"name": "toy", "width": 8, "hidden": 8},
        "generator": {"width": 8, "latent-dim": 8},
    }
)
PNG = encode_png(np.zeros((8, 8, 3), np.uint8))


def make_run(path: Path, changes: dict[str, Scalar] | None = None, *, quality: bool = True) -> Path:
    """A run with four rounds, one of them repeated, and figures of quality after the second and the last."""
    config = CONFIG.replaced(changes or {})
    plan = make_plan(config)
    with RunDirectory.create(path, config=config, prompts=PROMPTS) as rundir:
        for server_round in (1, 2, 2, 3, 4):
            rundir.charge(server_round, steps=1, reserved_steps=plan.reserved_steps if plan.private else 99)
        for server_round in (1, 2, 3, 4):
            rundir.append_event({"server_round": server_round, "fakes_accuracy": 0.5, "fakes_loss": 0.7})
            if quality and server_round % 2 == 0:
                value = 0.1 * server_round
                rundir.append_event({"server_round": server_round, "quality": {
                    "n": 384, "caption-accuracy": {"accuracy": [value, value - 0.05, value + 0.05]},
                    "about": {"caption-accuracy": {
                        "reference": f"shapes {HOSTILE}, fit", "reference_n": 120, "extractor": "classifier 7c2d",
                        "seeds": {"pictures": [2]}, "marks": {"accuracy": [0.97, 1 / 3]},
                    }},
                    "kid": {"kid": [0.3 - value / 2, 0.0, 0.5]}, "not_measured": {"retrieval": f"no model {HOSTILE}"},
                }})  # fmt: skip
            rundir.append_timing(server_round, 9.0)
        rundir.append_timing(4, 4.0, of="quality")
        rundir.remember_sites({"site-00": "ab" * 32}, {"site-01": "policy"}, 3)
        rundir.write_bytes("sheet.png", PNG)
    return path


def figure(name: str, value: float, reach: float, **about: Any) -> dict[str, Any]:
    about = {"better": "higher", "n": 1000, "reference": "public shapes, test", "reference_n": 500, **about}
    return Figure(name, value, Interval(value - reach, value + reach, "by hand"), **about).to_dict()


def evaluation(
    *, key: str = "0123abcd", fid: float = 12.0, accuracy: float = 0.8, n: int = 1000,
    extractor: str = "local 3f9a01c2", digest: str = "d" * 64, epsilon: float = 1.5, reach: float = 0.01,
) -> dict[str, Any]:  # fmt: skip
    by = {"n": n, "extractor": extractor, "reference": "public shapes, reference"}
    return {
        "format": 1, "key": key,
        "model": {"run_id": "0" * 16, "weights_digest": "e" * 64, "path": "runs/a"},
        "reference": {"name": "public shapes", "digest": digest, "test_digest": "f" * 64,
                      "parts": {"fit": 400, "reference": 500, "floor": 500, "test": 500}},
        "n": n, "seed": 1, "extractor": extractor, "conversions": [f"squares {HOSTILE}"],
        "privacy": {"name": "dp-sgd", "epsilon": epsilon, "delta": 1e-4, "adjacency": "add/remove", "unit": "example",
                    "simulated": True},
        "prompts_sheet": "prompts.png", "command": f"fedcanvas evaluate {HOSTILE}", "versions": {"torch": "2.13"},
        "metrics": {
            "caption-accuracy": {
                "seconds": 3.25,
                "figures": [
                    figure("accuracy", accuracy, reach, extractor="classifier 01234567", n=n, chance=1 / 3, floor=0.97,
                           floor_n=500, seeds={"pictures": [1], "resampling": [0]}),
                    figure("accuracy of colour", accuracy + 0.05, reach, extractor="classifier 01234567", n=n),
                ],
                "tables": [
                    {"title": "confusion of colour", "head": ["asked", *CLASSES], "note": "",
                     "rows": [[CLASSES[0], 8, 2, 0], [CLASSES[1], 1, 7, 3], [CLASSES[2], 0, 0, 0]]},
                    {"title": "something else", "head": ["", "x"], "rows": [[HOSTILE, 1]], "note": ""},
                ],
                "galleries": [{"name": "best", "title": f"best {HOSTILE}", "file": "caption-accuracy-best.png"},
                              {"name": "worst", "title": "worst", "file": "../../../prompts.txt"}],
                "notes": [f"noted {HOSTILE}"],
            },
            "fid": {
                "seconds": 9.0,
                "figures": [figure("fid", fid, 0.5, better="lower", floor=2.0, floor_n=500, at_floor_n=fid + 2,
                                   warning=f"not comparable with published ones {HOSTILE}", **by)],
                "tables": [], "galleries": [], "notes": [],
            },
            "downstream": {
                "figures": [figure("cnn accuracy", 0.6, 0.02, n=n)],
                "tables": [], "galleries": [], "notes": [],
            },
            "retrieval": {"not_measured": f"no model that knows texts was named {HOSTILE}", "hint": "name one: --clip"},
        },
    }  # fmt: skip


def add_evaluation(run_path: Path, content: dict[str, Any], *, whole: bool = True) -> Path:
    folder = run_path / "evaluations" / content["key"]
    folder.mkdir(parents=True)
    (folder / "caption-accuracy-best.png").write_bytes(PNG)
    (folder / "prompts.png").write_bytes(PNG)
    (folder / "fid.json").write_bytes(to_json(content["metrics"]["fid"]))
    if whole:
        (folder / "evaluation.json").write_bytes(to_json(json.loads(to_json(content))))
    return folder
