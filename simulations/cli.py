"""`fedcanvas simulate`: a whole federation on this machine, from data and public prompts to pictures and epsilon.

    settings    scenario < --config < named options < --set
    data        one folder or file that is divided over the sites, or one a site
    on disk     OUT the run directory; OUT-sites what only the sites know (their rows, their caches), beside it

Not here: learning and rounds (`client`, `server`), and what a finished run is asked later (`server.cli`).
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from shared.cli import AsJson, Interrupted, new_app, say, warn
from shared.errors import DataError, FedCanvasError, RunDirectoryError, UsageError

if TYPE_CHECKING:
    from shared.config import RunConfig, Scalar
    from shared.data import ImageCaptionDataset
    from shared.privacy.plan import PrivacyPlan
    from shared.prompts import PromptPool
    from shared.rundir import GeneratorModel, RunDirectory
    from simulations.scenarios import Scenario

JOB = "simulation.json"  # in the run directory: what the command was asked, beside config and prompts
REFERENCE_SHAPES, REFERENCE_SEED, SHAPES_SEED = 8000, 2, 1
LARGEST_DEFAULT_BATCH = 2048
FEWEST_OF_PUBLISHED = 0.8  # a rounded figure is off by 5 % at most; far fewer records are another plan
NEXT_PICTURES = 16


@dataclass(frozen=True)
class Job:
    """What the command was asked beside settings and prompts; kept in the run directory for `--resume`."""

    scenario: str | None
    data: list[str]
    reference: str | None
    partition: str
    attribute: str | None
    alpha: float
    max_epsilon: list[str] = field(default_factory=list)


@new_app
def simulate(
    scenario: Annotated[str | None, typer.Argument(metavar="[SCENARIO]", hidden=True)] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Captioned images: a folder or an .npz. Several times: one a site.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Public prompts, one a line.  [default: prompts.txt beside the data]")
    ] = None,
    sites: Annotated[int | None, typer.Option(help="Number of sites.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Federated rounds.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of the run, per site.")] = None,
    delta: Annotated[float | None, typer.Option(help="A public constant below 1 / records of a site.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory, new or empty.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Public captioned images to measure by and to show beside.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="In this process, or Flower's simulation; the same result.")
    ] = "local",
    partition: Annotated[
        Literal["iid", "dirichlet", "by-attribute"] | None,
        typer.Option(help="How one data set is divided over the sites.  [default: iid]"),
    ] = None,
    attribute: Annotated[
        str | None, typer.Option(help="Column that dirichlet and by-attribute divide by.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Of dirichlet: small is unequal.  [default: 0.5]")] = None,
    max_epsilon: Annotated[
        list[str] | None,
        typer.Option(
            "--max-epsilon", metavar="[SITE=]EPSILON", help="Lifetime ceiling of all sites, or of one; several times."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; several times.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Where to compute.  [default: cpu]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same result, bit for bit.  [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    as_json: AsJson = False,
    list_scenarios: Annotated[bool, typer.Option("--list", help="List the scenarios and exit.")] = False,
    list_settings: Annotated[bool, typer.Option("--settings", help="List all settings and exit.")] = False,
) -> None:
    """Train a private text-to-image federation on this machine.

    SCENARIO is a named run (`--list`); options and settings given here replace its own. Without one, name --data,
    --prompts, --delta and --out at least. All sites are simulated: draws and noise come from the seed, so this
    measures a federation, it does not protect anyone.
    """
    if list_scenarios or list_settings:
        typer.echo(_settings_table() if list_settings else _scenario_table(as_json=as_json))
        return
    if out is None:
        raise UsageError("missing --out", hint="name a new folder for the run: --out runs/a")
    if epsilon is not None and epsilon == float("inf"):
        raise UsageError("epsilon inf is no privacy", hint="say so by name: --set privacy.name=none")
    named: dict[str, Scalar | None] = {
        "federation.sites": sites, "federation.rounds": rounds, "privacy.target-epsilon": epsilon,
        "privacy.delta": delta, "compute.device": device, "seed": seed,
    }  # fmt: skip
    overlay = _overlay(config, {key: value for key, value in named.items() if value is not None}, settings or [])
    asked = {
        "scenario": scenario, "data": [str(path) for path in data] if data else None,
        "reference": str(reference) if reference else None, "partition": partition,
        "attribute": attribute, "alpha": alpha, "max_epsilon": max_epsilon,
    }  # fmt: skip
    began = time.monotonic()
    run, job = _open_run(out, asked, overlay, prompts, resume=resume)
    with run:
        if not run.finished:
            _train(run, job, engine)
            _finish(run, job, engine, began)
        elif not (run.path / "statements").is_dir() and _sites_folder(run.path).is_dir():
            _write_statements(run)  # of a release before there were any
        # Where the run lies now: a finished one may have been moved.
        places = {"sheet": str(run.path / "sheet.png"), "next": _next_commands(run.path, run.prompts)}
        result = {**run.read_json("result.json"), **places}
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else _result_text(out, result))


# ---- what is asked


def _overlay(config: Path | None, named: Mapping[str, Scalar], settings: Sequence[str]) -> dict[str, Scalar]:
    """Everything that replaces the scenario's settings, the later the stronger."""
    from shared.config import flatten_table, parse_setting, read_toml

    from_file = flatten_table(read_toml(config)) if config is not None else {}
    return {**from_file, **named, **dict(parse_setting(text) for text in settings)}


