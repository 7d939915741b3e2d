"""The end of a run between institutions: sheet, report and result beside the released model.

Not here: the released model itself (`server.app`), and a simulation's end, which knows its sites' ledgers
(`simulations.cli`).
"""

from __future__ import annotations

from server.evaluation import final_sheet
from server.report import report_html
from shared.page import counted
from shared.privacy.plan import PrivacyPlan
from shared.rundir import RunDirectory, load_model


def finish(run: RunDirectory) -> None:
    """`result.json` comes last, so its existence means that all is there."""
    model, config = load_model(run.path), run.config
    plan = PrivacyPlan.from_dict(model.card["plan"])
    spent = model.card["spent"]
    cost = (
        f"epsilon at most {spent['epsilon']:.3g} per site at delta {plan.delta:.0e}, {spent['adjacency']} one"
        f" {spent['unit']}"
        if plan.private else "no privacy: epsilon = inf"
    )  # fmt: skip
    left, heads = run.sites_left(), run.heads()
    notes = [f"{counted(len(heads), 'site')}, {cost}"]
    run.write_bytes("sheet.png", final_sheet(model, None, title=run.path.resolve().name, notes=notes))
    rounds = run.timings()
    run.write_json(
        "result.json",
        {
            "run_id": run.run_id,
            "engine": "deployed",
            "sites": sorted(heads),
            "sites_refused": left,
            "rounds": config.federation.rounds,
            "published_records": config.federation.published_records,
            "privacy": {
                "name": config.privacy.name,
                # What a site spent stands in its own ledger; it cannot be more than was reserved.
                "epsilon_at_most": spent["epsilon"],
                "delta": plan.delta,
                "adjacency": spent["adjacency"],
                "unit": spent["unit"],
                "noise_multiplier": plan.noise_multiplier,
                "steps": plan.steps,
                "steps_asked_for": run.steps_charged(),
                "steps_reserved": plan.reserved_steps,
                "entropy": run.entropy,
            },
            "weights_digest": model.card["weights_digest"],
            "seconds": {"training": sum(float(line["seconds"]) for line in rounds)},
            "bytes": {
                "down": sum(int(line.get("bytes_down", 0)) for line in rounds),
                "up": sum(int(line.get("bytes_up", 0)) for line in rounds),
            },
            "sheet": str(run.path / "sheet.png"),
        },
    )
    run.write_bytes("report.html", report_html(run).encode())
