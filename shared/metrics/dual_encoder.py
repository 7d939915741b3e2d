"""Pictures and texts as unit vectors of one space, so that their cosine says how well they fit.

    PATH or id     a CLIP-like model of `transformers` (CLIP, SigLIP, a VisionTextDualEncoder, ...): its own space
    VIT+TEXT       a model of pictures and a model of texts that have never met, each a path or an id

Two models get a common space by two linear maps, fitted in closed form on the captioned pictures of the part `fit`:
canonical correlation analysis, its ridge and weights chosen on every fifth of those pictures. The models stay as they
are, and no picture of another part is looked at. Figures of such a space are no published CLIP scores: they say
"fitted on", and may be compared with figures of the same fingerprint only.
Not covered: whether a model understands the pictures at all. Figures stand beside those of real pictures for that.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch

from shared.config import TextConfig
from shared.errors import DataError
from shared.metrics.public_sets import Part
from shared.text import (
    VOLATILE_SETTINGS,
    CaptionEncoder,
    build_encoder,
    check_vocabulary,
    quiet_transformers,
    tokenizer_state,
)

if TYPE_CHECKING:
    from shared.metrics import Pictures, Setting

VERSION = 1  # of all that decides a vector beside the models: a change of anything below needs another
BATCH = 32  # pictures or texts
MAX_TOKENS = 256
PADDED_TO_THE_END = {"siglip", "siglip2", "tipsv2"}  # were trained so, and give other vectors to shorter rows
MOST_FITTED = 5_000  # pictures of the part `fit` that the maps are fitted on
MOST_CAPTIONS = 5  # of each of them
HELD_OUT = 5  # every fifth picture judges ridges and weights
RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # the strongest first: it wins a tie
WEIGHTS = (1.0, 2.0, 4.0)  # power of a direction's correlation that the direction is scaled by
MOST_DIRECTIONS = 256
SAME = 1e-9  # a smaller spread, relative to the features, is rounding

EXAMPLE = "--clip openai/clip-vit-base-patch32"
SAVED = "a folder holds config.json, weights in safetensors, tokenizer and preprocessor_config.json, as save_pretrained"


class Towers(Protocol):
    """Pictures to features and texts to features, which may be of different spaces."""

    @property
    def kind(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def pictures(self, images: np.ndarray) -> np.ndarray:
        """Of `(B, H, W, C)` uint8, grey or colour: `(B, D)` float32."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(B, D')` float32."""
        ...


@dataclass(frozen=True, eq=False)
class Maps:
    """Linear maps of two models' features into one space of K directions; see `fit_maps`.

    Attributes:
        picture_map: `(D, K)` float64; `picture_mean` `(D,)` is taken off before.
        text_map: `(D', K)` float64; `text_mean` `(D',)` is taken off before.
    """

    picture_mean: np.ndarray
    picture_map: np.ndarray
    text_mean: np.ndarray
    text_map: np.ndarray

    def pictures(self, features: np.ndarray) -> np.ndarray:
        mapped: np.ndarray = (features - self.picture_mean) @ self.picture_map
        return mapped

    def texts(self, features: np.ndarray) -> np.ndarray:
        mapped: np.ndarray = (features - self.text_mean) @ self.text_map
        return mapped