def _open_run(
    out: Path, asked: Mapping[str, Any], overlay: Mapping[str, Scalar], prompts: Path | None, *, resume: bool
) -> tuple[RunDirectory, Job]:
    """The run directory, locked, and what to do in it: a new one, or the one to be continued.

    Everything that can be wrong with the request is found before the folder appears.
    """
    from shared.config import RunConfig
    from shared.prompts import PromptPool
    from shared.rundir import RunDirectory, refuse_used

    if resume and RunDirectory.exists(out):
        stored = RunDirectory.open(out)
        job = _same_job(out, Job(**stored.read_json(JOB)), asked)
        wanted = RunConfig.from_flat({**stored.config.to_flat(), **overlay}, origin="settings")
        pool = PromptPool.from_file(prompts).texts if prompts is not None else None
        run = RunDirectory.resume(out, config=wanted, prompts=pool)
        checkpoint = run.load_latest_checkpoint()
        if not run.finished:
            say(f"continuing {out} after round {checkpoint[0] if checkpoint else 0} of {wanted.federation.rounds}")
        return run, job
    if resume:
        if not any(value for value in asked.values()):
            raise RunDirectoryError(f"no run directory at {out}", hint="check the path; without --resume a run starts")
        say(f"there is no run in {out} yet: starting it")
    refuse_used(out)
    return _new_run(out, asked, overlay, prompts)


