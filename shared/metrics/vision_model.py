"""The image side of a `transformers` model as extractor: CLIP, SigLIP, dual encoders, ViT, DINOv2, classifiers.

Features are what the model itself gives for a picture: the projected embedding of a dual encoder, else its pooled
output, else its class token. Only a model with a head for classes gives logits, over its own classes.
Not covered: models without weights in safetensors or with code of their own, and text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import DataError
from shared.metrics.dual_encoder import halves_of
from shared.metrics.extractor import Features, fingerprint_of, in_batches
from shared.metrics.pretrained import load_pretrained
from shared.text import VOLATILE_SETTINGS

if TYPE_CHECKING:
    from shared.metrics import Setting

VERSION = 1
DEFAULT = "openai/clip-vit-base-patch32"
BATCH = 32
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, eq=False)
class VisionModel:
    """The model and what brings pictures to its size.

    Attributes:
        path: as it was named, for messages.
        processor: `(B, H, W, 3)` uint8 to `(B, 3, h, w)` float32.
    """

    model: Any
    path: str
    processor: Callable[[np.ndarray], Tensor]
    fingerprint: str
    progress: Callable[[str], None]
    published: bool = False

    @property
    def name(self) -> str:
        return f"clip {self.fingerprint[:8]}"

    def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
        """Grey pictures are repeated to three channels."""
        return in_batches(
            images, self._of_batch, size=BATCH, what=f"features of {self.path}", progress=self.progress, step=step
        )

    def _of_batch(self, images: np.ndarray) -> tuple[Tensor, Tensor | None]:
        colour = images if images.shape[3] == 3 else images.repeat(3, axis=3)
        try:
            pixels = self.processor(colour)
            if hasattr(self.model, "get_image_features"):
                return _pooled(self.model.get_image_features(pixel_values=pixels), self.model), None
            if not _tells_classes(self.model):
                return _pooled(self.model(pixel_values=pixels), self.model), None
            inner: list[Any] = []  # what the head sees, without a second run through the trunk
            hook = self.model.base_model.register_forward_hook(lambda module, given, output: inner.append(output))
            try:
                logits: Tensor = self.model(pixel_values=pixels).logits
            finally:
                hook.remove()
            return _pooled(inner[0], self.model), logits
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:  # of a foreign model, on its own terms
            size = f"{images.shape[1]} x {images.shape[2]} px"
            reason = next(iter(str(error).strip().splitlines()), "")
            raise DataError(f"the model at {self.path} cannot read pictures of {size}: {reason}",
                            hint="name a model with an image side: CLIP, SigLIP, ViT or DINOv2") from None  # fmt: skip


def build(setting: Setting, path: str) -> VisionModel:
    """The model at `path`, else at `setting.dual_encoder`, else the CLIP that most published figures use.

    Raises:
        DataError: none there, one without an image side or without all of its weights, or no way to the hub.
    """
    path = path or (halves_of(setting.dual_encoder) or (setting.dual_encoder,))[0] or DEFAULT
    if not Path(path).is_dir():
        setting.progress(f"loading {path}; from the hub where it is not on this machine yet, which takes minutes")
    config = load_pretrained(path, "AutoConfig")
    architectures = getattr(config, "architectures", None) or [""]
    classifies = str(architectures[0]).endswith("ForImageClassification")
    model = load_pretrained(path, "AutoModelForImageClassification" if classifies else "AutoModel")
    reads_images = hasattr(model, "get_image_features") or model.main_input_name == "pixel_values"
    if not reads_images:
        raise DataError(f"the model at {path} reads no images",
                        hint="name a model with an image side: CLIP, SigLIP, ViT or DINOv2")  # fmt: skip
    absent = [name for name in model.absent_weights if "pooler." not in name]  # without pooler: the class token
    if absent:
        # transformers fills them with random numbers, others at each start.
        raise DataError(f"the model at {path} lacks weights, {absent[0]} among them",
                        hint="save the whole model again with save_pretrained")  # fmt: skip
    processor, processing = _processor(path, model.config, setting.progress)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in model.absent_weights}
    settings = {key: value for key, value in model.config.to_diff_dict().items() if key not in VOLATILE_SETTINGS}
    about = json.dumps([settings, processing], sort_keys=True, default=str)
    fingerprint = fingerprint_of(weights, "vision model", VERSION, type(model).__name__, about)
    return VisionModel(model, path, processor, fingerprint, setting.progress)


def _tells_classes(model: Any) -> bool:
    return type(model).__name__.endswith("ForImageClassification")


def _pooled(output: Any, model: Any) -> Tensor:
    if isinstance(output, Tensor):  # before transformers 5
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is None or any("pooler." in name for name in model.absent_weights):
        pooled = output.last_hidden_state[:, 0]
    return torch.flatten(pooled, 1)  # convolutional models leave a side of 1


def _processor(
    path: str, config: Any, progress: Callable[[str], None]
) -> tuple[Callable[[np.ndarray], Tensor], dict[str, Any]]:
    """What brings pictures to the model's size, and its settings."""
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in PROCESSORS):
        side = getattr(config, "image_size", None) or getattr(
            getattr(config, "vision_config", None), "image_size", None
        )
        height, width = side if isinstance(side, list | tuple) else (side or 224, side or 224)
        progress(f"{path} says nothing about its pictures: resized to {height} x {width} px, mean and deviation 0.5")
        return lambda images: _plainly(images, (height, width)), {"plain": [height, width]}
    own = load_pretrained(path, "AutoImageProcessor")

    def process(images: np.ndarray) -> Tensor:
        pixels: Tensor = own(list(images), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return pixels

    return process, {"processor": type(own).__name__, **own.to_dict()}


def _plainly(images: np.ndarray, size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (functional.interpolate(pixels, size, mode="bilinear", antialias=True) - 0.5) / 0.5
