"""Models of `transformers` by id or folder, their image side included: tensors only, and every failure in one sentence.

Nothing that comes with a model runs as code: weights are safetensors, and classes are those of the library.
Not covered: text encoders that condition a generator; `shared.text` loads those, for sites as well.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from shared.errors import DataError
from shared.torchvision_operators import ensure_importable

PATIENCE = 10.0  # seconds
NOUNS = {"AutoImageProcessor": "image processor", "AutoProcessor": "processor", "AutoTokenizer": "tokenizer"}


def load_pretrained(path: str, kind: str) -> Any:
    """What `transformers.<kind>.from_pretrained` makes of `path`: a configuration, a processor, or a float32 model.

    Args:
        path: a folder, or a model id.
        kind: a class of `transformers`, such as "AutoModel", "AutoConfig" or "AutoImageProcessor".
    Returns:
        A model is in evaluation, takes no gradients, and has in `absent_weights` the names that its file lacks.
    Raises:
        DataError: no such thing there, weights that could run code, or a hub that cannot be reached.
    """
    local = Path(path).is_dir()
    if not local and (Path(path).exists() or path.startswith(("/", ".", "~"))):
        raise DataError(f"no folder {path}", hint="name a folder with config.json and model.safetensors, or a model id")
    ensure_importable()
    import transformers  # seconds; whoever needs none never waits for it

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"local_files_only": local or not hub_answers(), "trust_remote_code": False}
    is_model = kind.startswith("AutoModel")
    if is_model:
        source.update(use_safetensors=True, output_loading_info=True, dtype=torch.float32)
    try:
        loaded = getattr(transformers, kind).from_pretrained(path, **source)
    except Exception as error:  # whatever a foreign folder makes a foreign library raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"no {NOUNS.get(kind, 'model')} of transformers at {path}: {type(error).__name__}: {reason}",
            hint="without network name a folder with config.json and model.safetensors, as save_pretrained writes them",
        ) from None
    if not is_model:
        return loaded
    model, report = loaded
    model.absent_weights = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    return model.float().eval().requires_grad_(False)


@cache
def hub_answers() -> bool:
    """Whether to look beyond this machine: the library itself would try six times, for half a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # no network, no such name, a proxy that refuses, or told to stay offline
        return False
    return True