def _new_run(
    out: Path, asked: Mapping[str, Any], overlay: Mapping[str, Scalar], prompts: Path | None
) -> tuple[RunDirectory, Job]:
    from client.enrolment import remove_simulated_site
    from server.app import REFERENCE, ReferencePlace
    from server.training import check_buildable
    from shared.config import RunConfig
    from shared.data import unseen_split
    from shared.disk import write_whole
    from shared.privacy.plan import make_plan
    from shared.rundir import RunDirectory, reference_cache
    from simulations.scenarios import scenario_called

    scenario = scenario_called(asked["scenario"]) if asked["scenario"] else None
    flat: dict[str, Scalar] = {**(scenario.config().to_flat() if scenario else {}), **overlay}
    paths = [Path(path) for path in asked["data"] or []]
    if len(paths) > 1:
        if overlay.get("federation.sites", len(paths)) != len(paths):
            raise UsageError(
                f"--data names {len(paths)} folders and --sites {overlay['federation.sites']}",
                hint="one folder a site: leave --sites out, or name one folder to be divided",
            )
        flat["federation.sites"] = len(paths)
        if asked["partition"]:
            raise UsageError("--partition divides one data set, and --data names several", hint="leave one of them out")
    for path in [*paths, *([Path(asked["reference"])] if asked["reference"] else [])]:
        if not path.exists():
            raise DataError(f"there is no data at {path}", hint="check the path")
    if not paths and not (scenario and scenario.shapes):
        needed = f"; {scenario.name} wants {scenario.data}" if scenario else ""
        raise UsageError("missing --data", hint=f"name a folder with captions.csv, or an .npz{needed}")
    if "privacy.delta" not in flat:
        raise UsageError("missing --delta", hint="a public constant below 1 / records of a site, for example 1e-5")
    # What can be checked without data is, before data are made or decoded.
    stand_ins: dict[str, Scalar] = {"privacy.sampling-rate": 0.5, "federation.published-records": 10**6}
    checked = RunConfig.from_flat({**stand_ins, **flat}, origin="settings")
    check_buildable(checked)
    pool = _public_prompts(prompts, scenario, paths)
    if not paths:
        assert scenario is not None
        paths = [_made_shapes(out, scenario.shapes, SHAPES_SEED, checked)]
    reference = asked["reference"]
    if reference is None and scenario is not None and scenario.shapes and not asked["data"]:
        count = min(REFERENCE_SHAPES, 3 * scenario.shapes)
        reference = str(_made_shapes(out, count, REFERENCE_SEED, checked))
    job = Job(
        asked["scenario"], [str(path.resolve()) for path in paths],
        str(Path(reference).resolve()) if reference is not None else None, asked["partition"] or "iid",
        asked["attribute"], 0.5 if asked["alpha"] is None else asked["alpha"], asked["max_epsilon"] or [],
    )  # fmt: skip
    datasets = _open_data(out, job, checked)
    if reference is not None:
        _open_reference(out, job, checked)
    if job.max_epsilon and "federation.fewest-sites" not in overlay:
        flat["federation.fewest-sites"] = 1
        say("a site whose ceiling does not allow the run refuses, and the others go on (federation.fewest-sites = 1)")
    count = sum(_unit_count(checked, dataset) for dataset in datasets)
    config = _with_public_figures(flat, count, checked.privacy.units)
    _ceilings(job, config)
    _check_enough(config, count)
    make_plan(config)  # raises where no noise reaches the epsilon
    if pool is None:
        pool = _prompts_beside(paths)
    for stale in _sites_folder(out).glob("site-*"):
        remove_simulated_site(stale)  # of a run that was removed: their ledgers were only its own
    _write_sites(out, job, config, datasets)
    write_whole(_data_digest_path(out), _data_digest(datasets).encode())
    documents: dict[str, Any] = {JOB: asdict(job)}
    if job.reference is not None:
        place = ReferencePlace(job.reference, unseen_split(Path(job.reference)), str(reference_cache(out)))
        documents[REFERENCE] = asdict(place)
    run = RunDirectory.create(out, config=config, prompts=pool.texts, entropy="seeded", documents=documents)
    return run, job


def _same_job(out: Path, stored: Job, asked: Mapping[str, Any]) -> Job:
    for name, value in asked.items():
        before = getattr(stored, name)
        if name == "data" and value is not None:
            value = [str(Path(path).resolve()) for path in value]
        elif name == "reference" and value is not None:
            value = str(Path(value).resolve())
        if value is not None and value != before:
            raise RunDirectoryError(
                f"{out} was started with another {name}: {before if before is not None else 'none'}",
                hint=f"leave it out to continue the run as it is, or name a new --out: {_resume_command(out)}",
            )
    return stored


def _public_prompts(prompts: Path | None, scenario: Scenario | None, data: Sequence[Path]) -> PromptPool | None:
    """From --prompts, the scenario, or beside the data; `None` when the data are still to be made with theirs."""
    from shared.prompts import PromptPool

    if prompts is not None:
        return PromptPool.from_file(prompts)
    if scenario is not None and scenario.prompts:
        return PromptPool(scenario.prompts)
    return _prompts_beside(data) if data else None


def _prompts_beside(data: Sequence[Path]) -> PromptPool:
    """`prompts.txt` that the maker of the data ships as public."""
    from shared.prompts import PromptPool

    files = [path / "prompts.txt" for path in data if (path / "prompts.txt").is_file()]
    pools = [PromptPool.from_file(file) for file in files]
    if len(pools) != len(data):
        raise UsageError(
            "no public prompts",
            hint="name a file, one prompt a line: --prompts FILE. The server and every site see them, so they must be"
            " public text; they are never taken from captions, which are private",
        )
    if any(pool.texts != pools[0].texts for pool in pools):
        raise UsageError("the sites ship different prompts", hint="name one file for all of them: --prompts FILE")
    say(f"public prompts: {len(pools[0])} from {files[0]}")
    return pools[0]


