"""A run on disk: what was asked, what was spent, what came out; every file whole or absent.

    config.toml prompts.txt versions.json lock.txt run.json   written once, when the folder appears
    spent.jsonl        one line a started round attempt, on disk before its instructions leave
    events.jsonl       public figures of every round; no clock in it, so that equal runs have equal files
    sites.json         heads of the run in the sites' ledgers, as last replies carried them, and who left and why
    delivered.json     between institutions: what each site said to the released model, once it was offered
    statements/        SITE.json: what each site signed about its own spending (`shared.spend`)
    timings.jsonl      seconds of every round, never compared, never cut
    reference.json     where the public reference set lies on the server, if there is one
    checkpoints/       round-00050.safetensors, the last two
    releases/          noised sums that arrived after the last checkpoint but one
    samples/           round-00050.png
    model/             generator.safetensors (EMA), discriminator.safetensors, model.json
    result.json sheet.png report.html
    evaluations/       figures of the released model, a folder an evaluation (`server.evaluator`)

A SIGKILL at any moment, then `resume`, ends in the files of an undisturbed run (timings, and what `spent.jsonl`
counts twice, excepted). Rounds whose noised sum is in `releases/` are replayed from it: that is post-processing
and asks nothing of any site. Only a round that was charged and whose sum did not arrive is asked for again, and
that is charged again. Between institutions a power cut takes no sum either, since sites answer no round that is over.

Nothing of a site's images or captions is ever written here. Not covered: two machines that share the folder
(the lock is the kernel's), and a disk that loses what it confirmed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from shared import __version__, disk
from shared.config import RunConfig
from shared.disk import fsync_file, fsync_folder, write_whole
from shared.errors import BudgetExhausted, PromptError, RunDirectoryError
from shared.plain import plain
from shared.prompts import PromptPool

if TYPE_CHECKING:
    from torch import Tensor

    from shared.models import Generator
    from shared.text import CaptionEncoder

FORMAT = 1
KEPT_CHECKPOINTS = 2
MANIFEST, STATEMENTS, LOCK = "run.json", "statements", "lock.txt"
# What the arithmetic of a run depends on; another version may give other bits.
PACKAGES = ("torch", "numpy", "opacus", "opencv-python-headless", "flwr", "ray", "safetensors", "transformers")

# What a damaged or foreign model.json makes of the lines that read it.
_NO_CARD = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

EntropyKind = Literal["seeded", "system"]


class RunDirectory:
    """One run's folder. Build it with `create`, `resume` or `open`; use it as a context manager.

    Attributes:
        path: the folder.
        config: the run's settings, as in `config.toml`.
        prompts: the public prompts, in order.
        run_id: 16 hex digits, stable over restarts.
        entropy: "seeded" for simulations (not fit to release anything about private data), else "system".
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._lock: int | None = None
        if writable:
            self._lock = _take_lock(path)
        try:
            manifest = self._read_manifest()
            self.config = RunConfig.from_toml(path / "config.toml")
            self.prompts = tuple(self.read_text("prompts.txt").splitlines())
            self._check_inputs(manifest)
        except BaseException:
            self.close()
            raise
        self.run_id = str(manifest["run_id"])
        self.entropy: EntropyKind = manifest["entropy"]
        self._checkpoint: tuple[int, dict[str, Any]] | None = None

    # ---- appearing, continuing, reading

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        config: RunConfig,
        prompts: Sequence[str],
        entropy: EntropyKind = "seeded",
        run_id: str | None = None,
        documents: Mapping[str, Any] | None = None,
    ) -> RunDirectory:
        """A new run at `path`, locked; the folder appears with its inputs in it or not at all.

        Args:
            run_id: default is derived from config and prompts, so that equal simulations have equal files.
            documents: further JSON files to appear with it, name to content.
        Raises:
            RunDirectoryError: `path` exists and is not an empty folder, or cannot be written.
        """
        refuse_used(path)
        text = "".join(f"{prompt}\n" for prompt in prompts)
        digests = {"config": config.digest, "prompts": hashlib.sha256(text.encode()).hexdigest()}
        derived = hashlib.sha256("|".join(digests.values()).encode()).hexdigest()[:16]
        manifest = {"format": FORMAT, "run_id": run_id or derived, "entropy": entropy, "digests": digests}
        building = path.parent / f".{path.name}.creating"
        try:
            building.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(building)
            try:
                for leftover in building.iterdir():
                    if leftover.name != "lock":
                        _remove(leftover)
                write_whole(building / "config.toml", config.to_toml().encode())
                write_whole(building / "prompts.txt", text.encode())
                write_whole(building / "versions.json", to_json(current_versions()))
                write_whole(building / LOCK, installed_packages().encode())
                for name, content in (documents or {}).items():
                    write_whole(building / name, to_json(content))
                write_whole(building / MANIFEST, to_json(manifest))
                building.rename(path)
                fsync_folder(path.parent)
            finally:
                os.close(lock)
        except OSError as error:
            raise RunDirectoryError(f"run directory {path} cannot be made: {error.strerror or error}") from None
        return cls(path, writable=True)

    @classmethod
    def resume(
        cls, path: Path, *, config: RunConfig | None = None, prompts: Sequence[str] | None = None
    ) -> RunDirectory:
        """The run at `path`, locked, cut back to its last checkpoint.

        Args:
            config, prompts: when given, they must be those of the run.
        Raises:
            RunDirectoryError: none there, in use, of another config, other prompts or other versions.
        """
        run = cls(path, writable=True)
        try:
            run._refuse_differences(config, prompts)
            for leftover in path.rglob("*.tmp"):
                _remove(leftover)
            run._checkpoint, events_bytes = run._newest_checkpoint()
            if run._checkpoint is not None:
                run._remove_superseded()
            run._cut_line("spent.jsonl")
            run._cut_line("timings.jsonl")
            events = path / "events.jsonl"
            if events.exists():
                os.truncate(events, min(events_bytes, events.stat().st_size))
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run at `path` for reading, also while it is running. `RunDirectoryError` when there is none."""
        return cls(path, writable=False)

    @staticmethod
    def exists(path: Path) -> bool:
        return (path / MANIFEST).is_file()

    def close(self) -> None:
        """Lets another process resume. The folder is complete at every moment; there is nothing to flush."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For the time of the block another process of ours resumes and writes; then this one holds it again."""
        self.close()
        yield
        self._lock = _take_lock(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """`result.json` is written last, so its existence means that the rest is complete."""
        return (self.path / "result.json").is_file()

    # ---- files

    def write_bytes(self, name: str, content: bytes) -> Path:
        """`name` inside the folder, whole or absent; folders in between are made."""
        return write_whole(self.path / name, content)

    def write_json(self, name: str, content: Any) -> Path:
        return self.write_bytes(name, to_json(content))

    def read_text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{self.path / name} cannot be read: {error}") from None

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_text(name))
        except ValueError as error:
            raise RunDirectoryError(f"{self.path / name} is not JSON: {error}") from None

    def sample_name(self, server_round: int) -> str:
        return f"samples/round-{server_round:05d}.png"

    def sample_paths(self) -> list[tuple[int, Path]]:
        """(round, picture), in the order of rounds."""
        return [(int(p.stem.removeprefix("round-")), p) for p in sorted((self.path / "samples").glob("round-*.png"))]

    # ---- events and timings

    def append_event(self, event: Mapping[str, Any]) -> None:
        """One line of `events.jsonl`. Public, the same in every run with this seed: no clock, no host, no path.

        A round's events come before its checkpoint; what comes after the last checkpoint is cut at resume.
        """
        self._append("events.jsonl", event, durable=False)

    def events(self) -> list[dict[str, Any]]:
        return self._lines("events.jsonl")

    def append_timing(
        self, server_round: int, seconds: float, *, of: str = "round", traffic: tuple[int, int] = (0, 0)
    ) -> None:
        """Seconds of a round, or of what is done beside rounds ("quality": figures during training).

        Args:
            traffic: bytes to the sites and from them; none where a round is replayed from its release.
        """
        line: dict[str, Any] = {"server_round": server_round, "seconds": round(seconds, 4)}
        if any(traffic):
            line["bytes_down"], line["bytes_up"] = traffic
        self._append("timings.jsonl", line if of == "round" else {**line, "of": of}, durable=False)

    def timings(self, *, of: str = "round") -> list[dict[str, Any]]:
        return [line for line in self._lines("timings.jsonl") if line.get("of", "round") == of]

    # ---- what was spent

    def charge(self, server_round: int, *, steps: int, reserved_steps: int, instruction: str = "") -> int:
        """Counts an attempt of a round as spent, durably; call it before its instructions leave.

        Args:
            server_round: from 1; 0 is the warm start, which takes no steps.
            steps: DP-SGD steps of the attempt.
            reserved_steps: steps that the plan's epsilon covers, slack included.
            instruction: digest of what is asked for.
        Returns:
            The number of the attempt, from 1.
        Raises:
            BudgetExhausted: the plan covers no further attempt. Nothing is charged then.
        """
        spent = self.steps_charged()
        if spent + steps > reserved_steps:
            raise BudgetExhausted(
                f"round {server_round} needs {steps} more steps, {spent} of {reserved_steps} reserved steps are spent",
                hint="the plan's slack for retries is used up: start a new run with a larger privacy.retry-slack",
            )
        attempt = 1 + len([line for line in self.charges() if line["server_round"] == server_round])
        line = {"server_round": server_round, "attempt": attempt, "steps": steps, "instruction": instruction}
        self._append("spent.jsonl", line, durable=True)
        return attempt

    def charges(self) -> list[dict[str, Any]]:
        return self._lines("spent.jsonl")

    def steps_charged(self) -> int:
        return sum(int(line["steps"]) for line in self.charges())

    # ---- what sites said of themselves

    def remember_sites(self, heads: Mapping[str, str], left: Mapping[str, str], server_round: int) -> None:
        """Keeps the heads that replies carried, and the first refusal of a site."""
        durable = bool(left) or self.entropy == "system"
        known = self._sites()
        for site, code in left.items():
            known["left"].setdefault(site, {"server_round": server_round, "code": code})
        known["heads"].update(heads)
        # In a simulation a power cut may take the newest head: the one before it is a head that every site knows too.
        write_whole(self.path / "sites.json", to_json(known), durable=durable)

    def heads(self) -> dict[str, str]:
        """Site id to the head of the run that its last reply carried."""
        heads: dict[str, str] = self._sites()["heads"]
        return heads

    @property
    def lock_digest(self) -> str:
        """SHA-256 of `lock.txt`; "" where an earlier release made the run."""
        path = self.path / LOCK
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def sites_left(self) -> dict[str, dict[str, Any]]:
        """Site id to the round and the code of its refusal."""
        left: dict[str, dict[str, Any]] = self._sites()["left"]
        return left

    def _sites(self) -> dict[str, dict[str, Any]]:
        if not (self.path / "sites.json").is_file():
            return {"heads": {}, "left": {}}
        return dict(self.read_json("sites.json"))

    def note_delivery(self, site: str, code: str, time: str) -> None:
        """Keeps what a site said to the released model: that it has it, or its refusal's code."""
        self.write_json("delivered.json", {**self.deliveries(), site: {"code": code, "time": time}})

    def deliveries(self) -> dict[str, dict[str, str]]:
        """Site id to the code that it answered the offered model with last, and when."""
        return dict(self.read_json("delivered.json")) if (self.path / "delivered.json").is_file() else {}

    # ---- releases and checkpoints

    def save_release(self, server_round: int, total: np.ndarray, *, replies: int) -> None:
        """Keeps the noised sum of a round until two checkpoints hold what was made of it.

        Between institutions it is on disk when this returns: no site answers a round that is over.

        Args:
            total: int64 sum over sites, as it goes into the server's step. It has left the sites already.
        """
        from safetensors.numpy import save

        total = np.ascontiguousarray(total, dtype=np.int64)
        about = {"replies": replies, "digest": hashlib.sha256(total.tobytes()).hexdigest()}
        # No fsync in a simulation: its sites answer again what a power cut takes, and the digest finds a torn sum.
        durable = self.entropy == "system"
        write_whole(self._release_path(server_round), save({"total": total}, _about(about)), durable=durable)

    def load_release(self, server_round: int) -> tuple[np.ndarray, int] | None:
        """(total, replies) of a round that was released before the run was interrupted, or `None`."""
        from safetensors import SafetensorError, safe_open

        path = self._release_path(server_round)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                total, about = file.get_tensor("total"), json.loads(file.metadata()["about"])
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        if hashlib.sha256(total.tobytes()).hexdigest() != about.get("digest"):
            return None
        return total, int(about["replies"])

    def save_checkpoint(self, server_round: int, state: Mapping[str, Any]) -> None:
        """All that a resume needs after `server_round` (0: after the warm start); the last two are kept.

        Args:
            state: nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans and `None`.
        """
        from safetensors.torch import save

        events = self.path / "events.jsonl"
        if events.exists():
            fsync_file(events)
        tensors: dict[str, Tensor] = {}
        tree = _to_tree(state, tensors)
        about = {
            "format": FORMAT,
            "server_round": server_round,
            "events_bytes": events.stat().st_size if events.exists() else 0,
            "state": tree,
        }
        write_whole(self._checkpoint_path(server_round), save(tensors, _about(about)))
        self._remove_superseded()

    def load_latest_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """(round, state) that `resume` went back to; `None` for a run that has none yet."""
        return self._checkpoint

    # ---- the released model

    def save_model(
        self,
        *,
        generator: Mapping[str, Tensor],
        discriminator: Mapping[str, Tensor],
        card: Mapping[str, Any],
    ) -> Path:
        """The folder `model/`; `model.json` comes last and names the SHA-256 of the weights.

        Args:
            generator, discriminator: state dicts; the generator is the moving average (EMA).
            card: encoder fingerprint, epsilon and whatever a reader must know; config and prompts are added.
        """
        from safetensors.torch import save

        digests = {}
        for name, weights in (("generator", generator), ("discriminator", discriminator)):
            content = save({key: value.detach().cpu().contiguous().clone() for key, value in sorted(weights.items())})
            self.write_bytes(f"model/{name}.safetensors", content)
            digests[f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
        manifest = {
            "format": FORMAT,
            "fedcanvas": __version__,
            "run_id": self.run_id,
            **card,
            "files": digests,
            "config": json.loads(self.config.to_json()),
            "prompts": list(self.prompts),
        }
        self.write_json("model/model.json", manifest)
        return self.path / "model"

    # ---- inside

    def _read_manifest(self) -> dict[str, Any]:
        if not self.exists(self.path):
            raise RunDirectoryError(
                f"no run directory at {self.path}",
                hint="a run directory is what --out of `fedcanvas simulate` named",
            )
        manifest = self.read_json(MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise RunDirectoryError(
                f"{self.path} has another format than this release reads",
                hint="use the release that made it: see its versions.json",
            )
        return manifest

    def _check_inputs(self, manifest: Mapping[str, Any]) -> None:
        prompts = hashlib.sha256((self.path / "prompts.txt").read_bytes()).hexdigest()
        for name, digest in (("config.toml", self.config.digest), ("prompts.txt", prompts)):
            if manifest["digests"][name.partition(".")[0]] != digest:
                raise RunDirectoryError(
                    f"{self.path / name} was changed after the run began",
                    hint="put it back as it was, or start a new run: a plan is frozen before its first release",
                )

    def _refuse_differences(self, config: RunConfig | None, prompts: Sequence[str] | None) -> None:
        if config is not None and config.digest != self.config.digest:
            mine, theirs = self.config.to_flat(), config.to_flat()
            keys = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
            changes = ", ".join(f"{key} {mine.get(key, 'unset')} -> {theirs.get(key, 'unset')}" for key in keys)
            raise RunDirectoryError(
                f"{self.path} was started with other settings: {changes}",
                hint="leave the options out to continue the run as it is, or name a new --out",
            )
        if prompts is not None and tuple(prompts) != self.prompts:
            raise RunDirectoryError(
                f"{self.path} was started with other prompts",
                hint="leave --prompts out to continue the run as it is, or name a new --out",
            )
        then, now = self.read_json("versions.json"), current_versions()
        changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if changed:
            listed = ", ".join(f"{name} {then.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in changed)
            raise RunDirectoryError(
                f"{self.path} was started with other versions: {listed}",
                hint="install the versions in its versions.json, or start a new run: other versions give other bits",
            )

    def _newest_checkpoint(self) -> tuple[tuple[int, dict[str, Any]] | None, int]:
        from safetensors import SafetensorError, safe_open

        for path in reversed(self._checkpoint_paths()):
            try:
                with safe_open(path, framework="pt") as file:
                    about = json.loads(file.metadata()["about"])
                    state = _from_tree(about["state"], file)
                return (int(about["server_round"]), state), int(about["events_bytes"])
            except (SafetensorError, OSError, ValueError, KeyError):
                continue  # damaged on disk: the one before it is as good, only older
        return None, 0

    def _remove_superseded(self) -> None:
        """What no resume can need: where the newest checkpoint is damaged, the one before it goes on from the sums."""
        paths = self._checkpoint_paths()
        for old in paths[:-KEPT_CHECKPOINTS]:
            _remove(old)
        since = _round_of(paths[-KEPT_CHECKPOINTS]) if len(paths) >= KEPT_CHECKPOINTS else -1
        for release in sorted((self.path / "releases").glob("round-*.safetensors")):
            if _round_of(release) <= since:
                _remove(release)

    def _checkpoint_path(self, server_round: int) -> Path:
        return self.path / "checkpoints" / f"round-{server_round:05d}.safetensors"

    def _checkpoint_paths(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), key=_round_of)

    def _release_path(self, server_round: int) -> Path:
        return self.path / "releases" / f"round-{server_round:05d}.safetensors"

    def _append(self, name: str, line: Mapping[str, Any], *, durable: bool) -> None:
        assert self._lock is not None, "opened for reading"
        path = self.path / name
        content = (json.dumps(plain(line), ensure_ascii=False) + "\n").encode()
        try:
            appeared = not path.exists()
            with path.open("ab", buffering=0) as file:
                file.write(content)
                if durable:
                    os.fsync(file.fileno())
            if durable and appeared:
                fsync_folder(self.path)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}") from None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Every whole line; a torn last one was never promised to anyone."""
        path = self.path / name
        if not path.exists():
            return []
        *whole, _torn = self.read_text(name).split("\n")
        try:
            return [json.loads(line) for line in whole]
        except ValueError:
            raise RunDirectoryError(
                f"{path} is damaged", hint="put it back as it was: what was spent is read from it"
            ) from None

    def _cut_line(self, name: str) -> None:
        path = self.path / name
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)


