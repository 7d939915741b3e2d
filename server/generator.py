"""Pictures from prompts: the one way that the command, the API, the page and Python go.

    from fedcanvas import Generator
    pictures = Generator.load("model").generate(["a large red circle"], n=4, seed=1)
    pictures[0].image.save("circle.png")

Picture `index` of a prompt depends on the model, the prompt, the seed, the index and the truncation alone, not on what
else is drawn with it. A released model (`shared.bundle`) is verified before its first byte is used; a run directory
of one's own is read as it is. Not here: what a prompt is made of (`server.prompting`).
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import threading
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shared.bundle import CARD, UNREADABLE, is_bundle, load_bundle, read_unverified, verify
from shared.errors import BundleError, PromptError, UsageError
from shared.prompts import PromptPool, clean_prompt
from shared.rundir import GeneratorModel, load_model

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from server.prompting import PromptPipeline

MOST_SEED = 2**63 - 1
MOST_PICTURES = 100_000
ROWS = 8  # of every forward: kernels differ with the number of rows, and with them the last bit of a picture
UNVERIFIED = "UNVERIFIED"


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture and where it comes from.

    Attributes:
        array: `(H, W)` or `(H, W, 3)` uint8.
        about: what its PNG file says of it: prompt, seed, index, model digest, epsilon.
    """

    array: np.ndarray
    about: dict[str, str]

    @property
    def image(self) -> Image:
        from PIL import Image

        return Image.fromarray(self.array)

    def png(self) -> bytes:
        """A PNG file; the same picture gives the same bytes. Its text entries are those of `about`."""
        from PIL.PngImagePlugin import PngInfo

        entries = PngInfo()
        for key, value in self.about.items():
            entries.add_itxt(key, value)
        out = io.BytesIO()
        # Runs alone: half the time of the default at the same size (64 pictures of the demo).
        self.image.save(out, "PNG", pnginfo=entries, compress_type=zlib.Z_RLE)
        return out.getvalue()