# ---- data and sites


def _made_shapes(out: Path, count: int, seed: int, config: RunConfig) -> Path:
    """The captioned shapes of a scenario, made once beside the runs; a later run finds them."""
    from shared.progress import StepProgress
    from simulations.shapes import make_shapes

    size = config.data.image_size
    folder = out.parent / f"shapes-{size}px-{count}-seed-{seed}"
    if not (folder / "captions.csv").is_file():
        drawing = StepProgress(f"drawing shapes into {folder}")
        make_shapes(folder, count=count, seed=seed, image_size=size, progress=drawing)
    return folder


def _sites_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-sites")


def _open_data(out: Path, job: Job, config: RunConfig) -> list[ImageCaptionDataset]:
    from shared.data import open_dataset
    from shared.progress import StepProgress

    datasets = []
    for path in job.data:
        dataset = open_dataset(
            Path(path), config=config.data, cache_dir=_sites_folder(out) / "cache",
            progress=StepProgress(f"decoding {Path(path).name}"),
        )  # fmt: skip
        for row in dataset.skipped[:3]:
            warn(f"{path}: row {row.row}, {row.file}: {row.reason}: skipped")
        if len(dataset.skipped) > 3:
            counts = "; ".join(f"{count} x {reason}" for reason, count in dataset.skipped_by_reason().items())
            warn(f"{path}: {len(dataset.skipped)} rows are skipped in all: {counts}")
        nobody = dataset.subjects().count("") if config.privacy.unit == "subject" else 0
        if nobody:
            warn(f"{path}: {nobody} records name no subject: they are not used")
        datasets.append(dataset)
    return datasets


def _open_reference(out: Path, job: Job, config: RunConfig) -> ImageCaptionDataset | None:
    from shared.data import open_dataset, unseen_split
    from shared.private_data import refuse_private
    from shared.progress import StepProgress
    from shared.rundir import reference_cache

    if job.reference is None:
        return None
    path = Path(job.reference)
    refuse_private(path)
    split = unseen_split(path)
    if split == "train" and job.reference in job.data:
        # The sheet shows pictures of the reference set, and the classifier learns them: both would leave the site.
        raise UsageError(
            f"--reference names a site's own data: {path}",
            hint="name public pictures that no site holds, or leave --reference out",
        )
    return open_dataset(
        path, config=config.data, cache_dir=reference_cache(out), split=split,
        progress=StepProgress("decoding the public reference set"),
    )  # fmt: skip


def _unit_count(config: RunConfig, dataset: ImageCaptionDataset) -> int:
    return len(dataset) if config.privacy.unit == "example" else len(set(dataset.subjects()) - {""})


def _with_public_figures(flat: Mapping[str, Scalar], count: int, units: str = "records") -> RunConfig:
    """The whole config: the published number of units and q where nobody gave them, and what was chosen is said."""
    from shared.config import RunConfig

    flat = dict(flat)
    if "federation.published-records" not in flat:
        flat["federation.published-records"] = published = _two_digits(count)
        say(f"published {units} of all sites: {published:,}, rounded; federation.published-records sets another figure")
    if "privacy.sampling-rate" not in flat:
        published = int(flat["federation.published-records"])
        batch = min(published / 4, LARGEST_DEFAULT_BATCH)
        flat["privacy.sampling-rate"] = rate = float(f"{batch / max(published, 1):.3g}")
        say(f"sampling rate q = {rate:g}: about {rate * published:.0f} {units} a step, over all sites")
    return RunConfig.from_flat(flat, origin="settings")


def _two_digits(count: int) -> int:
    return int(float(f"{count:.2g}"))


def _check_enough(config: RunConfig, count: int) -> None:
    """The plan's noise is made for the published figure: far fewer units drown in it."""
    units, published = config.privacy.units, config.federation.published_records
    if count < FEWEST_OF_PUBLISHED * published:
        raise DataError(
            f"too few {units} for the plan: {count:,} are there, it is made for {published:,}",
            hint=f"--set federation.published-records={_two_digits(count)}, or more data",
        )
    drawn = config.expected_batch_size / config.federation.sites
    if config.privacy.name != "none" and drawn < 1:
        raise DataError(
            f"too few {units} for the plan: a site draws {drawn:.2g} a step, the rest is noise",
            hint="raise privacy.sampling-rate, or take fewer sites or more data",
        )


