"""The figures that a released generator is judged by, each with its sample size, reference, interval and floor.

    RUN/evaluations/<key>/<metric>.json      as each metric ends: an interrupted evaluation goes on where it stopped
    RUN/evaluations/<key>/<metric>-*.png     pictures of it
    RUN/evaluations/<key>/evaluation.json    all of them; written last

The key is of everything that decides the figures (weights, public sets, extractor, number of pictures, seed, versions
of what measures), so two evaluations are never mixed. A model of a hub counts by its id: what its owner changes there
shows with `--fresh`. A metric that cannot run leaves its reason in its place, never a number.
Not here: private data (`shared.private_data`), and pages (`server.report`).
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server.evaluation import pictures
from server.sheet import SheetCell, contact_sheet
from shared.disk import write_whole
from shared.errors import FedCanvasError
from shared.metrics import METRICS, Gallery, Measurement, Pictures, Setting, Table
from shared.metrics.attributes import VERSION as CLASSIFIER_VERSION
from shared.metrics.downstream import VERSION as DOWNSTREAM_VERSION
from shared.metrics.dual_encoder import VERSION as DUAL_ENCODER_VERSION
from shared.metrics.inception import VERSION as INCEPTION_VERSION
from shared.metrics.vision_model import VERSION as VISION_VERSION
from shared.rundir import GeneratorModel, current_versions, take_lock, to_json

FORMAT = 1
FIGURES_VERSION = 2  # of how metrics make figures of what these see: a change of any figure needs another
LIBRARIES = ("torch", "numpy", "opencv-python-headless", "torch-fidelity", "scikit-learn", "scipy", "transformers")
MEASURING_VERSIONS = (
    FIGURES_VERSION, CLASSIFIER_VERSION, DOWNSTREAM_VERSION, INCEPTION_VERSION, VISION_VERSION, DUAL_ENCODER_VERSION,
)  # fmt: skip
CLASS_PICTURES, FEW_PICTURES = 12, 4  # of each prompt on the sheet; the fewer where there are many prompts
MANY_PROMPTS = 20
MOST_PROMPTS = 100  # with a sheet of their own
GALLERY_WIDTH = 300  # of a picture with the text under it
DRAWN = 500  # pictures between two reports of progress


@dataclass(frozen=True)
class Request:
    """What decides the figures, beside model and public sets.

    Attributes:
        extractor: as it was asked for, and the digest of what it names: two files of one name are two extractors.
        dual_encoder: of the metrics of alignment, and the digest of the folders that it names; "" for none.
    """

    n: int
    seed: int
    trainings: int
    extractor: str
    extractor_digest: str
    dual_encoder: str
    dual_encoder_digest: str


@dataclass(frozen=True, eq=False)
class Evaluator:
    """One evaluation of one model.

    Attributes:
        folder: `RUN/evaluations`.
        conversions: sentences about what was done to the public sets before anything was measured.
        on_metric: told (metric, its number from 1, how many) before each starts.
    """

    model: GeneratorModel
    setting: Setting
    request: Request
    folder: Path
    conversions: Sequence[str] = ()
    on_metric: Callable[[str, int, int], None] = lambda name, number, total: None

    @property
    def key(self) -> str:
        weights = self.model.card["files"]["generator.safetensors"]
        about = json.dumps(
            [FORMAT, MEASURING_VERSIONS, weights, list(self.model.prompts), self.setting.public.digest,
             asdict(self.request)]
        )  # fmt: skip
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def run(
        self, names: Sequence[str], *, command: Callable[[Sequence[str]], str], about: Mapping[str, Any],
        fresh: bool = False,
    ) -> Path:  # fmt: skip
        """Measures what is not there yet; `evaluation.json` then holds every metric that was ever measured for it.

        Args:
            names: metrics, in the order in which they are measured.
            command: of the metrics that the file holds, what a person types to get them again.
            about: of the run, such as its privacy.
            fresh: measure also what is there.
        Returns:
            The path of `evaluation.json`.
        Raises:
            RunDirectoryError: another process is at it, or nothing can be written.
        """
        place = self.folder / self.key
        place.mkdir(parents=True, exist_ok=True)
        with take_lock(place):
            done = {name: found for name in METRICS.names() if (found := _kept(place, name))}
            # What could not be measured is tried again: there may be a network now, or a package.
            left = [name for name in names if fresh or name not in done or "not_measured" in done[name]]
            if left:
                (place / "evaluation.json").unlink(missing_ok=True)  # until it is true again
            drawn: Pictures | None = None
            for number, name in enumerate(left, 1):
                self.on_metric(name, number, len(left))
                started = time.monotonic()
                try:
                    metric = METRICS.get(name).prepare(self.setting)  # what it lacks is told before a picture is drawn
                    drawn = drawn or self._draw(place)
                    found = self._as_table(place, name, metric.measure(drawn))
                except FedCanvasError as error:
                    found = {"not_measured": error.message, "hint": error.hint or ""}
                except Exception as error:  # a bug, ours or a library's: the other metrics are measured all the same
                    (place / f"{name}.log").write_text(traceback.format_exc(), encoding="utf-8")
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}"
                    found = {"not_measured": reason, "hint": f"the whole of it stands in {place / name}.log"}
                found["seconds"] = round(time.monotonic() - started, 2)
                found["versions"] = current_versions(LIBRARIES)
                write_whole(place / f"{name}.json", to_json(found))
                done[name] = found
            shown = {name: done[name] for name in METRICS.names() if name in done}
            return write_whole(place / "evaluation.json", to_json(self._document(shown, command(list(shown)), about)))

    def _draw(self, place: Path) -> Pictures:
        """The pictures that all metrics measure; a sheet of the first of each prompt is kept."""
        n, prompts, seed = self.request.n, self.model.prompts, self.request.seed
        self.setting.progress(f"drawing {n:,} pictures")
        asked = [prompts[place % len(prompts)] for place in range(n)]
        parts = []
        for start in range(0, n, DRAWN):
            rows = range(start, min(start + DRAWN, n))
            parts.append(pictures(self.model, [asked[row] for row in rows], seed=seed, indices=rows))
            self.setting.step(rows.stop, n)
        drawn = Pictures(np.concatenate(parts), asked, seed)
        cells, most = [], FEW_PICTURES if len(prompts) > MANY_PROMPTS else CLASS_PICTURES
        for number, prompt in enumerate(prompts[:MOST_PROMPTS]):
            rows_of = list(range(number, n, len(prompts)))[:most]
            if rows_of:
                cells.append(SheetCell(prompt, drawn.images[rows_of]))
        title = f"the first pictures of each prompt, seed {seed}"
        write_whole(place / "prompts.png", contact_sheet(cells, title=title), durable=False)
        return drawn

    def _as_table(self, place: Path, name: str, measured: Measurement) -> dict[str, Any]:
        galleries = []
        for gallery in measured.galleries:
            file = f"{name}-{gallery.name}.png"
            write_whole(place / file, _sheet(gallery), durable=False)
            galleries.append({"name": gallery.name, "title": gallery.title, "file": file})
        return as_table(measured, galleries)

    def _document(self, metrics: Mapping[str, Any], command: str, about: Mapping[str, Any]) -> dict[str, Any]:
        public, versions = self.setting.public, current_versions(LIBRARIES)
        # Said again only of what was measured with other libraries than these.
        metrics = {
            name: {key: value for key, value in found.items() if (key, value) != ("versions", versions)}
            for name, found in metrics.items()
        }
        parts = {name: len(getattr(public, name)) for name in ("fit", "reference", "floor", "test")}
        return {
            "format": FORMAT, "key": self.key, **about,
            "reference": {"name": public.name, "digest": public.digest, "parts": parts,
                          "test": public.test.name, "test_digest": public.test.digest},
            "n": self.request.n, "seed": self.request.seed, "request": asdict(self.request),
            "extractor": _extractors(metrics) or self.request.extractor, "conversions": list(self.conversions),
            "prompts_sheet": "prompts.png", "command": command, "versions": versions, "metrics": metrics,
        }  # fmt: skip


def as_table(measured: Measurement, galleries: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
    """A measurement as JSON holds it; its pictures are files beside."""
    return {
        "figures": [figure.to_dict() for figure in measured.figures],
        "tables": [asdict(table) for table in measured.tables],
        "galleries": list(galleries),
        "notes": list(measured.notes),
    }


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    return [Table(**table) for table in found.get("tables", [])]


def _sheet(gallery: Gallery) -> bytes:
    cells = [SheetCell(text, images[:1], images[1:] if len(images) > 1 else None) for text, images in gallery.rows]
    return contact_sheet(cells, title=gallery.title, least_width=GALLERY_WIDTH)


def _extractors(metrics: Mapping[str, Any]) -> str:
    """What made the features of the distances, as figures name it."""
    for name in ("fid", "kid", "prdc", "is", "nearest"):
        for figure in metrics.get(name, {}).get("figures", []):
            if figure.get("extractor"):
                return str(figure["extractor"])
    return ""


def _kept(place: Path, name: str) -> dict[str, Any] | None:
    path = place / f"{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # absent, or damaged: measured again
    return found if isinstance(found, dict) and ("figures" in found or "not_measured" in found) else None
