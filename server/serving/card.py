"""What the service says of its model: OpenAI's model object, and beside it whose it is and what it cost in privacy.

Not here: whether that holds; a released model is verified when it is loaded (`server.generator`).
"""

from __future__ import annotations

import math
import time
from typing import Any

from server.generator import UNVERIFIED, Generator


def model_object(generator: Generator) -> dict[str, Any]:
    """For `GET /v1/models`; every figure finite or `None`, so that it is JSON."""
    privacy = generator.privacy
    about = {
        # Without the folder that the line begins with: where things lie on this machine is nobody else's business.
        "digest": generator.digest, "line": generator.line.partition(": ")[2], "verified": generator.verified,
        "size": f"{generator.size}x{generator.size}", "prompts": len(generator.prompts), **brief(generator),
        "delta": privacy.get("delta"), "unit": privacy.get("unit"), "adjacency": privacy.get("adjacency"),
        "private": privacy.get("private"), "card": generator.model.card,
    }  # fmt: skip
    made = {"id": generator.name, "object": "model", "created": int(time.time()), "owned_by": "fedcanvas"}
    found: dict[str, Any] = _plain({**made, "fedcanvas": about})
    return found


def brief(generator: Generator) -> dict[str, Any]:
    """What stands beside every answer with pictures."""
    epsilon = float(generator.privacy["epsilon_max"])
    found: dict[str, Any] = {"epsilon": epsilon if math.isfinite(epsilon) else None}
    return {**found, "warning": UNVERIFIED} if generator.unverified else found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
