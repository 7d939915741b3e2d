"""`fedcanvas evaluate` and `fedcanvas compare`: what a released generator is worth, in figures that others can check.

Everything is measured against public pictures. A site's private folder is refused, or asked through the site's own
ledger (`--charge`), which gives one noised figure. Not here: how figures are made (`server.evaluator`,
`shared.metrics`), and pages (`server.report`, `server.compare`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import AsJson, Interrupted, new_app, printable, say
from shared.errors import DataError, UsageError
from shared.progress import Barred, StepProgress, on_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from server.evaluator import Evaluator
    from shared.config import RunConfig
    from shared.data import ImageCaptionDataset
    from shared.metrics import Setting
    from shared.metrics.extractor import Extractor
    from shared.metrics.public_sets import PublicSets
    from shared.rundir import GeneratorModel

FEWEST_PICTURES, MOST_PICTURES = 2, 1_000_000
DEFAULT_N, DEFAULT_TRAININGS = 10_000, 3
SAMPLE_SEED = 1  # of latents; sheets show seed 0, so that figures are about other pictures than those shown
UNEVEN = 0.05  # part of the public pictures whose captions may be too many without a word about it


@new_app
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)],
    reference: Annotated[Path | None, typer.Option(help="Public captioned pictures: a folder or an .npz.")] = None,
    test: Annotated[
        Path | None, typer.Option(help="Public pictures to test on.  [default: x_test of an .npz, or a fifth]")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Some of them, with commas between.  [default: all]")] = None,
    n: Annotated[
        int, typer.Option("--n", min=FEWEST_PICTURES, max=MOST_PICTURES, help="Generated pictures.")
    ] = DEFAULT_N,
    extractor: Annotated[
        str, typer.Option(metavar="inception|clip|local|PATH", help="What turns pictures into features.")
    ] = "local",
    clip: Annotated[
        str, typer.Option(metavar="MODEL", help="For alignment: a CLIP-like model, or VIT+TEXT; by id or folder.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of latents.")] = SAMPLE_SEED,
    trainings: Annotated[
        int, typer.Option(min=1, max=100, help="Seeds of figures that depend on a training.")
    ] = DEFAULT_TRAININGS,
    out: Annotated[
        Path | None, typer.Option(help="Where figures are kept.  [default: evaluations in the run]", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the whole report as one HTML file.")] = None,
    charge: Annotated[
        float | None,
        typer.Option(metavar="EPSILON", help="--reference is a site's private folder: charge its ledger, ask once."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Of --charge.  [default: its share of the lineage's]")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a ledger is charged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the model of RUN, a finished run directory or a model folder, against public pictures.

    Each figure comes with its number of pictures, reference, extractor, 95 % interval, what real pictures get in
    the same place, and what guessing gets. The public set is cut into parts that never mix: to train measuring
    models, to compare with, to test on. What was measured is kept: an interrupted evaluation goes on.
    """
    from shared.metrics import METRICS
    from shared.rundir import RunDirectory, load_model

    if reference is None:
        raise UsageError("missing --reference", hint="name public captioned pictures: a folder or an .npz")
    names = list(dict.fromkeys(name.strip() for name in metrics.split(","))) if metrics else METRICS.names()
    for name in names:
        METRICS.get(name)  # an unknown one is said before anything is drawn
    if html is not None and not RunDirectory.exists(run):
        raise UsageError(f"{run} is a model without its run directory", hint="--html shows a run: name its folder")
    model, run = load_model(run), _run_of(run)
    if charge is not None:
        if any((test, metrics, clip, html, out, fresh)) or (extractor, trainings) != ("local", DEFAULT_TRAININGS):
            raise UsageError(
                "--charge asks one question: how often a classifier of generated pictures names a private caption",
                hint="of the other options it takes --n, --seed, --delta, --yes and --json",
            )
        _charged(model, reference, epsilon=charge, delta=delta, yes=yes, as_json=as_json, seed=seed, n=n)
        return
    if delta is not None or yes:
        raise UsageError(
            "--delta and --yes belong to --charge", hint="public pictures cost nothing; a site's need --charge EPSILON"
        )
    began = time.monotonic()
    with EvaluationProgress() as progress:
        evaluator, about = _evaluator(
            run, model, reference, test, n=n, seed=seed, trainings=trainings, extractor=extractor, clip=clip, out=out,
            progress=progress,
        )  # fmt: skip

        def command(measured: Sequence[str]) -> str:
            return _command(
                run, reference, test, n=n, seed=seed, trainings=trainings, extractor=extractor, clip=clip,
                metrics="" if set(measured) == set(METRICS.names()) else ",".join(measured), out=str(out or ""),
            )  # fmt: skip

        try:
            file = evaluator.run(names, command=command, about=about, fresh=fresh)
        except KeyboardInterrupt:
            raise Interrupted("what was measured so far is kept", command(names)) from None
    document = json.loads(file.read_text(encoding="utf-8"))
    if html is not None:
        from server.report import report_html
        from shared.disk import write_whole

        write_whole(html, report_html(RunDirectory.open(run), document, file.parent).encode())
    if as_json:
        typer.echo(json.dumps({**document, "file": str(file)}, ensure_ascii=False))
    else:
        typer.echo(_text(document, names))
        typer.echo(f"\nfigures  {file}   ({time.monotonic() - began:.0f} s)")
        if html is not None:
            typer.echo(f"report   {html}: open it in a browser")
    if not any("figures" in document["metrics"][name] for name in names):
        raise DataError("none of the metrics could be measured", hint="the reasons stand above, each with what to do")


