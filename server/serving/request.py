"""What `POST /v1/images/generations` takes: OpenAI's fields that mean something here, and ours.

Ours are `seed`, `truncation`, `resize`, `describe`, `previous` and `previous_seed`. Fields that this model cannot
honour are refused rather than ignored. Not here: whether the service has room for it (`server.serving.load`).
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.generator import MOST_SEED
from server.serving.errors import ApiError, of_ours
from shared.errors import PromptError
from shared.prompts import MAX_PROMPT_CHARACTERS, clean_prompt

MOST_PICTURES = 10  # of one request, as at OpenAI
MOST_SIDE = 1024  # that a picture is resized to
MOST_PIXELS = 4 * MOST_SIDE**2  # of a request's pictures together
UNIT_PIXELS = 256**2
MOST_PREVIOUS = 8  # texts of a conversation: each is described again
CHOSEN_SEEDS = 2**32  # a seed that a person can type again, and that JavaScript reads exactly


class ImageRequest(BaseModel):
    """Fields beyond OpenAI's: seed, truncation, resize, describe, previous, previous_seed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, description="One line of text.")]
    model: Annotated[str | None, Field(max_length=256, description="Its name or digest; may be left out.")] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_PICTURES, description="Pictures; 1 when left out.")] = None
    size: Annotated[
        str | None,
        Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="That of the model when left out."),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="b64_json when left out; a URL holds for an hour.")
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MOST_SEED, description="The same seed, the same pictures; drawn when left out.")
    ] = None
    truncation: Annotated[
        float | None, Field(ge=0, le=1, description="Below 1 pictures are more typical and less varied.")
    ] = None
    resize: Annotated[
        bool | None, Field(description="Scale the pictures to a size that the model does not draw.")
    ] = None
    describe: Annotated[
        bool | None, Field(description="Say the prompt in the model's own words first, and draw that.")
    ] = None
    previous: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]] | None,
        Field(max_length=MOST_PREVIOUS, description="With describe: what was said before, which the prompt may alter."),
    ] = None
    previous_seed: Annotated[
        int | None,
        Field(
            ge=0, le=MOST_SEED,
            description="With previous: that of the pictures before; taken without seed, where their latents stay.",
        ),
    ] = None
    user: Annotated[str | None, Field(max_length=256, description="Taken and not used.")] = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Annotated[bool | None, Field(description="Only false.")] = None


@dataclass(frozen=True)
class Order:
    """A request that was checked, every choice made.

    Attributes:
        prompt: what is drawn, or with `describe` what is described first.
        side: in pixels, that the pictures are sent at.
        previous_seed: in place of `seed`, where a description keeps the latents of before.
    """

    prompt: str
    n: int
    side: int
    seed: int
    truncation: float
    as_url: bool
    describe: bool = False
    previous: tuple[str, ...] = ()
    previous_seed: int | None = None

    @property
    def units(self) -> int:
        return self.n * max(1, -(-(self.side**2) // UNIT_PIXELS))


def order(asked: ImageRequest, *, size: int, names: tuple[str, ...]) -> Order:
    """
    Args:
        size: of the model's pictures, in pixels.
        names: by which the model may be asked for.
    Raises:
        ApiError: a field asks for what cannot be had; the message says what can.
    """
    try:
        # What is described may have several lines and whatever else its first stage removes.
        prompt = asked.prompt if asked.describe else clean_prompt(asked.prompt)
    except PromptError as error:
        raise of_ours(error, param="prompt") from None
    if asked.model is not None and asked.model not in names:
        raise unknown_model(names[0])
    if asked.previous and not asked.describe:
        raise _unsupported("previous", 'previous needs "describe": true; without it nothing is changed')
    if asked.previous_seed is not None and not asked.previous:
        raise _unsupported("previous_seed", "previous_seed needs previous; without it say seed")
    if asked.stream:
        raise _unsupported("stream", "pictures are not streamed; leave stream out")
    n = asked.n or 1
    side = _side(asked, size=size)
    if n * side**2 > MOST_PIXELS:
        fewer = MOST_PIXELS // side**2
        raise ApiError(
            400, f"{n} pictures of {side}x{side} are too much for one request; ask for {fewer} at most",
            code="invalid_value", param="n",
        )  # fmt: skip
    return Order(
        prompt, n, side,
        seed=secrets.randbelow(CHOSEN_SEEDS) if asked.seed is None else asked.seed,
        truncation=1.0 if asked.truncation is None else float(asked.truncation),
        as_url=asked.response_format == "url",
        describe=bool(asked.describe), previous=tuple(asked.previous or ()),
        previous_seed=asked.previous_seed if asked.seed is None else None,
    )  # fmt: skip


def unknown_model(name: str) -> ApiError:
    """Args: name: of the one there is."""
    return ApiError(
        404, f"there is no such model here; this service has {name}", code="model_not_found", param="model"
    )


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="unsupported", param=param)


def _side(asked: ImageRequest, *, size: int) -> int:
    if asked.size in (None, "auto", f"{size}x{size}"):
        return size
    found = re.fullmatch(r"(\d+)x(\d+)", asked.size or "")
    assert found is not None, "the pattern of the field"
    width, height = int(found[1]), int(found[2])
    can = f"this model draws {size}x{size} only"
    if not asked.resize:
        raise ApiError(
            400, f'{can}; with "resize": true a picture is scaled to another square', code="invalid_value", param="size"
        )
    if width != height or width > MOST_SIDE:
        raise ApiError(
            400, f"{can}, scaled to a square of at most {MOST_SIDE}x{MOST_SIDE}", code="invalid_value", param="size"
        )
    return width