def _write_sites(out: Path, job: Job, config: RunConfig, datasets: Sequence[ImageCaptionDataset]) -> list[Path]:
    """One folder a site beside the run directory: its settings, and its rows where one data set is divided."""
    import numpy as np

    from client.enrolment import create_site
    from client.policy import SitePolicy
    from client.settings import SETTINGS, SiteConfig
    from shared.disk import write_whole
    from shared.privacy.budget import Lifetime
    from shared.privacy.ledger import Lineage
    from simulations.partition import Scheme, partition_indices

    count, folder = config.federation.sites, _sites_folder(out)
    shares: list[Any] = [None] * count
    if len(datasets) == 1 and count > 1:
        shares[:] = partition_indices(
            datasets[0], sites=count, scheme=cast(Scheme, job.partition), attribute=job.attribute, alpha=job.alpha,
            seed=config.seed, groups=datasets[0].subjects() if config.privacy.unit == "subject" else None,
        )  # fmt: skip
    paths = []
    ceilings, unit = _ceilings(job, config), config.privacy.unit
    for place, share in enumerate(shares):
        name = f"site-{place:02d}"
        paths.append(folder / name)
        if (folder / name / SETTINGS).is_file():
            continue  # of this run, which goes on
        site = SiteConfig(
            site_id=name, data=job.data[place if len(job.data) > 1 else 0], cache_dir="../cache",
            indices="indices.npy" if share is not None else None, simulated_seed=config.seed, lineage=name,
        )  # fmt: skip
        if share is not None:
            write_whole(folder / name / "indices.npy", _npy(np.asarray(share, np.int64)))
        delta = config.privacy.delta
        policy = SitePolicy.for_simulation(max_epsilon=ceilings[place], delta=delta, unit=unit)
        create_site(folder / name, site, policy, Lineage(name, unit, Lifetime(ceilings[place], delta), simulated=True))
    return paths


def _ceilings(job: Job, config: RunConfig) -> list[float]:
    """The lifetime epsilon of each site; where none is asked for, what the run itself may cost."""
    default = config.privacy.target_epsilon if config.privacy.name != "none" else float("inf")
    ceilings = [default] * config.federation.sites
    for text in sorted(job.max_epsilon, key=lambda text: "=" in text):  # for all sites first
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        places = [place for place in range(len(ceilings)) if name in ("", f"site-{place:02d}")]
        if not value > 0 or not places:
            raise UsageError(
                f"--max-epsilon '{text}' is not a number above 0, or names no site",
                hint=f"for example --max-epsilon 8 or --max-epsilon site-01=4; sites are site-00 to"
                f" site-{len(ceilings) - 1:02d}",
            )
        for place in places:
            ceilings[place] = value
    return ceilings


def _data_digest_path(out: Path) -> Path:
    return _sites_folder(out) / "data.sha256"


def _data_digest(datasets: Sequence[ImageCaptionDataset]) -> str:
    """Of every pixel, caption and subject; as private as they are, so it stays with the sites."""
    from shared.data import SUBJECT_ID

    digest = hashlib.sha256()
    for dataset in datasets:
        for start in range(0, len(dataset), 4096):
            digest.update(dataset.images[start : start + 4096].tobytes())
        digest.update(json.dumps(dataset.captions).encode())
        if SUBJECT_ID in dataset.attributes:
            digest.update(json.dumps(dataset.subjects()).encode())
    return digest.hexdigest() + "\n"


def _npy(array: Any) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# ---- training and its end


