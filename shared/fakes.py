"""A bank of generated pictures, as the server sends it to sites that take several local steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FakeBank:
    """Public: made of public prompts and released weights.

    Attributes:
        images: `(F, H, W, C)` uint8.
        prompt_indices: `(F,)` int32, each picture's place in the public prompt pool.
    """

    images: np.ndarray
    prompt_indices: np.ndarray
