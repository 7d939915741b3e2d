"""Texts to unit vectors, by a frozen encoder: hashed words, or a pretrained `transformers` text model.

A row depends on its own text alone, is the same on every call, and is never trained; the fingerprint changes
with anything that could change a row, so that a released model finds the encoder it was trained with.
Not covered: meaning. The hashing encoder knows which words occur near which, not that two words are alike.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import TextConfig
from shared.errors import ConfigError, DataError
from shared.registry import Registry
from shared.torchvision_operators import ensure_importable
from shared.words import split_words


class CaptionEncoder(Protocol):
    """Captions and prompts alike; what the texts are allowed to be is decided elsewhere.

    Attributes:
        dim: E, entries of a row.
        fingerprint: 64 hex digits; equal where rows are equal.
    """

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`(N, E)` float32 on the CPU, rows of L2 norm 1, without gradient."""
        ...


ENCODERS: Registry[Callable[..., CaptionEncoder]] = Registry(
    "text encoder", {"hashing": "shared.text:build_hashing", "transformers": "shared.text:build_transformers"}
)


def build_encoder(config: TextConfig, *, local_only: bool = False) -> CaptionEncoder:
    """The encoder that `config` names.

    Args:
        local_only: asks no hub, whatever `config` names: for settings that came from elsewhere.
    Raises:
        ConfigError: no such encoder, or `text.path` is missing.
        DataError: there is no text model at `text.path`, or parts of it are missing.
    """
    return ENCODERS.get(config.encoder)(config, local_only=local_only)


def cached_encode(encoder: CaptionEncoder, texts: Sequence[str], folder: Path) -> Tensor:
    """`encoder.encode(texts)`, read from `folder` where the same encoder has seen the same texts.

    Embeddings of captions are as private as the captions: `folder` stays at the site.
    """
    key = hashlib.sha256(json.dumps([encoder.fingerprint, list(texts)]).encode()).hexdigest()
    path = folder / f"text-{key}.npy"
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.shape == (len(texts), encoder.dim) and rows.dtype == np.float32 and np.isfinite(rows).all():
            return torch.from_numpy(rows)
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged: it is made again
    embeddings = encoder.encode(texts)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, embeddings.numpy())
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return embeddings


# ---- hashed words and word pairs -----------------------------------------------------------------------------

# Of a released model's identity: a change of anything here is another encoder and needs another version.
HASHING_VERSION = 1
WORD_WEIGHT, PAIR_WEIGHT = 5, 3  # whole numbers, so that sums are exact on every machine
PAIR_REACH = 4  # words further apart make no pair
# Say little about what is to be seen. Short and public; nothing here is learned from anybody's captions.
FUNCTION_WORDS = frozenset(
    [
        *("a", "an", "the", "of", "on", "in", "at", "with", "and", "is", "are"),
        *("photo", "picture", "image", "background"),
        *("ein", "eine", "einen", "einem", "einer", "der", "die", "das", "dem", "den", "des"),
        *("auf", "im", "mit", "und", "von", "ist"),
        *("على", "في", "من", "و"),
        "の",
        *("的", "在", "一", "个", "個", "上", "有", "是", "了"),
    ]
)