def _train(run: RunDirectory, job: Job, engine: str) -> None:
    from shared.privacy.plan import make_plan
    from shared.prompts import PromptPool
    from simulations.estimate import estimate_run
    from simulations.progress import RunProgress, duration

    config, pool = run.config, PromptPool(run.prompts)
    checkpoint = run.load_latest_checkpoint()
    done = checkpoint[0] if checkpoint else 0
    plan = make_plan(config)
    datasets = _open_data(run.path, job, config)
    digest = _data_digest_path(run.path)
    if digest.is_file() and digest.read_text() != _data_digest(datasets):
        raise RunDirectoryError(
            f"the data have changed since the run in {run.path} began",
            hint="put them back as they were, or start a new run: this one would end in other weights",
        )
    site_dirs = _write_sites(run.path, job, config, datasets)
    say(_plan_line(config, plan))
    if done < config.federation.rounds:
        estimate = estimate_run(config, plan, pool)
        left = config.federation.rounds - done
        say(
            f"this will take about {duration(estimate.of(left))}: {left} rounds of {estimate.round_seconds:.2f} s,"
            " as just tried on noise pictures"
        )
    from simulations.engines import run_local, run_ray

    start = {"local": run_local, "ray": run_ray}[engine]
    with RunProgress(config.federation.rounds, done=done) as progress:
        try:
            start(config, site_dirs=site_dirs, rundir=run, prompts=pool, observer=progress)
        except KeyboardInterrupt:
            raise Interrupted(
                f"after round {progress.done} of {config.federation.rounds}; nothing that was spent is forgotten",
                _resume_command(run.path),
            ) from None
        except FedCanvasError as error:
            error.hint = error.hint or f"continue with `{_resume_command(run.path)}`"
            raise


def _plan_line(config: RunConfig, plan: Any) -> str:
    federation, units = config.federation, config.privacy.units
    start = f"{federation.sites} sites, {federation.rounds} rounds, {plan.expected_batch_size:,.0f} {units} a step"
    if not plan.private:
        return f"{start}, no privacy: epsilon = inf"
    return (
        f"{start}, noise multiplier {plan.noise_multiplier:g} for epsilon {config.privacy.target_epsilon:g}"
        f" at delta {plan.delta:.0e} for one {plan.unit}, {config.privacy.retry_slack} retries included"
    )


def _finish(run: RunDirectory, job: Job, engine: str, began: float) -> None:
    """Figures and sheet from the released model; `result.json` comes last, so its existence means all is there."""
    from server.evaluation import final_sheet
    from server.quality import accuracy_rows
    from shared.page import counted
    from shared.privacy.plan import PrivacyPlan
    from shared.rundir import load_model

    started = time.monotonic()
    model, config = load_model(run.path), run.config
    reference = _open_reference(run.path, job, config)
    metrics = _measured(run, model, reference)
    plan = PrivacyPlan.from_dict(model.card["plan"])
    charged = run.steps_charged()
    # The plan's table is exact where it was planned to end; rounds that were repeated make another number.
    exact = charged not in (plan.steps, plan.reserved_steps)
    spent = plan.spent(charged, warm_start=config.warm_start.enabled, exact=exact)
    sites = _ledgers(run, plan)
    _write_statements(run)
    rows = accuracy_rows(metrics)
    cost = (
        f"epsilon {spent.epsilon:.3g} per site at delta {plan.delta:.0e}, {spent.adjacency} one {spent.unit}"
        if plan.private else "no privacy: epsilon = inf"
    )  # fmt: skip
    notes = [f"{counted(config.federation.sites, 'site')}, {cost}"]
    if rows:
        shown = ", ".join(f"{name} {figure.value:.2f}" for name, figure in rows)
        notes.append(shown if len(rows) == 1 else f"accuracy {shown}")
    sheet = run.write_bytes("sheet.png", final_sheet(model, reference, title=run.path.resolve().name, notes=notes))
    seconds = sum(float(line["seconds"]) for line in run.timings())
    run.write_json(
        "result.json",
        {
            "run_id": run.run_id,
            "scenario": job.scenario,
            "engine": engine,
            "seed": config.seed,
            "sites": config.federation.sites,
            "rounds": config.federation.rounds,
            "published_records": config.federation.published_records,
            "metrics": metrics,
            "privacy": {
                "name": config.privacy.name,
                "epsilon_per_site": {name: site.pop("spent") for name, site in sites.items()},
                "ledger_per_site": sites,
                "ledger": "one a site, kept without fsync since the sites are simulated",
                "delta": plan.delta,
                "adjacency": spent.adjacency,
                "unit": spent.unit,
                "fallback": spent.fallback,
                "target_epsilon": config.privacy.target_epsilon if plan.private else float("inf"),
                "noise": config.privacy.noise,
                "noise_multiplier": plan.noise_multiplier,
                "warm_start_noise_multiplier": plan.warm_start_noise_multiplier,
                "sampling_rate": plan.sampling_rate,
                "clipping_norm": plan.clipping_norm,
                "steps": plan.steps,
                "steps_charged": charged,
                "steps_reserved": plan.reserved_steps,
                "entropy": run.entropy,
            },
            "weights_digest": model.card["weights_digest"],
            "seconds": {
                "training": seconds,
                "quality_during_training": sum(float(line["seconds"]) for line in run.timings(of="quality")),
                "evaluation": time.monotonic() - started,
                "this_command": time.monotonic() - began,
            },
            "sheet": str(sheet),
            "next": _next_commands(run.path, model.prompts),
        },
    )