def reference_cache(run: Path) -> Path:
    """Beside the runs, by content: the next run with this public set need not train its classifier again."""
    return run.resolve().parent / ".fedcanvas-reference"


@dataclass(frozen=True)
class GeneratorModel:
    """A released generator with all that a prompt needs to become a picture.

    Attributes:
        generator: EMA weights, in evaluation mode, without gradients.
        encoder: the frozen text encoder it was trained with.
        config: the run's settings.
        prompts: the public prompts it was trained on.
        card: `model.json`: epsilon, fingerprints, digests.
    """

    generator: Generator
    encoder: CaptionEncoder
    config: RunConfig
    prompts: tuple[str, ...]
    card: dict[str, Any]


def load_model(path: Path, *, text_encoder: Path | None = None) -> GeneratorModel:
    """The released model in a run directory or in its `model/` folder; reading it runs no code.

    Args:
        text_encoder: as in `build_model`.
    Raises:
        RunDirectoryError: there is none, the run is not finished, or a file was damaged.
    """
    folder = path if (path / "model.json").is_file() else path / "model"
    if not (folder / "model.json").is_file():
        if RunDirectory.exists(path):
            raise RunDirectoryError(
                f"the run in {path} is not finished, it has no model yet",
                hint=f"finish it: `fedcanvas simulate --resume --out {path}`",
            )
        raise RunDirectoryError(
            f"no model at {path}", hint="name a run directory, or the folder `model` in one that is finished"
        )
    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        content = (folder / "generator.safetensors").read_bytes()
        intact = hashlib.sha256(content).hexdigest() == card["files"]["generator.safetensors"]
        config = RunConfig.from_table(card["config"], origin=str(folder / "model.json"))
        if not isinstance(card["prompts"], list):
            raise TypeError("its prompts are no list")  # a text would pass for prompts of one letter
        prompts, fingerprint = PromptPool(tuple(card["prompts"])).texts, str(card["encoder_fingerprint"])
        _check_cost(card)
    except OSError as error:
        raise RunDirectoryError(f"the model in {folder} cannot be read: {error}") from None
    except (*_NO_CARD, PromptError) as error:
        raise RunDirectoryError(
            f"{folder / 'model.json'} is damaged: {type(error).__name__}: {error}",
            hint="copy the folder again, from where it was made",
        ) from None
    if not intact:
        raise RunDirectoryError(
            f"{folder / 'generator.safetensors'} is not the file that model.json names",
            hint="copy the folder again, from where it was made",
        )
    return build_model(
        content, config=config, prompts=prompts, encoder_fingerprint=fingerprint, card=card, where=str(folder),
        text_encoder=text_encoder,
    )  # fmt: skip