@new_app
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", hidden=True)],
    html: Annotated[Path | None, typer.Option(help="Write the comparison as one HTML file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Lay evaluated runs side by side: RUN RUN... are run directories that `fedcanvas evaluate` has measured.

    Runs that differ in the seed alone are also taken together. A difference counts when it is larger than noise,
    after a correction for looking at many pairs (Holm). Figures against different public sets are kept apart.
    """
    from server.compare import compare_html, compare_json, compare_text
    from server.evaluations import load_comparable
    from shared.disk import write_whole
    from shared.rundir import RunDirectory

    if len(runs) < 2:
        raise UsageError("one run is nothing to compare", hint="name two or more: fedcanvas compare runs/a runs/b")
    opened = [RunDirectory.open(path) for path in runs]
    evaluations = load_comparable(runs)
    if html is not None:
        write_whole(html, compare_html(opened, evaluations).encode())
    if as_json:
        typer.echo(json.dumps(compare_json(opened, evaluations), ensure_ascii=False))
    else:
        typer.echo(compare_text(opened, evaluations))
        if html is not None:
            typer.echo(f"\npage  {html}: open it in a browser")


class EvaluationProgress(Barred):
    """A bar for what is being done and one for all metrics on a terminal; lines now and then in a log."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        super().__init__(_bar() if on_terminal(terminal) else None)
        self._metric, self._steps = "", StepProgress("")
        if self._bar is not None:
            self._all = self._bar.add_task("metrics", total=None)
            self._one = self._bar.add_task("", total=None, visible=False)

    def metric(self, name: str, number: int, total: int) -> None:
        self._metric = name
        if self._bar is not None:
            self._bar.update(self._all, completed=number - 1, total=total, description=f"{number} of {total}: {name}")
            self._bar.update(self._one, visible=False)
        else:
            say(f"{number} of {total}: {name}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._one, description=text, completed=0, total=None, visible=True)
        else:
            say(f"  {text}")
            self._steps = StepProgress(f"  {text}")

    def step(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._one, completed=done, total=total)
        elif done < total:
            self._steps(done, total)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


# ---- what is measured against what


def _evaluator(
    run: Path, model: GeneratorModel, reference: Path, test: Path | None, *, n: int, seed: int, trainings: int,
    extractor: str, clip: str, out: Path | None, progress: EvaluationProgress,
) -> tuple[Evaluator, dict[str, Any]]:  # fmt: skip
    from server.evaluator import Evaluator, Request
    from shared.metrics import Setting
    from shared.metrics.dual_encoder import halves_of
    from shared.metrics.extractor import named
    from shared.metrics.public_sets import divide
    from shared.rundir import reference_cache

    builder, path = named(extractor)
    cache = reference_cache(run)
    known, split = _public(reference, model.config, cache), None
    tested = _public(test, model.config, cache) if test is not None else None
    if tested is None and _has_test(reference):
        tested, split = _public(reference, model.config, cache, split="test"), "x_test"
    trained_on = _trained_on(run, model.config)
    public = divide(known, n=n, test=tested, trained_on=trained_on or ())

    def build(setting: Setting) -> Extractor:
        return builder(setting, path)

    setting = Setting(
        public, build, dual_encoder=clip, seed=0, trainings=trainings, cache_dir=cache, progress=progress.line,
        step=progress.step,
    )  # fmt: skip
    halves = "".join(_digest_of(half) for half in halves_of(clip) or (clip,))
    request = Request(n, seed, trainings, extractor, _digest_of(path), clip, halves)
    folder = out or _evaluations_of(run)
    conversions = [
        *_conversions(model, reference, split, n), *_seen_before(known, public, trained_on, run),
        *_unevenness(known.captions, model.prompts),
    ]  # fmt: skip
    evaluator = Evaluator(
        model, setting, request, folder, conversions=conversions, on_metric=progress.metric
    )  # fmt: skip
    return evaluator, _about(run, model)


def _public(path: Path, config: RunConfig, cache: Path, *, split: str = "train") -> ImageCaptionDataset:
    """A public set, prepared as the model's own pictures are; refused where it is a site's."""
    from shared.data import open_dataset
    from shared.private_data import refuse_private

    refuse_private(path)
    return open_dataset(
        path, config=config.data, cache_dir=cache, split="test" if split == "test" else "train",
        progress=StepProgress(f"decoding {path.name}"),
    )  # fmt: skip


def _has_test(path: Path) -> bool:
    from shared.data import unseen_split

    return unseen_split(path) == "test"


def _trained_on(run: Path, config: RunConfig) -> frozenset[str] | None:
    """Pixels that the sites of a simulation trained on; none of a deployed federation, `None` where they are gone."""
    from shared.data import open_dataset
    from shared.metrics.public_sets import pixel_keys

    keys: set[str] = set()
    sites = Path(f"{run.resolve()}-sites", "cache")  # decoded there already; nothing of sites goes to public caches
    with TemporaryDirectory() as temporary:
        cache = sites if sites.is_dir() else Path(temporary)
        for path in map(Path, _job_of(run).get("data", [])):
            if not path.exists():
                return None
            progress = StepProgress(f"decoding {path.name}")
            keys.update(pixel_keys(open_dataset(path, config=config.data, cache_dir=cache, progress=progress)))
    return frozenset(keys)


def _seen_before(
    known: ImageCaptionDataset, public: PublicSets, trained_on: frozenset[str] | None, run: Path
) -> list[str]:
    """Sentences on public pictures that the simulated sites trained on."""
    from shared.metrics.public_sets import pixel_keys

    if trained_on is None:
        data = ", ".join(_job_of(run)["data"])
        return [f"what the simulated sites trained on is not at {data} any more: public pictures may be among it"]
    said = []
    if count := sum(key in trained_on for key in pixel_keys(known)):
        said.append(
            f"the simulated sites trained on {count:,} of the {len(known):,} public pictures, as is usual in the"
            " literature; a generator that memorised its data would look good in distances, and `nearest` is where it"
            " would show"
        )
    if public.left_out:
        said.append(f"{public.left_out:,} pictures to test on are left out: the simulated sites trained on them")
    return said


def _conversions(model: GeneratorModel, reference: Path, split: str | None, n: int) -> list[str]:
    """What a reader must know about the public sets before any figure."""
    config = model.config.data
    kind = "grey" if config.channels == 1 else "colour"
    said = [
        f"public pictures are prepared as the run prepares pictures: squares of {config.image_size} px, {kind}",
    ]
    if split is not None:
        said.append(f"classifiers are tested on {split} of {reference.name}, all other parts come from x_train")
    if n < len(model.prompts):
        said.append(f"{n} pictures are fewer than the model's {len(model.prompts)} prompts: the last are not drawn")
    return said


def _unevenness(public: Sequence[Sequence[str]], prompts: Sequence[str]) -> list[str]:
    """A sentence where public captions are not as even as the prompts that pictures are generated for."""
    wanted = set(prompts)
    counts = Counter(captions[0] for captions in public if captions[0] in wanted)
    told = sum(counts.values())
    if told < len(public) / 2:
        return []  # other captions: nothing can be said
    even = 1 / len(wanted)
    apart = sum(abs(counts[prompt] / told - even) for prompt in wanted) / 2
    if apart <= UNEVEN + len(wanted) ** 0.5 / told**0.5:  # as far as drawing alone may carry
        return []
    return [
        f"pictures are generated evenly over {len(wanted)} prompts, but {apart:.0%} of the public pictures would need"
        " another caption to be so even: no generator reaches the floor of a distance"
    ]


def _job_of(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "simulation.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _about(run: Path, model: GeneratorModel) -> dict[str, Any]:
    from shared.privacy.plan import PrivacyPlan

    card = model.card
    plan = PrivacyPlan.from_dict(card["plan"])
    spent = card.get("spent", {})
    return {
        "model": {"path": str(run), "run_id": card.get("run_id"), "weights_digest": card.get("weights_digest")},
        "privacy": {
            "name": model.config.privacy.name,
            "epsilon": spent.get("epsilon", math.inf) if plan.private else math.inf,
            "delta": plan.delta, "adjacency": spent.get("adjacency"), "unit": plan.unit,
            "simulated": card.get("entropy") == "seeded",
        },
    }  # fmt: skip


def _run_of(path: Path) -> Path:
    """The run whose model folder was named, where it lies in one: figures belong to the run."""
    from shared.rundir import RunDirectory

    folder = path.resolve()
    return folder.parent if folder.name == "model" and RunDirectory.exists(folder.parent) else path


def _evaluations_of(run: Path) -> Path:
    from shared.rundir import RunDirectory

    if RunDirectory.exists(run):
        return run / "evaluations"
    return Path(f"{run.resolve()}-evaluations")


def _digest_of(path: str) -> str:
    """Of what an extractor's path names, so that another file of that name is another extractor."""
    place = Path(path)
    if not path or not place.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _command(run: Path, reference: Path, test: Path | None, **options: Any) -> str:
    parts = ["fedcanvas", "evaluate", str(run), "--reference", str(reference)]
    if test is not None:
        parts += ["--test", str(test)]
    defaults = {
        "n": DEFAULT_N, "seed": SAMPLE_SEED, "trainings": DEFAULT_TRAININGS, "extractor": "local", "clip": "",
        "metrics": "", "out": "",
    }  # fmt: skip
    for name, value in options.items():
        if value != defaults[name]:
            parts += [f"--{name}", str(value)]
    return shlex.join(parts)


# ---- a site's private data


def _charged(
    model: GeneratorModel, site_dir: Path, *, epsilon: float, delta: float | None, yes: bool, as_json: bool, seed: int,
    n: int,
) -> None:  # fmt: skip
    """One noised figure of a site's records: how often a classifier trained on generated pictures is right."""
    from dataclasses import asdict

    from server.private_question import question_about
    from shared.plain import plain
    from shared.private_data import ask_site, quote_site

    question = question_about(model, n=n, seed=seed, epsilon=epsilon, delta=delta, progress=say)
    quote = quote_site(site_dir, question)
    prompts = len(model.prompts)
    chance = 1 / prompts  # of naming one of them blindly, whatever the records are; less where they hold other captions
    if quote.known:
        say(f"site {quote.site_id} has answered this question: the same answer comes again, uncharged")
    elif not yes:
        say(
            f"one noised figure about lineage '{quote.lineage}' costs each {quote.unit} epsilon {quote.epsilon:.3g} at"
            f" delta {quote.delta:.1e}, of epsilon {quote.epsilon_left:.3g} that is left; below about"
            f" {quote.fewest:.0f} {quote.unit}s it only says that they are too few, and costs the same"
        )
        say(
            f"counted is how often the model's own prompt that is named stands among a record's captions; guessing gets"
            f" at most {chance:.3g} ({prompts} prompts), and a record with none of these prompts counts as wrong"
        )
        if not typer.confirm("charge it?", default=False, err=True):
            raise UsageError("nothing was charged", hint="--yes charges without asking")
    answer = ask_site(site_dir, question)
    if as_json:
        about = {
            "pictures": n, "seed": seed, "prompts": prompts, "chance": chance,
            "classifier": question.predictor_digest, "model": question.model_digest,
        }  # fmt: skip
        typer.echo(json.dumps({**plain(asdict(answer)), "question": about}, ensure_ascii=False))
        return
    if answer.value is not None and answer.low is not None and answer.high is not None:
        typer.echo(
            f"a classifier trained on {n:,} generated pictures names the caption of {answer.value:.3f} of this site's"
            f" records (95 % interval {answer.low:.3f} to {answer.high:.3f}, noise included); guessing gets at most"
            f" {chance:.3g}; about {answer.noised_count:,.0f} {answer.unit}s, with noise; pictures of seed {seed},"
            f" model {question.model_digest[:8]}"
        )
    typer.echo(answer.note)
    if answer.simulated:
        typer.echo("the site is simulated: its noise comes from a seed, so this figure protects nobody")
    spent = f"epsilon {answer.epsilon:.3g} at delta {answer.delta:.1e}, {answer.unit} added or removed"
    typer.echo(f"{'charged' if answer.charged else 'cost when it was asked first'}: {spent}; run {answer.run}")


# ---- what is printed


def _text(document: Mapping[str, Any], asked: Sequence[str]) -> str:
    from shared.metrics.figure import Figure

    reference, privacy = document["reference"], document["privacy"]
    parts = ", ".join(f"{name} {count:,}" for name, count in reference["parts"].items())
    epsilon = float(privacy["epsilon"])
    spent = "no privacy: epsilon = inf" if math.isinf(epsilon) else (
        f"epsilon {epsilon:.3g} at delta {privacy['delta']:.0e}, {privacy['adjacency']} one {privacy['unit']}"
    )  # fmt: skip
    lines = [
        f"{document['model']['path']}: {document['n']:,} pictures, seed {document['seed']}; {spent}",
        f"public set {reference['name']}: {parts}; features by {document['extractor']}",
        *(f"  {text}" for text in document["conversions"]),
        "",
        f"{'':<44}{'value':>10}{'95 % interval':>22}{'real':>10}{'chance':>9}{'n':>9}",
    ]
    warned: set[str] = set()
    for name, found in document["metrics"].items():
        if "not_measured" in found:
            if name in asked:
                hint = f" ({found['hint']})" if found.get("hint") else ""
                lines.append(f"{name:<44}not measured: {found['not_measured']}{hint}")
            continue
        for table in found["figures"]:
            figure = Figure.from_dict(table)
            between = f"{_number(figure.interval.low)} to {_number(figure.interval.high)}"
            label = figure.name if figure.name.startswith(name) else f"{name}: {figure.name}"
            real, chance = _number(figure.floor), _number(figure.chance)
            lines.append(
                f"{label:<44}{_number(figure.value):>10}{between:>22}{real:>10}{chance:>9}{figure.n:>9,}"
            )
            if figure.at_floor_n is not None:
                same = f"{_number(figure.at_floor_n):>10} of {figure.floor_n:,}, as many as the real ones"
                lines.append(f"{'':<44}{same}")
            if figure.warning and figure.warning not in warned:
                warned.add(figure.warning)
                lines.append(f"    warning: {figure.warning}")
        lines += [f"    {note}" for note in found["notes"]]
    return "\n".join(printable(line) for line in lines)  # columns of a public set are somebody else's text


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