class Generator:
    """A model that draws. Build it with `load`; threads may share it.

    Attributes:
        model: what was read.
        line: one line about where the model comes from, for people.
        verified: a released model whose digests and signatures hold.
        unverified: a released model whose evidence does not hold, or was not looked at.
    """

    def __init__(
        self, model: GeneratorModel, *, name: str, digest: str, line: str, verified: bool = False,
        unverified: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.name, self.digest, self.line = model, name, digest, line
        self.verified, self.unverified = verified, unverified
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, path: str | Path, *, releaser: str | None = None, unverified: bool = False, recompute: bool = False,
        text_encoder: Path | None = None,
    ) -> Self:  # fmt: skip
        """
        Args:
            path: a released model, a run directory, or its folder `model`.
            releaser: the fingerprint of the key that must have signed it; `None` takes any, which `line` names.
            unverified: take a released model even where it does not verify; every picture then says so.
            recompute: also compute epsilon from the sites' statements again, some seconds; without it the figure is as
                the releaser says.
            text_encoder: the folder of the text encoder, where the model needs one of `transformers` and its settings
                do not say where it lies here. A released model fetches none.
        Raises:
            BundleError: the released model was altered, its evidence does not hold, or `releaser` did not sign it.
            RunDirectoryError: there is no model.
            UsageError: `releaser` is given for a model that shall not be verified.
        """
        if not isinstance(path, str | Path):
            raise UsageError(f"a model is the path of a folder, not {type(path).__name__}")
        path = Path(path)
        if releaser is not None and unverified:
            raise UsageError(
                "whoever released a model that is not verified cannot be known", hint="leave out releaser or unverified"
            )
        if not is_bundle(path):
            model = load_model(path, text_encoder=text_encoder)
            if releaser is not None:
                raise BundleError(
                    f"{path} is a run's own model: nobody signed it, so neither did '{releaser}'",
                    hint="name a model that was made by `fedcanvas release`, or leave out the releaser",
                )
            return cls(model, name=path.resolve().name, digest=_digest(model), line=_own(path))
        if unverified:
            from shared.models import weights_digest

            model = read_unverified(path, text_encoder=text_encoder)
            line = f"{path}: NOT VERIFIED; whatever it says of itself may be false"
            # Of the weights that draw, whatever the card calls them.
            digest = weights_digest(model.generator)
            made = cls(model, name=path.resolve().name, digest=digest, line=line, unverified=True)
            try:
                _ = made.provenance, made.privacy["adjacency"]
            except UNREADABLE:
                raise BundleError(f"{path / CARD} does not say what the model cost in privacy") from None
            return made
        verified = verify(path, releaser=releaser, recompute=recompute)
        name = str(verified.card["name"])
        model = load_bundle(verified, text_encoder=text_encoder)
        return cls(model, name=name, digest=verified.digest, line=verified.line, verified=True)

    from_pretrained = load

    @cached_property
    def privacy(self) -> dict[str, Any]:
        """Of the card: `epsilon_max`, `delta`, `unit`, `adjacency`, as far as it says them."""
        card = self.model.card
        if (self.verified or self.unverified) and "privacy" in card:  # a released one; a run's own says what was spent
            privacy = dict(card["privacy"])
            return {**privacy, "epsilon_max": float(privacy["epsilon_max"])}  # JSON has no infinity: the text "inf"
        spent = card.get("spent") or {}
        return {
            "epsilon_max": float(spent.get("epsilon", "nan")), "delta": spent.get("delta"), "unit": spent.get("unit"),
            "adjacency": spent.get("adjacency"), "private": bool(card.get("plan", {}).get("private")),
        }  # fmt: skip

    @property
    def prompts(self) -> tuple[str, ...]:
        """The public prompts it was trained on."""
        return self.model.prompts

    @property
    def size(self) -> int:
        """Pixels of a side; it draws no other."""
        return int(self.model.config.data.image_size)

    @cached_property
    def pipeline(self) -> PromptPipeline:
        """Says a text in the model's own words, by rules: what `describe` of it gives can be drawn."""
        from server.prompting import PromptPipeline  # tables of words: a prompt in the model's words needs none

        return PromptPipeline(self.prompts)

    def pipeline_by(self, language_model: str) -> PromptPipeline:
        """`pipeline`, its descriptions written by a causal language model (id or folder); "" for rules."""
        from server.prompting import PromptPipeline

        return PromptPipeline(self.prompts, language_model=language_model) if language_model else self.pipeline

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """Each word of `prompt` that it was not trained on, to the nearest that it knows, nearest first; [] if none is.

        A picture says nothing reliable of such words. Only the first 16 words of a prompt are looked at.
        """
        return {} if self._written.issuperset(prompt.split()) else self.pipeline.unknown_words(prompt)

    @cached_property
    def _written(self) -> frozenset[str]:
        """What stands between blanks in its prompts."""
        return frozenset(word for prompt in self.prompts for word in prompt.split())

    def generate(
        self, prompts: Iterable[str], *, n: int = 1, seed: int = 0, truncation: float = 1.0
    ) -> list[Picture]:
        """`n` pictures of each prompt, prompt by prompt.

        Args:
            prompts: a list, or whatever else gives one text after another.
            seed: a whole number from 0 to 2**63 - 1. Another one, other pictures.
            truncation: from 0 to 1: latents are multiplied by it. Lower is more typical and less varied.
        Raises:
            PromptError: a prompt is empty, too long or no line of text.
            UsageError: an argument is out of range.
        """
        # Once: an iterator has nothing left for a second look.
        asked = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else None
        if asked is None or not all(isinstance(prompt, str) for prompt in asked):
            raise UsageError("the prompts are no list of texts", hint='for example generate(["a large red circle"])')
        cleaned = [clean_prompt(prompt) for prompt in asked]
        n = _whole(n, "a number of pictures", 1, MOST_PICTURES)
        if len(cleaned) * n > MOST_PICTURES:
            raise UsageError(f"{len(cleaned)} prompts times {n} pictures", hint=f"at most {MOST_PICTURES} in all")
        pairs = [(prompt, index) for prompt in cleaned for index in range(n)]
        texts, indices = [prompt for prompt, _ in pairs], [index for _, index in pairs]
        arrays = self.arrays(texts, seeds=[seed] * len(pairs), indices=indices, truncation=truncation)
        return [
            Picture(array, self.about(prompt, seed=seed, index=index, truncation=truncation))
            for (prompt, index), array in zip(pairs, arrays, strict=True)
        ]

    def arrays(
        self, prompts: Sequence[str], *, seeds: Sequence[int], indices: Sequence[int], truncation: float = 1.0
    ) -> np.ndarray:
        """`(N, H, W)` or `(N, H, W, 3)` uint8: picture i of prompt i, with the latents of (seeds[i], indices[i]).

        Raises:
            UsageError: a seed, an index or the truncation is out of range.
        """
        import torch

        from shared.adversarial import to_bytes
        from shared.models import draw_latents

        if not isinstance(truncation, int | float | np.floating) or not 0.0 <= truncation <= 1.0:
            raise UsageError(f"a truncation of {truncation} is not between 0 and 1")
        seeds = [_whole(seed, "a seed", 0, MOST_SEED) for seed in seeds]
        indices = [_whole(index, "a picture's index", 0, MOST_SEED) for index in indices]
        if not prompts:
            colours = () if self.model.config.data.channels == 1 else (self.model.config.data.channels,)
            return np.zeros((0, self.size, self.size, *colours), np.uint8)
        different = list(dict.fromkeys(prompts))
        rows = {prompt: row for row, prompt in enumerate(different)}
        parts = []
        with self._lock, torch.no_grad():
            encoded = self.model.encoder.encode(different)
            for start in range(0, len(prompts), ROWS):
                part = slice(start, start + ROWS)
                latents = torch.cat([
                    draw_latents(seed, [index], self.model.generator.latent_dim)
                    for seed, index in zip(seeds[part], indices[part], strict=True)
                ])  # fmt: skip
                embeddings = encoded[[rows[prompt] for prompt in prompts[part]]]
                drawn = self.model.generator(truncation * _full(latents), _full(embeddings))
                parts.append(to_bytes(drawn[: len(latents)]))
        pixels = np.concatenate(parts)
        return pixels[..., 0] if pixels.shape[-1] == 1 else pixels

    def about(self, prompt: str, *, seed: int, index: int, truncation: float) -> dict[str, str]:
        """What the file of a picture says of it: with the model that it names, enough to draw it again."""
        factor = repr(float(truncation)).removesuffix(".0")  # all its digits
        found = {"prompt": prompt, "seed": str(int(seed)), "index": str(int(index)), "truncation": factor}
        return {**found, **self.provenance}

    @cached_property
    def provenance(self) -> dict[str, str]:
        """What every picture says of the model."""
        privacy = self.privacy
        found = {
            "model": self.digest, "epsilon": f"{privacy['epsilon_max']:.4g}", "delta": f"{privacy['delta']}",
            "unit": str(privacy["unit"]), "software": "fedcanvas",
        }  # fmt: skip
        return {**found, "warning": UNVERIFIED} if self.unverified else found