def _check_cost(card: Mapping[str, Any]) -> None:
    """Raises unless what the card says of its cost in privacy, if anything, is of the types that `save_model` wrote."""
    spent, plan = card.get("spent") or {}, card.get("plan", {})
    if not isinstance(spent, dict) or not isinstance(plan, dict):
        raise TypeError("'spent' and 'plan' are no tables")
    if not spent:
        return
    for name in ("epsilon", "delta"):
        figure = spent[name]
        if not (type(figure) in (int, float) or figure == "inf") or not float(figure) >= 0:
            raise ValueError(f"'spent.{name}' is no number from 0")
    if not all(isinstance(spent[name], str) for name in ("unit", "adjacency")):
        raise TypeError("'spent' names no unit or adjacency")


def build_model(
    content: bytes, *, config: RunConfig, prompts: tuple[str, ...], encoder_fingerprint: str, card: dict[str, Any],
    where: str, text_encoder: Path | None = None, local_only: bool = False,
) -> GeneratorModel:  # fmt: skip
    """
    Args:
        content: safetensors of the generator.
        text_encoder: where the text encoder lies, in place of what the settings say.
        local_only: no hub is asked for it.
        where: names the model to a person.
    Raises:
        RunDirectoryError: the weights do not fit the settings or are not finite, or the encoder is another one here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from shared.models import build_generator
    from shared.text import build_encoder

    config = config.replaced({"compute.device": "cpu"})  # a picture is the same wherever it is drawn
    text = config.text if text_encoder is None else config.text.model_copy(update={"path": str(text_encoder)})
    encoder = build_encoder(text, local_only=local_only)
    if encoder.fingerprint != encoder_fingerprint:
        raise RunDirectoryError(
            f"the text encoder here is not the one that {where} was trained with",
            hint=f"its settings name {config.text.path or config.text.encoder}: get that one, or name its folder"
            " with --text-encoder",
        )
    generator = build_generator(config, embedding_dim=encoder.dim)
    try:
        weights = load(content)
        finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
        if finite:
            generator.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        raise RunDirectoryError(f"the weights of {where} are not of the model that its settings make") from error
    if not finite:
        raise RunDirectoryError(
            f"the generator of {where} has weights that are not finite: it can draw nothing",
            hint="the training went wrong; look at its report, and train again",
        )
    return GeneratorModel(generator.eval().requires_grad_(False), encoder, config, prompts, card)


def check_model(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The card of a released model that came from elsewhere, once its files are those that it names.

    Reading it runs no code, and builds no model: that is for `load_model`, when somebody wants pictures.

    Args:
        files: `model.json` and both files of weights, by name.
    Raises:
        RunDirectoryError: the card is none, names other weights, or the weights are no finite tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    weights = {name: content for name, content in files.items() if name != "model.json"}
    try:
        card = json.loads(files["model.json"])
        intact = card["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()}
        if not intact:
            raise RunDirectoryError("the weights are not those that model.json names")
        for name, content in weights.items():
            if not all(bool(tensor.isfinite().all()) for tensor in load(content).values()):
                raise RunDirectoryError(f"{name} holds weights that are not finite")
    except (SafetensorError, RecursionError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"it is no released model: {type(error).__name__}") from None
    return dict(card)


def to_json(content: Any) -> bytes:
    """Indented JSON that every reader takes; an infinite number is written as the string "inf"."""
    return (json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def current_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """What a run's bits depend on: this release, Python, the machine's kind, and the libraries that compute."""
    versions = {"fedcanvas": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def installed_packages() -> str:
    """All packages that are installed here, `name==version` a line: the lock that this process runs with."""
    found = {
        f"{str(each.metadata['Name']).lower().replace('_', '-')}=={each.version}"
        for each in importlib.metadata.distributions()
    }
    return "".join(f"{line}\n" for line in sorted(found))


def _about(content: Mapping[str, Any]) -> dict[str, str]:
    """One entry of safetensors metadata: several would be written in an order that changes from run to run."""
    return {"about": json.dumps(content)}


def _to_tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested state to JSON, tensors moved to `tensors` under numbered names; tagged, so that kinds come back."""
    import torch

    if isinstance(value, Mapping):
        return {"dict": [[_to_tree(key, tensors), _to_tree(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_to_tree(inner, tensors) for inner in value]}
    if isinstance(value, torch.Tensor | np.ndarray):
        name = f"{len(tensors):05d}"
        tensors[name] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        return {"tensor" if isinstance(value, torch.Tensor) else "array": name}
    if isinstance(value, np.generic):
        value = value.item()
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value)} in a checkpoint"
    return value