@dataclass(frozen=True, eq=False)
class DualEncoder:
    """Fixed: the same vectors on every call.

    Attributes:
        name: kind and fingerprint as figures quote them, such as "clip 3f9a01c2"; of two models also what their maps
            were fitted on.
        fingerprint: SHA-256 over weights, settings and what the maps are fitted on, 64 hex digits.
        maps: of two models; `None` where the model has a space of its own.
        fitted_on: the public pictures that the maps were fitted on; "" without maps.
    """

    towers: Towers
    name: str
    fingerprint: str
    maps: Maps | None = None
    fitted_on: str = ""
    _known: dict[str, np.ndarray] = field(default_factory=dict)

    def pictures(self, images: np.ndarray, *, setting: Setting) -> np.ndarray:
        """`(N, H, W, C)` uint8, grey or colour, any size, to `(N, E)` float32 of L2 norm 1.

        A vector of nothing but zeros stays one: its cosine with everything is 0.
        """
        rows = _in_batches(
            images, self.towers.pictures, what=f"embedding {len(images)} pictures with {self.name}", setting=setting
        )
        return self._unit(rows if self.maps is None else self.maps.pictures(rows), "pictures")

    def texts(self, texts: Sequence[str], *, setting: Setting) -> np.ndarray:
        """`(N, E)` float32 of L2 norm 1; each different text is embedded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            rows = _in_batches(
                new, self.towers.texts, what=f"embedding {len(new)} texts with {self.name}", setting=setting
            )
            rows = self._unit(rows if self.maps is None else self.maps.texts(rows), "texts")
            self._known.update(zip(new, rows, strict=True))
        return np.stack([self._known[text] for text in texts])

    def _unit(self, rows: np.ndarray, what: str) -> np.ndarray:
        norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(norms).all():
            raise _not_finite(f"{self.name} embeds {what} as numbers that are not finite")
        unit: np.ndarray = (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)
        return unit


@dataclass(frozen=True, eq=False)
class Embedded:
    """N pictures and the P different texts that belong to them.

    Attributes:
        pictures: `(N, E)` float32, rows of L2 norm 1.
        texts: `(P, E)` float32, rows of L2 norm 1.
        words: the P texts.
        own: `(N,)` int64, the row of each picture's text.
    """

    pictures: np.ndarray
    texts: np.ndarray
    words: list[str]
    own: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    @classmethod
    def of(cls, pictures: np.ndarray, words: Sequence[str], texts: np.ndarray) -> Self:
        """`words[i]` belongs to picture i, and `texts` holds a row for each different one, in order of appearance."""
        places = {text: place for place, text in enumerate(dict.fromkeys(words))}
        return cls(pictures, texts, list(places), np.array([places[text] for text in words], np.int64))

    def only(self, rows: np.ndarray) -> Embedded:
        """The pictures of `rows`, and the texts that belong to one of them."""
        kept = list(dict.fromkeys(self.own[rows].tolist()))
        return Embedded.of(self.pictures[rows], [self.words[own] for own in self.own[rows]], self.texts[kept])


def dual_encoder(setting: Setting) -> DualEncoder:
    """What `setting.dual_encoder` names; built once.

    Raises:
        DataError: nothing is named, it cannot be had, or it does not embed both pictures and texts.
    """
    return setting.once("dual encoder", lambda: build(setting))


def embedded(setting: Setting, of: Part | Pictures) -> Embedded:
    """Public pictures with their first captions, or generated ones with their prompts; computed once.

    Vectors of public pictures are kept in `cache_dir`.
    """
    encoder = dual_encoder(setting)
    words = [captions[0] for captions in of.captions] if isinstance(of, Part) else list(of.prompts)
    assert len(words) == len(of.images)

    def make() -> dict[str, np.ndarray]:
        pictures = encoder.pictures(of.images, setting=setting)
        return {"pictures": pictures, "texts": encoder.texts(list(dict.fromkeys(words)), setting=setting)}

    def build_one() -> Embedded:
        cache = setting.cache_dir if isinstance(of, Part) else None
        path = cache / f"embedded-{encoder.fingerprint[:16]}-{of.digest[:24]}.safetensors" if cache else None
        rows = _cached(path, make, lengths={"pictures": len(words), "texts": len(set(words))})
        return Embedded.of(rows["pictures"], words, rows["texts"])

    return setting.once(f"embedded {of.digest}", build_one)


def build(setting: Setting) -> DualEncoder:
    """See `dual_encoder`."""
    named = setting.dual_encoder
    if not named:
        raise DataError(
            "no CLIP model was named: --clip PATH or id",
            hint=f"such as {EXAMPLE}; two models of their own, VIT+TEXT, are fitted to each other on the public set",
        )
    halves = halves_of(named)
    setting.progress(f"loading {named}")  # half a minute where the hub does not answer
    if halves is None:
        model = CommonModel.load(named)
        fingerprint = hashlib.sha256(f"{VERSION} {model.fingerprint}".encode()).hexdigest()
        return DualEncoder(model, f"{model.kind} {fingerprint[:8]}", fingerprint)
    pair = Pair.load(*halves)
    fit = setting.public.fit.first(MOST_FITTED)
    fingerprint = hashlib.sha256(f"{VERSION} {pair.fingerprint} {fit.digest}".encode()).hexdigest()
    path = setting.cache_dir / f"maps-{fingerprint[:40]}.safetensors" if setting.cache_dir else None
    names = dict.fromkeys(Maps.__annotations__)
    maps = Maps(**_cached(path, lambda: asdict(_fitted(pair, fit, setting)), lengths=names))
    name = f"{pair.kind} {fingerprint[:8]} fitted on {fit.name}"
    return DualEncoder(pair, name, fingerprint, maps, fit.name)


def halves_of(named: str) -> tuple[str, str] | None:
    """The two models of "VIT+TEXT"; `None` where one is named, such as a folder with a plus sign in its name."""
    if "+" not in named or Path(named).is_dir():
        return None
    cuts = [(named[:place], named[place + 1 :]) for place, sign in enumerate(named) if sign == "+"]
    folders = [cut for cut in cuts if all(Path(half).is_dir() for half in cut)]
    vision, text = (folders or cuts)[0]
    if not vision or not text:
        raise DataError(f"'{named}' names one model and a plus sign", hint="two models are named as VIT+TEXT")
    return vision, text


# ---- models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CommonModel:
    """One model of `transformers` with a space of its own for pictures and texts."""

    model: Any
    processor: Any
    tokenizer: Any
    kind: str
    fingerprint: str

    @classmethod
    def load(cls, path: str) -> Self:
        model, missing = _load_model(path)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            lacking = "texts" if _reads_pictures(model) else "pictures"
            raise DataError(
                f"the {model.config.model_type} model at {path} embeds no {lacking}",
                hint=f"name a CLIP-like model, such as {EXAMPLE}, or two models: --clip VIT+TEXT",
            )
        _refuse_missing(missing, path)
        processor, tokenizer = _load_processor(path), _load_tokenizer(path)
        check_vocabulary(getattr(model, "text_model", model), tokenizer, path)
        fingerprint = _fingerprint(model, _processor_state(processor), tokenizer_state(tokenizer))
        found = cls(model, processor, tokenizer, str(model.config.model_type), fingerprint)
        _try(found, path, same_space=True)
        return found

    @torch.no_grad()
    def pictures(self, images: np.ndarray) -> np.ndarray:
        method = self.model.get_image_features
        return _pooled(method(**_accepted(method, _pixels(self.processor, images))))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        settings = self.model.config.get_text_config()
        positions = getattr(settings, "max_position_embeddings", None) or MAX_TOKENS
        tokens = self.tokenizer(
            [text.encode("utf-8", "replace").decode() for text in texts],  # half a surrogate pair is refused
            padding="max_length" if self.kind in PADDED_TO_THE_END else True, truncation=True,
            max_length=min(MAX_TOKENS, self.tokenizer.model_max_length, positions), return_tensors="pt",
        )  # fmt: skip
        method = self.model.get_text_features
        return _pooled(method(**_accepted(method, tokens)))


@dataclass(frozen=True, eq=False)
class Pair:
    """A model of pictures and a model of texts, each with its own features."""

    model: Any
    processor: Any
    encoder: CaptionEncoder
    kind: str
    fingerprint: str

    @classmethod
    def load(cls, vision: str, text: str) -> Self:
        model, missing = _load_model(vision)
        if not _reads_pictures(model):
            raise DataError(
                f"the {model.config.model_type} model at {vision} reads no pictures",
                hint="--clip VIT+TEXT names the model of pictures first",
            )
        _refuse_missing({name for name in missing if "pooler." not in name}, vision)  # no feature depends on a pooler
        processor = _load_processor(vision)
        try:
            encoder = build_encoder(TextConfig(encoder="transformers", path=text))
        except DataError as error:
            raise DataError(
                error.message,
                hint="--clip VIT+TEXT names the model of texts last, such as BERT or MiniLM; a folder holds"
                " config.json, weights in safetensors and tokenizer",
            ) from None
        of_vision = _fingerprint(model, _processor_state(processor), without="pooler.")
        fingerprint = hashlib.sha256(f"{of_vision} {encoder.fingerprint}".encode()).hexdigest()
        found = cls(model, processor, encoder, f"{model.config.model_type}+{Path(text).name}", fingerprint)
        _try(found, vision, same_space=False)
        return found

    @torch.no_grad()
    def pictures(self, images: np.ndarray) -> np.ndarray:
        """The first token beside the mean of all, or the mean over the places of a feature map."""
        if hasattr(self.model, "get_image_features"):
            method = self.model.get_image_features
            return _pooled(method(**_accepted(method, _pixels(self.processor, images))))
        output = self.model(**_accepted(self.model.forward, _pixels(self.processor, images)))
        hidden = output.last_hidden_state  # (B, tokens, D) or (B, D, H, W)
        if hidden.ndim == 4:
            return _array(hidden.mean(dim=(2, 3)))
        return _array(torch.cat([hidden[:, 0], hidden.mean(dim=1)], dim=1))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return _array(self.encoder.encode(texts))


def _load_model(path: str) -> tuple[Any, set[str]]:
    """The model, and the names of the weights that it lacks."""
    local = Path(path).is_dir()
    if not local and (Path(path).exists() or path.startswith(("/", ".", "~"))):
        raise DataError(f"no folder {path}", hint=f"{SAVED} writes them; or name an id: {EXAMPLE}")
    if local and not (Path(path) / "config.json").is_file():
        raise DataError(f"there is no model in the folder {path}: no config.json", hint=f"{SAVED} writes them")
    # Nothing that comes with a model runs as code, and a folder is enough: no network for it.
    source: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        transformers = quiet_transformers()
        settings = transformers.AutoConfig.from_pretrained(path, **source)
        model, report = transformers.AutoModel.from_pretrained(
            path, config=settings, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **source
        )
    except ImportError as error:
        raise DataError(
            f"transformers cannot load the model at {path}: {_reason(error)}",
            hint="a package is missing or does not fit another, often torchvision and torch: `python -c 'import"
            " torchvision'` shows whether it is that",
        ) from None
    except Exception as error:  # whatever a foreign folder makes a foreign library raise
        if not local and isinstance(error, OSError) and "connect" in str(error):
            raise DataError(
                f"the model {path} is not on this machine, and huggingface.co cannot be reached",
                hint=f"where there is a network: `hf download {path} --local-dir FOLDER`; then name FOLDER here",
            ) from None
        raise DataError(f"no transformers model at {path}: {_reason(error)}", hint=f"{SAVED} writes them") from None
    model = model.float().eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _not_finite(f"the model at {path} has weights that are not finite, {name} among them")
    return model, {str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])}


def _load_processor(path: str) -> Any:
    try:
        # Pillow's arithmetic, which every installation has: the same pixels whether or not torchvision is there.
        return quiet_transformers().AutoImageProcessor.from_pretrained(
            path, backend="pil", local_files_only=Path(path).is_dir(), trust_remote_code=False
        )
    except Exception as error:
        raise DataError(
            f"the model at {path} does not say how pictures are prepared for it: {_reason(error)}",
            hint="preprocessor_config.json belongs beside config.json: save the image processor into the folder too",
        ) from None


def _load_tokenizer(path: str) -> Any:
    try:
        return quiet_transformers().AutoTokenizer.from_pretrained(
            path, local_files_only=Path(path).is_dir(), trust_remote_code=False
        )
    except Exception as error:
        raise DataError(
            f"the model at {path} has no tokenizer: {_reason(error)}",
            hint="save model and tokenizer into one folder with save_pretrained",
        ) from None


def _refuse_missing(missing: set[str], path: str) -> None:
    if missing:  # transformers fills them with random numbers, others in each process
        raise DataError(
            f"the model at {path} lacks weights, {min(missing)} among them",
            hint="save the whole model again with save_pretrained",
        )


def _try(towers: Towers, path: str, *, same_space: bool) -> None:
    """Two grey pictures and two texts, so that what a foreign model raises comes before the long work."""
    try:
        pictures = towers.pictures(np.full((2, 32, 32, 3), 128, np.uint8))
        texts = towers.texts(["a", "a red circle"])
    except Exception as error:
        raise DataError(
            f"the {towers.kind} model at {path} cannot embed a picture and a text: {_reason(error)}",
            hint=f"name a CLIP-like model, such as {EXAMPLE}, or two models: --clip VIT+TEXT",
        ) from None
    fits = pictures.shape[1:] == texts.shape[1:] if same_space else True
    if pictures.ndim != 2 or texts.ndim != 2 or len(pictures) != 2 or len(texts) != 2 or not fits:
        raise DataError(
            f"the {towers.kind} model at {path} embeds pictures as {pictures.shape[1:]} numbers and texts as"
            f" {texts.shape[1:]}: no common space",
            hint=f"name a CLIP-like model, such as {EXAMPLE}, or two models: --clip VIT+TEXT",
        )
    if not (np.isfinite(pictures).all() and np.isfinite(texts).all()):
        raise _not_finite(f"the {towers.kind} model at {path} embeds as numbers that are not finite")


def _reads_pictures(model: Any) -> bool:
    return hasattr(model, "get_image_features") or model.main_input_name == "pixel_values"


def _pixels(processor: Any, images: np.ndarray) -> Any:
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)  # (B, H, W, 3)
    return processor(list(images), input_data_format="channels_last", return_tensors="pt")


def _accepted(method: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `method` has a parameter for: some tokenizers make more than the model reads."""
    known = inspect.signature(method).parameters
    return {name: value for name, value in inputs.items() if name in known}