def _whole(value: int, what: str, least: int, most: int) -> int:
    """`UsageError` for what is no whole number (a seed of 1.5 would pass for 1), or out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} is a whole number, not {value!r}") from None
    if not least <= number <= most:
        raise UsageError(f"{what} of {number} is not between {least} and {most}")
    return number


def _full(rows: Tensor) -> Tensor:
    """`(ROWS, ...)`: the rows, then the first again as often as it takes."""
    return rows[[*range(len(rows)), *[0] * (ROWS - len(rows))]]


def public_prompts(
    path: str | Path, *, releaser: str | None = None, unverified: bool = False
) -> tuple[tuple[str, ...], str]:  # fmt: skip
    """`prompts` and `line` of `Generator.load(path)`, with its errors; no model is built where words are enough."""
    path = Path(path)
    if is_bundle(path) and not unverified:
        verified = verify(path, releaser=releaser, recompute=False)
        return verified.prompts.texts, verified.line
    folder = path if (path / "model.json").is_file() else path / "model"
    try:
        prompts = json.loads((folder / "model.json").read_text(encoding="utf-8"))["prompts"]
        if not is_bundle(path) and releaser is None and isinstance(prompts, list):
            return PromptPool(tuple(prompts)).texts, _own(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, PromptError):
        pass  # whatever is wrong with it, `load` says it
    generator = Generator.load(path, releaser=releaser, unverified=unverified)
    return generator.prompts, generator.line


def _own(path: Path) -> str:
    return f"{path}: a run's own model, with no evidence beside it: `fedcanvas release` adds that"


def _digest(model: GeneratorModel) -> str:
    return hashlib.sha256(json.dumps(model.card.get("files", model.card), sort_keys=True).encode()).hexdigest()
