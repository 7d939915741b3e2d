"""Makes torchvision, and with it torch-fidelity and transformers' image side, importable beside torch for CPU.

Wheels of torchvision on PyPI are compiled for CUDA. Beside torch for CPU their operators cannot be loaded, and the
import stops at the first one whose name it wants to extend: "operator torchvision::nms does not exist". The names are
all it needs. They are declared here without anything behind them, and only where the compiled ones are absent.
Not covered: calling them. Nothing that is measured draws boxes, and who calls one is told that it has no kernel.

    python -c "from shared.torchvision_operators import ensure_importable; ensure_importable(); \\
        from torch_fidelity.fidelity import main; main()" --help
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from importlib.machinery import PathFinder
from typing import Any

# Those that `import torchvision` extends without asking whether they are there (its _meta_registrations.py).
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # what is declared goes away with its library, so it is kept


def ensure_importable() -> None:
    """To be called before the first import of torchvision, or of what imports it; again is no harm."""
    import torch

    operators = torch.ops.torchvision
    if not hasattr(operators, "nms"):
        _load_compiled(torch)
    if not hasattr(operators, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)


def _load_compiled(torch: Any) -> None:
    """As `import torchvision` does it first, without the import that would fail."""
    package = importlib.util.find_spec("torchvision")
    places = package.submodule_search_locations if package else None
    compiled = PathFinder.find_spec("_C", list(places)) if places else None
    if compiled is not None and compiled.origin:
        with suppress(OSError):  # made for another build of torch
            torch.ops.load_library(compiled.origin)