def _from_tree(tree: Any, file: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "dict":
        return {_from_tree(key, file): _from_tree(value, file) for key, value in inner}
    if kind in ("list", "tuple"):
        items = [_from_tree(value, file) for value in inner]
        return items if kind == "list" else tuple(items)
    tensor = file.get_tensor(inner)
    return tensor if kind == "tensor" else tensor.numpy()


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def refuse_used(path: Path) -> None:
    """`RunDirectoryError` unless `path` is free for a new run: absent, or an empty folder."""
    if RunDirectory.exists(path):
        raise RunDirectoryError(
            f"{path} holds a run already", hint="add --resume to continue it, or name another --out"
        )
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file", hint="name a folder that is new or empty")
    if path.is_dir() and any(path.iterdir()):
        raise RunDirectoryError(f"{path} is not empty", hint="name a folder that is new or empty")


def _take_lock(path: Path) -> int:
    """An open descriptor that holds the folder's lock; the kernel drops it when the process ends."""
    if not path.is_dir():
        raise RunDirectoryError(
            f"no run directory at {path}", hint="a run directory is what --out of `fedcanvas simulate` named"
        )
    busy = RunDirectoryError(f"{path} is in use by another process", hint="wait until it ends, or stop it")
    try:
        return disk.take_lock(path / "lock", busy)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def take_lock(path: Path) -> Iterator[None]:
    """Holds the lock of a folder for the time of the block; `RunDirectoryError` where another process does."""
    lock = _take_lock(path)
    try:
        yield
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