def _pooled(output: Any) -> np.ndarray:
    """`get_image_features` and `get_text_features` return an output with the projected `pooler_output` (5.x)."""
    return _array(output if torch.is_tensor(output) else output.pooler_output)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu().numpy(), np.float32)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _not_finite(fact: str) -> DataError:
    return DataError(fact, hint="the file is damaged, or was saved by a training that diverged: fetch the model again")


def _fingerprint(model: Any, *states: Any, without: str = "\0") -> str:
    """Over settings and weights as they were loaded: the same from a hub and from a folder."""
    settings = [type(model).__name__, _lasting(model.config.to_diff_dict()), *states]
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if without not in name:
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


# Where a model lay, what wrote it and at which precision it was stored says nothing about its vectors.


def _lasting(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {name: _lasting(value) for name, value in settings.items() if name not in VOLATILE_SETTINGS}
    return settings


def _processor_state(processor: Any) -> Any:
    return [type(processor).__name__, _lasting(processor.to_dict())]


# ---- a common space for two models -----------------------------------------------------------------------------


def _fitted(pair: Pair, fit: Part, setting: Setting) -> Maps:
    captions = [captions[:MOST_CAPTIONS] for captions in fit.captions]
    words = list(dict.fromkeys(caption for own in captions for caption in own))
    places = {text: place for place, text in enumerate(words)}
    texts = _in_batches(words, pair.texts, what=f"embedding {len(words)} captions with {pair.kind}", setting=setting)
    pictures = _in_batches(
        fit.images, pair.pictures, what=f"embedding {len(fit)} pictures of {fit.name} with {pair.kind}", setting=setting
    )
    if not (np.isfinite(pictures).all() and np.isfinite(texts).all()):
        raise _not_finite(f"{pair.kind} embeds {fit.name} as numbers that are not finite")
    setting.progress(f"fitting {pair.kind} to each other on {len(fit)} pictures of {fit.name}")
    try:
        return fit_maps(pictures, texts, [[places[caption] for caption in own] for own in captions])
    except ValueError as error:
        raise DataError(
            f"{pair.kind} cannot be fitted to each other on {fit.name}: {error}",
            hint="name a CLIP-like model instead, or a public set with more captions",
        ) from None


def fit_maps(pictures: np.ndarray, texts: np.ndarray, own: Sequence[Sequence[int]]) -> Maps:
    """Regularised canonical correlation analysis of pictures and their captions; closed form, nothing is drawn.

    Directions are scaled by a power of their correlation, so that what pictures and captions do not share counts
    little in a cosine (Gong et al. 2014, "A multi-view embedding space", arXiv 1212.4522). Ridge and power are those
    with the best mean reciprocal rank of a held-out picture's caption, with maps that have not seen the picture.

    Args:
        pictures: `(N, D)` features.
        texts: `(P, D')` features of the different captions.
        own: for each picture, the rows of its captions, one or more; they share the picture's weight.
    Raises:
        ValueError: all pictures, or all captions, have the same features.
    """
    x, y = pictures.astype(np.float64), texts.astype(np.float64)
    rows = np.repeat(np.arange(len(x)), [len(of) for of in own])  # (pairs,)
    columns = np.array([column for of in own for column in of], np.int64)  # (pairs,)
    weights = np.repeat([1 / len(of) for of in own], [len(of) for of in own])

    def maps(chosen: np.ndarray) -> dict[tuple[float, float], Maps]:
        return _correlated(x[rows[chosen]], y[columns[chosen]], weights[chosen])

    everything = maps(np.arange(len(rows)))
    held_out = np.arange(0, len(x), HELD_OUT)
    training = ~np.isin(rows, held_out)
    if len(set(columns[training].tolist())) < 2 or len(held_out) < 2:
        return everything[RIDGES[0], WEIGHTS[0]]
    captions = [own[row] for row in held_out.tolist()]
    ranks = {
        setting: _mean_reciprocal_rank(found.pictures(x[held_out]), found.texts(y), captions)
        for setting, found in maps(np.flatnonzero(training)).items()
    }
    return everything[max(ranks, key=lambda setting: ranks[setting])]


def _correlated(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[tuple[float, float], Maps]:
    """Maps for each (ridge, power), from pairs `(M, D)` and `(M, D')` with `(M,)` weights."""
    x, x_mean, x_scale = _standard(x, weights, "pictures")
    y, y_mean, y_scale = _standard(y, weights, "captions")
    total = weights.sum()
    x_values, x_axes = np.linalg.eigh((x * weights[:, None]).T @ x / total)
    y_values, y_axes = np.linalg.eigh((y * weights[:, None]).T @ y / total)
    cross = x_axes.T @ ((x * weights[:, None]).T @ y / total) @ y_axes  # (D, D')
    found = {}
    for ridge in RIDGES:
        x_white = x_axes / np.sqrt(np.maximum(x_values, 0) + ridge)  # (D, D)
        y_white = y_axes / np.sqrt(np.maximum(y_values, 0) + ridge)  # (D', D')
        whitened = cross / np.sqrt(np.outer(np.maximum(x_values, 0) + ridge, np.maximum(y_values, 0) + ridge))
        left, correlations, right = np.linalg.svd(whitened, full_matrices=False)
        kept = correlations[:MOST_DIRECTIONS] > SAME
        left, right, correlations = left[:, : len(kept)][:, kept], right[: len(kept)][kept], correlations[: len(kept)]
        for power in WEIGHTS:
            scale = correlations[kept] ** power
            found[ridge, power] = Maps(
                x_mean, x_white @ left * scale / x_scale[:, None], y_mean, y_white @ right.T * scale / y_scale[:, None]
            )
    return found


def _standard(rows: np.ndarray, weights: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of mean 0 and deviation 1 each, the mean, and what was divided by: infinite for a feature that never varies."""
    mean = np.average(rows, axis=0, weights=weights)
    deviation = np.sqrt(np.average((rows - mean) ** 2, axis=0, weights=weights))
    varies = deviation > 1e-6 * np.sqrt(np.mean(rows**2))  # below that it is rounding of float32
    if not varies.any():
        raise ValueError(f"all {what} look alike to the model")
    scale = np.where(varies, deviation, np.inf)
    return (rows - mean) / scale, mean, scale


def _mean_reciprocal_rank(pictures: np.ndarray, texts: np.ndarray, own: Sequence[Sequence[int]]) -> float:
    """Of the best of each picture's captions among all captions; those that tie share their places."""
    norms = np.linalg.norm(pictures, axis=1, keepdims=True) * np.linalg.norm(texts, axis=1)
    scores = pictures @ texts.T / np.where(norms > 0, norms, 1.0)  # (N, P)
    best = np.array([row[list(of)].max() for row, of in zip(scores, own, strict=True)])[:, None]
    ranks = 1 + (scores > best + SAME).sum(axis=1) + ((np.abs(scores - best) <= SAME).sum(axis=1) - 1) / 2
    return float((1 / ranks).mean())


# ---- long work, and what is kept -------------------------------------------------------------------------------


def _in_batches(items: Any, embed: Callable[[Any], np.ndarray], *, what: str, setting: Setting) -> np.ndarray:
    """`embed` of all items; says how long it will take once the first batch has shown it."""
    total, began, rows = len(items), time.monotonic(), []
    for start in range(0, total, BATCH):
        rows.append(embed(items[start : start + BATCH]))
        done = min(start + BATCH, total)
        if start == 0 and done < total:
            seconds = (time.monotonic() - began) * (total - done) / done
            left = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
            setting.progress(f"{what}: about {left}")
        if total > BATCH:
            setting.step(done, total)
    if not rows:
        raise DataError("there is no picture to embed", hint="generate some first")
    return np.concatenate(rows)


def _cached(
    path: Path | None, make: Callable[[], dict[str, np.ndarray]], *, lengths: Mapping[str, int | None]
) -> dict[str, np.ndarray]:
    """What `make` returns, kept at `path`; a file that is damaged or of other lengths is made again."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save

    from shared.disk import write_whole

    if path is not None and path.is_file():
        try:
            kept: dict[str, np.ndarray] = load_file(path)
            if all(length in (None, len(kept[name])) for name, length in lengths.items()):
                return kept
        except (SafetensorError, OSError, KeyError):
            pass
    made = make()
    if path is not None:
        write_whole(path, save({name: np.ascontiguousarray(array) for name, array in made.items()}))
    return made