def _measured(run: RunDirectory, model: GeneratorModel, reference: ImageCaptionDataset | None) -> dict[str, Any]:
    """The caption accuracy of the released model, or why there is none, by the classifier of the whole run."""
    from server.evaluation import pictures
    from server.evaluator import as_table
    from server.quality import QualityProbe
    from shared.metrics import Measurement
    from shared.rundir import reference_cache

    name = "caption-accuracy"
    if reference is None:
        return {name: {"not_measured": "no --reference was given"}}
    try:
        probe = QualityProbe(reference, names=[name], cache_dir=reference_cache(run.path), progress=say)
    except DataError as error:
        return {name: {"not_measured": error.message}}
    found = probe.measure(
        lambda texts, seed, indices: pictures(model, texts, seed=seed, indices=indices), model.prompts,
        run.config.evaluation.samples,
    )[name]  # fmt: skip
    return {name: as_table(found) if isinstance(found, Measurement) else {"not_measured": found}}


def _ledgers(run: RunDirectory, plan: PrivacyPlan) -> dict[str, dict[str, Any]]:
    """What each site's own ledger says of this run, and why a site is not in it."""
    from shared.privacy.ledger import Ledger

    found, left = {}, run.sites_left()
    for place in range(run.config.federation.sites):
        name = f"site-{place:02d}"
        ledger = Ledger(_sites_folder(run.path) / name / "lineages" / name)
        account = ledger.runs.get(run.run_id)
        steps, moments = (account.steps, account.unsampled > 0) if account else (0, False)
        spent = plan.spent(steps, warm_start=moments, exact=steps not in (plan.steps, plan.reserved_steps))
        if not steps and not moments:
            figures = dict.fromkeys(("epsilon", "prv", "pld", "rdp"), 0.0)
        else:
            figures = {figure: getattr(spent, figure) for figure in ("epsilon", "prv", "pld", "rdp")}
        found[name] = {
            "spent": figures,
            "steps": steps,
            "reserved": account.price.epsilon if account else 0.0,
            "lifetime": ledger.lineage.lifetime.max_epsilon,
            "left": ledger.left.epsilon,
            "refused": left.get(name),
        }
    return found


def _write_statements(run: RunDirectory) -> None:
    """What each site that answered signs about its spending, for `fedcanvas release`."""
    from client.statement import spend_statement
    from shared.privacy.ledger import Ledger

    weights = hashlib.sha256((run.path / "model/generator.safetensors").read_bytes()).hexdigest()
    for name in run.heads():
        folder = _sites_folder(run.path) / name
        ledger = Ledger(folder / "lineages" / name)
        with ledger.locked():
            if ledger.runs[run.run_id].closed is None:
                ledger.close(run.run_id, "the simulation is over")
            statement = spend_statement(folder, ledger, run.run_id, weights=weights)
        run.write_bytes(f"statements/{name}.json", statement)


def _next_commands(out: Path, prompts: Sequence[str]) -> list[str]:
    from server.app import REFERENCE

    prompt, place = shlex.quote(prompts[0]), shlex.quote(str(out))
    commands = [f"fedcanvas generate {prompt} --model {place} --n {NEXT_PICTURES} --seed 1 --out pictures"]
    if (out / REFERENCE).is_file():
        reference = json.loads((out / REFERENCE).read_text(encoding="utf-8"))["path"]
        commands.append(f"fedcanvas evaluate {place} --reference {shlex.quote(reference)}")
    return [*commands, f"fedcanvas report {place}"]


def _resume_command(out: Path) -> str:
    return f"fedcanvas simulate --resume --out {shlex.quote(str(out))}"