class HashingEncoder:
    """Words and ordered pairs of near words, each once, as fixed signs from its hash; added and normalised."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    def fingerprint(self) -> str:
        parts = ("hashing", HASHING_VERSION, self.dim, WORD_WEIGHT, PAIR_WEIGHT, PAIR_REACH, sorted(FUNCTION_WORDS))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> Tensor:
        rows = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[:] = self._row(text)
        return torch.from_numpy(rows)

    def _row(self, text: str) -> np.ndarray:
        words = [word for word in split_words(text) if word not in FUNCTION_WORDS] or split_words(text) or [text]
        pairs = [f"{first} {second}" for i, first in enumerate(words) for second in words[i + 1 : i + 1 + PAIR_REACH]]
        total = WORD_WEIGHT * self._signs_of_each(words) + PAIR_WEIGHT * self._signs_of_each(pairs)
        if not total.any():
            total[0] = 1  # words that cancel, about never
        row: np.ndarray = total / np.sqrt((total**2).sum())
        return row

    def _signs_of_each(self, tokens: Sequence[str]) -> np.ndarray:
        """`(E,)` int64: the signs, -1 or 1, of each different token, added."""
        different = dict.fromkeys(tokens)
        size = -(-self.dim // 8)
        digests = b"".join(
            hashlib.shake_256(token.encode("utf-8", "surrogatepass")).digest(size) for token in different
        )
        bits = np.unpackbits(np.frombuffer(digests, dtype=np.uint8).reshape(len(different), size), axis=1)
        total: np.ndarray = (bits[:, : self.dim].astype(np.int64) * 2 - 1).sum(axis=0)
        return total


def build_hashing(config: TextConfig, *, local_only: bool = False) -> CaptionEncoder:
    return HashingEncoder(config.dim)


# ---- pretrained text models ----------------------------------------------------------------------------------


class TransformersEncoder:
    """A text model of `transformers`: CLIP's text projection, or the mean over tokens of the last layer.

    Texts are encoded one by one without padding: rounding in a batch depends on the batch, and a record's
    embedding may depend on no other record.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int, unused: Sequence[str] = ()) -> None:
        """`unused` names parameters that the checkpoint lacks and that no output depends on."""
        self._model, self._tokenizer, self._unused = model.float().eval().requires_grad_(False), tokenizer, set(unused)
        positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = min(max_tokens, tokenizer.model_max_length, positions)
        self._tokenizer_state = tokenizer_state(tokenizer)
        self.dim = len(self._pooled("a"))

    @cached_property
    def fingerprint(self) -> str:
        """Over settings, tokenizer and weights as they were loaded: the same from a hub and from a folder."""
        settings = [type(self._model).__name__, self._max_tokens, self._tokenizer_state]
        settings.append({k: v for k, v in self._model.config.to_diff_dict().items() if k not in VOLATILE_SETTINGS})
        total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            if name not in self._unused:
                total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    def encode(self, texts: Sequence[str]) -> Tensor:
        known: dict[str, Tensor] = {}
        for text in texts:
            if text not in known:
                known[text] = self._row(text)
        return torch.stack([known[text] for text in texts]) if known else torch.empty(0, self.dim)

    def _row(self, text: str) -> Tensor:
        pooled: Tensor = self._pooled(text)
        norm = torch.linalg.vector_norm(pooled)
        if not (torch.isfinite(norm) and norm > 0):
            return torch.full((self.dim,), self.dim**-0.5)  # no words: one row for all such texts, and no error
        unit: Tensor = pooled / norm
        return unit

    def for_export(self) -> tuple[nn.Module, int, str]:
        """The text model, the most tokens that it gets, and its tokenizer as `tokenizers` reads it, cut to so many.

        Raises:
            DataError: the tokenizer is of Python code, which no file describes.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"the tokenizer {type(self._tokenizer).__name__} is of Python code and has no tokenizer.json",
                hint="save the model with a fast tokenizer, and train with that",
            )
        cut = type(backend).from_str(backend.to_str())
        cut.enable_truncation(self._max_tokens, direction=self._tokenizer.truncation_side)
        cut.no_padding()
        return self._model, self._max_tokens, str(cut.to_str())

    @torch.no_grad()
    def _pooled(self, text: str) -> Tensor:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which tokenizers refuse
        tokens = self._tokenizer(text, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        if tokens["input_ids"].numel() == 0:
            return torch.zeros(self.dim)
        mask = tokens["attention_mask"]
        output = self._model(input_ids=tokens["input_ids"].long(), attention_mask=mask)
        if "text_embeds" in output:
            pooled: Tensor = output.text_embeds[0].clone()
        else:
            hidden: Tensor = output.last_hidden_state[0]  # (tokens, E)
            pooled = (hidden * mask[0, :, None]).sum(dim=0) / mask.sum()
        return pooled


# Where a model lay, what wrote it and at which precision it was stored says nothing about its rows in float32.
VOLATILE_SETTINGS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


def build_transformers(config: TextConfig, *, local_only: bool = False) -> CaptionEncoder:
    if not config.path:
        raise ConfigError(
            "text.encoder 'transformers' needs text.path",
            hint="a folder with a transformers text model, or a model id: --set text.path=openai/clip-vit-base-patch32",
        )
    path = config.path
    local = Path(path).is_dir()
    if not local and (Path(path).exists() or path.startswith(("/", ".", "~"))):
        raise DataError(
            f"no folder {path}", hint="text.path names a folder with config.json, weights and tokenizer"
        )
    transformers = quiet_transformers()
    if local_only and not local:
        path, local = _in_cache(path), True
    try:
        # Nothing that comes with a model runs as code, and a folder is enough: no network for it.
        source: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        settings = transformers.AutoConfig.from_pretrained(path, **source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **source)
        kind, settings = _text_model(transformers, settings)
        model, report = kind.from_pretrained(
            path, config=settings, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **source
        )
    except Exception as error:  # whatever a foreign folder makes a foreign library raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"no transformers text model at {path}: {type(error).__name__}: {reason}",
            hint="without network text.path names a folder with config.json, weights and tokenizer, as"
            " save_pretrained writes them",
        ) from None
    missing = {str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])}
    pooler = {key for key in missing if "pooler." in key}  # made up anew when absent; no row depends on it
    if missing - pooler:
        # transformers fills them with random numbers, others at each site.
        raise DataError(
            f"the model at {path} lacks weights, {min(missing - pooler)} among them",
            hint="save the whole model again with save_pretrained",
        )
    check_vocabulary(model, tokenizer, path)
    if model.config.is_encoder_decoder and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    return TransformersEncoder(model, tokenizer, max_tokens=config.max_tokens, unused=sorted(pooler))


def _in_cache(name: str) -> str:
    """Where a model of a hub lies on this machine, if it was fetched before. Asks nobody, not even who is there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:
        found = None
    if not isinstance(found, str):
        raise DataError(
            f"the text model {name} is not on this machine, and settings that came from elsewhere fetch nothing",
            hint="get it yourself if you trust that name, then say where it lies with --text-encoder",
        )
    return str(Path(found).parent)


