"""Inception-v3 as every published FID uses it: torch-fidelity's network, with weights from a file or its own download.

A file of weights is read as tensors and checked before the network sees it; code in a pickle never runs. Figures may
be called by their plain names only with the published weights, which are told by the SHA-256 of their file.
Not covered: weights of the same name for other ports of the network (torchvision's, Keras'); their shapes differ and
they are refused, or their file differs and figures say so.
"""

from __future__ import annotations

import hashlib
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from shared.errors import DataError
from shared.metrics.extractor import Features, fingerprint_of, in_batches
from shared.torchvision_operators import ensure_importable

if TYPE_CHECKING:
    from shared.metrics import Setting

VERSION = 1  # of what happens to a picture before the weights see it
FILE = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # how the SHA-256 of the published file begins; its full digest is published nowhere
BATCH = 32  # of 299 x 299 px: 700 MB while it passes
PATIENCE = 20.0  # seconds without a byte, after which there is no network
HINT = (
    "name a file with the weights: --extractor PATH; they are release v0.2.0 of github.com/toshas/torch-fidelity,"
    f" {FILE}. Or measure with a network trained on the public set: --extractor local"
)


@dataclass(frozen=True, eq=False)
class Inception:
    """The network with its weights."""

    network: Any
    fingerprint: str
    published: bool
    progress: Callable[[str], None]

    @property
    def name(self) -> str:
        return f"inception {self.fingerprint[:8]}"

    def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
        """Of `(N, H, W, C)` uint8: pooled `(N, 2048)`, logits without bias `(N, 1008)`.

        Grey pictures are repeated to three channels. The network itself brings every picture to 299 x 299 px, as
        TensorFlow 1 did it.
        """
        return in_batches(
            images, self._of_batch, size=BATCH, what="Inception features", progress=self.progress, step=step
        )

    def _of_batch(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, C, H, W)
        pooled, logits = self.network(pixels.expand(-1, 3, -1, -1).contiguous())
        return pooled, logits


def build(setting: Setting, path: str) -> Inception:
    """The network with the weights in the file `path`, or with the published ones where none is named.

    Raises:
        DataError: the file holds no Inception weights, or there is no network to get the published ones.
    """
    ensure_importable()
    # PyTorch's own cache, where torch-fidelity keeps the same file.
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path and not file.exists():
        _download(file, setting.progress)
    weights, digest = _read(file)
    network = _network_without_weights()
    weights = _checked(weights, network.state_dict(), file)
    network.load_state_dict(weights, strict=False)  # all that counts is there: `_checked`
    counted = {name: tensor for name, tensor in weights.items() if not name.endswith(".num_batches_tracked")}
    published = digest.startswith(PUBLISHED)
    if not path and not published:
        raise DataError(f"{file} is not the published file: its SHA-256 begins with {digest[:8]}, not {PUBLISHED}",
                        hint=f"delete it; the next call gets it again. Or {HINT}")  # fmt: skip
    return Inception(network, fingerprint_of(counted, "inception", VERSION), published, setting.progress)


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and the SHA-256 of the file. No code that a file may hold is run."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about archives of code, which are refused right after
                # weights_only: tensors and plain containers; anything else in the pickle is refused unread.
                found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"extractor file {file} cannot be read: {error.strerror or error}", hint=HINT) from None
    except Exception as error:  # whatever a foreign file makes a foreign library raise
        raise DataError(
            f"extractor file {file} holds no tensors: {type(error).__name__}", hint=f"nothing in it was run; {HINT}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise DataError(f"extractor file {file} is no table of tensors by name", hint=HINT)
    return {str(name): tensor for name, tensor in found.items()}, digest


def _checked(weights: dict[str, Tensor], wanted: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """`weights` in float32, when they are those of the network by name and shape, and finite."""
    # How often normalisation was trained decides no feature, and older files lack it.
    missing = {name for name in wanted.keys() - weights.keys() if not name.endswith(".num_batches_tracked")}
    odd = sorted(missing | (weights.keys() - wanted.keys()))
    if odd:
        fact = "has no" if odd[0] in missing else "has, beside Inception's,"
        raise DataError(f"extractor file {file} is none: it {fact} {odd[0]}", hint=HINT)
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            sizes = f"{tuple(tensor.shape)}, where Inception has {tuple(wanted[name].shape)}"
            raise DataError(f"extractor file {file} is none: {name} is of shape {sizes}", hint=HINT)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise DataError(f"extractor file {file} is none: {name} holds no plain numbers", hint=HINT)
        if not torch.isfinite(tensor).all():
            raise DataError(f"extractor file {file} is damaged: {name} has values that are not finite", hint=HINT)
    return {name: tensor.to(wanted[name].dtype) for name, tensor in weights.items()}


def _network_without_weights() -> Any:
    """torch-fidelity's network loads itself, and would run what a pickle holds, or download: here it gets nothing."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    with (
        torch.random.fork_rng(devices=[]),  # what it is filled with until it has weights is drawn
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network, "load_state_dict", return_value=None),
    ):
        return network("inception", ["2048", "logits_unbiased"])


def _download(file: Path, progress: Callable[[str], None]) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    progress(f"getting the published Inception weights, about 90 MB, once: {URL}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # a firewall that answers nothing would hold us for minutes
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(file), hash_prefix=PUBLISHED, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no such page, no room; or another file than the published
        raise DataError(f"the published Inception weights cannot be had: {error}", hint=HINT) from None
    finally:
        socket.setdefaulttimeout(before)