# ---- what is printed


def _result_text(out: Path, result: Mapping[str, Any]) -> str:
    from server.quality import accuracy_rows
    from simulations.progress import duration

    privacy, accuracy = result["privacy"], result["metrics"]["caption-accuracy"]
    lines = [f"{out}: {result['rounds']} rounds in {duration(result['seconds']['training'])} of training", ""]
    rows = accuracy_rows(result["metrics"])
    if rows:
        first = rows[0][1]
        lines += [
            f"accuracy of {first.n:,} pictures, 95 % interval, told by a classifier trained on {first.reference_n:,}",
            f"real ones of the public reference set; 'real' is the same on {first.floor_n or 0:,} that it has not seen",
            f"  {'':<14}{'generated':>10}{'':>16}{'real':>8}{'chance':>8}",
        ]
        for name, figure in rows:
            between = f"{figure.interval.low:.3f} to {figure.interval.high:.3f}"
            real = "" if figure.floor is None else f"{figure.floor:.3f}"
            lines.append(f"  {name:<14}{figure.value:>10.3f}{between:>16}{real:>8}{figure.chance or 0:>8.3f}")
        lines += [f"  {note}" for note in accuracy["notes"][1:]]
    else:
        lines.append(f"accuracy was not measured: {accuracy['not_measured']}")
    during = result["seconds"].get("quality_during_training", 0.0)
    if during:
        share = during / (during + result["seconds"]["training"])
        lines.append(f"  figures during training took {during:.0f} s, {share:.0%} of the time")
    lines.append("")
    if privacy["name"] == "none":
        lines.append("epsilon = inf: this run had no privacy (privacy.name = none)")
    else:
        lines += [
            f"epsilon per site at delta {privacy['delta']:.0e}, {privacy['adjacency']} one {privacy['unit']},"
            f" {privacy['noise']} noise, {privacy['steps_charged']} steps",
            f"  {'':<14}{'PRV':>10}{'PLD':>8}{'RDP':>8}",
        ]
        for site, epsilon in privacy["epsilon_per_site"].items():
            refused = privacy["ledger_per_site"][site]["refused"]
            why = f"   refused in round {refused['server_round']} ('{refused['code']}')" if refused else ""
            lines.append(f"  {site:<14}{epsilon['prv']:>10.3f}{epsilon['pld']:>8.3f}{epsilon['rdp']:>8.3f}{why}")
        if privacy["fallback"]:
            lines.append(f"  {privacy['fallback']}")
        lines.append(
            f"  simulated: draws and noise come from seed {result['seed']}, so this run itself protects nobody"
        )
    lines += ["", f"pictures  {result['sheet']}", f"figures   {out / 'result.json'}"]
    lines.append(f"ledgers   {_sites_folder(out)}/site-*/lineages: what each site let go and what it cost")
    lines += [f"{'next' if place == 0 else '':<10}{command}" for place, command in enumerate(result["next"])]
    return "\n".join(lines)


def _scenario_table(*, as_json: bool) -> str:
    from simulations.scenarios import SCENARIOS

    rows = []
    for scenario in SCENARIOS.values():
        config = scenario.config()
        epsilon = "inf" if config.privacy.name == "none" else f"{config.privacy.target_epsilon:g}"
        rows.append(
            {"name": scenario.name, "epsilon": epsilon, "sites": config.federation.sites, "minutes": scenario.minutes,
             "summary": scenario.summary, "data": scenario.data}
        )  # fmt: skip
    if as_json:
        return json.dumps({"scenarios": rows})
    lines = [f"{'scenario':<18}{'epsilon':>8}{'sites':>7}{'minutes':>9}   what, and its --data"]
    for row in rows:
        lines.append(f"{row['name']:<18}{row['epsilon']:>8}{row['sites']:>7}{row['minutes']:>9g}   {row['summary']}")
        lines.append(f"{'':<45}{row['data']}")
    note = "minutes of training on two cores; a run tries a round before it starts and says how long it will take"
    return "\n".join([*lines, "", note])


def _settings_table() -> str:
    from shared.config import setting_names

    names = setting_names()
    width = max(map(len, names)) + 2
    return "\n".join(f"{name:<{width}}{description}" for name, description in names.items())