def quiet_transformers() -> Any:
    """The library, without its progress bars and advice; it takes seconds to load, so whoever hashes never waits."""
    ensure_importable()  # image processors, which come with every model class, import torchvision
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_vocabulary(model: Any, tokenizer: Any, path: str) -> None:
    """`DataError` when `model` reads no text, or when `tokenizer` makes tokens that it does not know."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(table, nn.Embedding):
        raise DataError(f"the model at {path} does not read text", hint="name a text model, such as CLIP, BERT or T5")
    vocabulary = tokenizer.get_vocab()
    words = vocabulary.keys() - set(tokenizer.all_special_tokens)
    if len(words) < 2 or max(vocabulary.values()) >= table.num_embeddings:
        # Where files are missing transformers makes an empty tokenizer, to which every word is unknown.
        raise DataError(
            f"the tokenizer at {path} is not that of the model: {len(vocabulary)} tokens, {table.num_embeddings} rows",
            hint="save model and tokenizer into one folder with save_pretrained",
        )


def _text_model(transformers: Any, settings: Any) -> tuple[Any, Any]:
    """The class that loads the text part of a checkpoint, and the settings of that part."""
    if settings.model_type == "clip":
        settings.text_config.projection_dim = settings.projection_dim  # the one that the checkpoint was made with
        return transformers.CLIPTextModelWithProjection, settings.text_config
    if settings.model_type == "clip_text_model":
        return transformers.CLIPTextModelWithProjection, settings
    if type(settings) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding, settings  # of T5 only the encoder
    return transformers.AutoModel, settings


def tokenizer_state(tokenizer: Any) -> Any:
    """What decides the tokens of a text; not how the last call padded and cut, which the state remembers too."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in state.items() if name not in ("truncation", "padding")}
