"""A site's own files but its ledger: its settings, its log, and the codes that left it.

Nothing here needs torch, so that commands that only read answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from traceback import extract_tb

from pydantic import ConfigDict, Field

from shared.config import Section, read_section, toml_value
from shared.errors import ConfigError, FedCanvasError
from shared.privacy.ledger import write_note
from shared.records import NAME, Confirmation, RefusalCode
from shared.tree import code_digest

SETTINGS = "site.toml"
LOG, CODES = "site.log", "refusals.jsonl"
SLOT_SECONDS = 10.0  # also where the site's own settings cannot be read
OVERFLOW_SHARE = 1e-3  # of a run's delta, for draws that are larger than the padded work
RELEASE_CODE = code_digest(Path(__file__).resolve().parents[1])


class SiteRefusal(Exception):
    """The site does not answer; `code` leaves it, `reason` goes to its own log."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class SiteConfig(Section):
    """`site.toml`: what only this site decides. Relative paths start at its folder."""

    model_config = ConfigDict(strict=True)

    site_id: str = Field(pattern=f"^(?:{NAME.pattern})$", description="Name of the site in replies and reports.")
    data: str = Field(min_length=1, description="Folder or file with the captioned images.")
    cache_dir: str = Field("cache", min_length=1, description="Where decoded images are kept.")
    indices: str | None = Field(None, description="A .npy of row numbers: only these rows are this site's.")
    lineage: str = Field(pattern=f"^(?:{NAME.pattern})$", description="Name of the records in the ledger.")
    store: str = Field("lineages", min_length=1, description="Folder with the ledgers of all lineages of this machine.")
    published_records: int | None = Field(
        None, ge=1, description="Units of this site, rounded up, as it may be told; the work of a step is padded by it."
    )
    slot_seconds: float = Field(
        SLOT_SECONDS, ge=0, le=3600, description="Seconds; a deployed site answers at the end of such a slot."
    )
    https_proxy: str | None = Field(
        None, min_length=1, description="Proxy to the federation's server, http://HOST:PORT; unset: HTTPS_PROXY."
    )
    simulated_seed: int | None = Field(
        None, ge=0, lt=2**63, description="Simulations only: seeds the draw and the noise; a deployed site refuses it."
    )

    @classmethod
    def read(cls, folder: Path) -> SiteConfig:
        path = folder / SETTINGS
        if not path.is_file():
            raise ConfigError(f"{folder} is no site: it has no {SETTINGS}", hint="name the folder of one site")
        return read_section(cls, path)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        values = self.model_dump(by_alias=True, exclude_none=True)
        lines = [f"{name} = {toml_value(value)}\n" for name, value in values.items()]
        write_note(folder / SETTINGS, "".join(lines), durable=self.simulated_seed is None)


def log_exception(folder: Path, error: BaseException) -> None:
    """Type and places of `error` to the site's log, and its text only where we wrote it: others quote data."""
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(extract_tb(error.__traceback__)))
    text = f": {error.message}" if isinstance(error, FedCanvasError) else ""
    log(folder, f"{type(error).__name__}{text} at {places}")


def log(folder: Path, text: str) -> None:
    _append_line(folder / LOG, f"{datetime.now(UTC).isoformat(timespec='seconds')} {' '.join(text.split())}")


def note_code(folder: Path, code: RefusalCode | Confirmation, run: str, server_round: int) -> None:
    """A line that a code left, for the receipts."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"time": now, "code": code.value, "run": run, "server_round": server_round}
    _append_line(folder / CODES, json.dumps(line))


def _append_line(path: Path, line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not decide whether a site answers
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")
