"""The API: pictures over HTTP in the shape of OpenAI's images API, for one model.

    POST /v1/images/generations         pictures of a prompt
    GET  /v1/images/files/NAME.png      one that was asked for as a URL
    GET  /v1/models, /v1/models/NAME    the model, its card and its epsilon
    GET  /v1/prompts                    public prompts it was trained on
    GET  /health, /metrics, /openapi.json, and / with /page/... where there is a page

A request is checked, let in or refused at once, drawn in a batch with others, and given up when its client leaves.
Not here: what all requests have in common (`server.serving.guard`), and sockets (`server.serving.service`).
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from server.generator import Generator, Picture
from server.prompting import Description, PromptPipeline
from server.serving.batching import Batcher
from server.serving.card import brief, model_object
from server.serving.describing import Describer
from server.serving.errors import ApiError, of_ours, of_validation
from server.serving.gallery import Gallery
from server.serving.guard import PIECE, ClientLeft, Guard
from server.serving.keys import ApiKeys
from server.serving.load import Admission, Load
from server.serving.metrics import CONTENT_TYPE, Metrics
from server.serving.page import PageFile, read_page
from server.serving.request import ImageRequest, Order, order, unknown_model
from server.serving.settings import ServingSettings
from shared import __version__
from shared.errors import FedCanvasError

_Made = TypeVar("_Made")

ENCODERS = 2  # threads that make files of arrays
MOST_PROMPTS = 1000  # of one answer


class ErrorAbout(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorAbout


class ImageAnswer(BaseModel):
    """One picture: `b64_json` or `url`, the seed and index that make it again, and with `describe` what was drawn."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    index: int


class ImagesAnswer(BaseModel):
    """`fedcanvas`: the model's digest and epsilon, what was drawn and whether it was trained on that, words that it
    does not know with the nearest that it does, with `describe` what each stage did, and a warning if need be.
    """

    created: int
    data: list[ImageAnswer]
    size: str
    output_format: str
    fedcanvas: dict[str, Any]


class ModelAnswer(BaseModel):
    """`fedcanvas` holds the card, epsilon, delta, the digest, the size it draws, and whether it was verified."""

    id: str
    object: str
    created: int
    owned_by: str
    fedcanvas: dict[str, Any]


class ModelsAnswer(BaseModel):
    object: str
    data: list[ModelAnswer]


class PromptsAnswer(BaseModel):
    """Prompts in the order of the model's file; `total` counts all that fit the question."""

    object: str
    data: list[str]
    total: int


class HealthAnswer(BaseModel):
    status: str


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


class AdmittedAnswer(Response):
    """Holds its room until it is sent, so that answers which nobody takes count as work under way."""

    def __init__(
        self, content: bytes, admission: Admission, *, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(content, media_type=kind, headers=headers)
        self._admission = admission

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._admission.release()


class Studio:
    """Where orders become files: room, the threads that describe, draw and encode, the gallery."""

    def __init__(self, generator: Generator, settings: ServingSettings, pipeline: PromptPipeline) -> None:
        self.generator, self.settings = generator, settings
        self.load, self._sending = Load(settings.most_units), Load(settings.gallery_bytes)
        self.metrics = Metrics(self.load, model=generator.digest, epsilon=f"{generator.privacy['epsilon_max']:.4g}")
        self.batcher = Batcher(generator, observe=self.metrics.batch)
        self.gallery = Gallery(most_bytes=settings.gallery_bytes, seconds=settings.gallery_seconds)
        self.describer = Describer(
            pipeline, most_texts=settings.most_texts, within_seconds=settings.drawing_seconds
        )  # fmt: skip
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoding")
        self._known = frozenset(generator.prompts)

    def start(self) -> None:
        self.batcher.start()
        self.describer.start()

    def stop(self) -> None:
        self.batcher.stop()
        self.describer.stop()
        self._encoders.shutdown(cancel_futures=True)

    def admit(self, wanted: Order) -> Admission:
        return self._admitted(lambda: self.load.admit(wanted.units))

    def admit_file(self, size: int) -> Admission:
        """Room for a picture of `size` bytes to be sent: it is held until then, though the gallery dropped it."""
        return self._admitted(lambda: self._sending.admit(size))

    def _admitted(self, admit: Callable[[], _Made]) -> _Made:
        try:
            return admit()
        except ApiError:
            self.metrics.refused.labels("load").inc()
            raise

    async def answer(self, wanted: Order, request: Request, admission: Admission) -> bytes:
        """The body of the answer.

        Raises:
            ApiError: it takes too long, or the model cannot draw it.
            ClientLeft: whoever asked is gone.
        """
        try:
            async with asyncio.timeout(self.settings.drawing_seconds):
                described = None
                if wanted.describe:
                    described = await self._described(wanted, request)
                    kept = wanted.previous_seed if described.keeps_latents else None
                    wanted = replace(
                        wanted, prompt=described.description, seed=wanted.seed if kept is None else kept
                    )
                    request.state.seed = wanted.seed
                arrays = await self._drawn(wanted, request)
                admission.drawn()
                loop = asyncio.get_running_loop()
                base = str(request.base_url)
                return await loop.run_in_executor(self._encoders, self._encoded, wanted, described, arrays, base)
        except TimeoutError:
            self.metrics.refused.labels("time").inc()
            raise ApiError(
                504, f"the pictures were not there within {self.settings.drawing_seconds:g} s", code="timeout",
                retry_after=self.load.retry_after,
            ) from None  # fmt: skip
        except FedCanvasError as error:
            raise of_ours(error) from None

    async def _described(self, wanted: Order, request: Request) -> Description:
        asked = self._admitted(lambda: self.describer.submit(wanted.prompt, previous=wanted.previous))
        return await _unless_left(request, asyncio.wrap_future(asked))

    async def _drawn(self, wanted: Order, request: Request) -> list[np.ndarray]:
        asked = self.batcher.submit(wanted.prompt, n=wanted.n, seed=wanted.seed, truncation=wanted.truncation)
        return await _unless_left(request, asyncio.wrap_future(asked))

    def _encoded(
        self, wanted: Order, described: Description | None, arrays: list[np.ndarray], base: str
    ) -> bytes:  # fmt: skip
        files = [self._file(wanted, index, array) for index, array in enumerate(arrays)]
        if wanted.as_url:
            fields = [{"url": f"{base}v1/images/files/{self.gallery.keep(file)}.png"} for file in files]
        else:
            fields = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        revised = {} if described is None else {"revised_prompt": wanted.prompt}
        data = [{**field, **revised, "seed": wanted.seed, "index": index} for index, field in enumerate(fields)]
        trained = wanted.prompt in self._known
        about = {
            "model": self.generator.digest, "prompt": wanted.prompt, "trained_on_prompt": trained,
            "unknown_words": self._unknown(wanted, described), **brief(self.generator),
        }  # fmt: skip
        if described is not None:
            about["description"] = described.to_dict()
        size = f"{wanted.side}x{wanted.side}"
        return json.dumps(
            {"created": int(time.time()), "data": data, "size": size, "output_format": "png", "fedcanvas": about}
        ).encode()

    def _unknown(self, wanted: Order, described: Description | None) -> dict[str, list[str]]:
        if described is not None:
            return described.unknown
        return self.generator.unknown_words(wanted.prompt)

    def _file(self, wanted: Order, index: int, array: np.ndarray) -> bytes:
        about = self.generator.about(wanted.prompt, seed=wanted.seed, index=index, truncation=wanted.truncation)
        picture = Picture(array, about)
        if wanted.side != self.generator.size:
            from PIL.Image import Resampling

            scaled = picture.image.resize((wanted.side, wanted.side), Resampling.LANCZOS)
            size = f"{self.generator.size}x{self.generator.size}"
            picture = replace(picture, array=np.asarray(scaled), about={**about, "resized-from": size})
        return picture.png()


def make_app(
    generator: Generator, settings: ServingSettings | None = None, *, keys: ApiKeys | None = None,
    pipeline: PromptPipeline | None = None,
) -> FastAPI:  # fmt: skip
    """The application; its lifespan starts and ends the thread that draws.

    Args:
        keys: who may call it; `None` for anybody who can reach it.
        pipeline: what describes prompts; `None` for rules.
    """
    settings = settings or ServingSettings()
    studio = Studio(generator, settings, pipeline or generator.pipeline)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        studio.start()
        yield
        await asyncio.to_thread(studio.stop)

    app = FastAPI(
        title="fedcanvas", version=__version__, lifespan=lifespan, redirect_slashes=False,
        # Both load scripts from elsewhere.
        docs_url=None, redoc_url=None, openapi_url=None,
        description="Pictures by one text-to-image model that was trained under differential privacy.",
    )  # fmt: skip
    app.state.studio = studio
    app.add_middleware(Guard, settings=settings, keys=keys, metrics=studio.metrics)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    _add_pictures(app, studio)
    _add_model(app, generator)
    _add_operation(app, studio)
    _add_description(app)
    _add_page(app, read_page())
    return app


def _add_pictures(app: FastAPI, studio: Studio) -> None:
    names = (studio.generator.name, studio.generator.digest)

    @app.post(
        "/v1/images/generations", response_class=Response, tags=["pictures"],
        responses={200: {"model": ImagesAnswer}, **ERRORS},
    )  # fmt: skip
    async def generate(asked: ImageRequest, request: Request) -> Response:
        """Pictures of a prompt. The same prompt, seed and model give the same pictures, as on the command line."""
        wanted = order(asked, size=studio.generator.size, names=names)
        request.state.pictures, request.state.seed = wanted.n, wanted.seed
        if studio.settings.log_prompts:
            request.state.prompt = wanted.prompt
        admission = studio.admit(wanted)
        try:
            content = await studio.answer(wanted, request, admission)
        except BaseException:
            admission.release()
            raise
        studio.metrics.kept.set(studio.gallery.size)
        return AdmittedAnswer(content, admission, kind="application/json")

    @app.get(
        "/v1/images/files/{name}.png", response_class=Response, tags=["pictures"],
        responses={200: {"content": {"image/png": {}}}, **ERRORS},
    )  # fmt: skip
    async def file(name: Annotated[str, Path(max_length=64)]) -> Response:
        """A picture that was asked for as a URL, for about an hour."""
        png = studio.gallery.find(name)
        if png is None:
            raise ApiError(404, "there is no such picture, or its time is over; ask for it again by its seed")
        admission = studio.admit_file(len(png))
        return AdmittedAnswer(
            png, admission, kind="image/png", headers={"cache-control": "private, max-age=3600, immutable"}
        )


def _add_model(app: FastAPI, generator: Generator) -> None:
    # Answers that are always the same lie in memory once, however many clients do not take theirs.
    about = model_object(generator)
    one, listed = _json(about), _json({"object": "list", "data": [about]})
    searched = [(prompt.casefold(), _json(prompt)) for prompt in generator.prompts]

    def answers(model: type[BaseModel]) -> dict[str, Any]:
        return {"response_class": Response, "tags": ["model"], "responses": {200: {"model": model}, **ERRORS}}

    @app.get("/v1/models", **answers(ModelsAnswer))
    async def models() -> Response:
        """The one model, with its card and its epsilon."""
        return Response(listed, media_type="application/json")

    @app.get("/v1/models/{name:path}", **answers(ModelAnswer))
    async def model(name: str) -> Response:
        """The model by its name or digest."""
        if name not in (generator.name, generator.digest):
            raise unknown_model(generator.name)
        return Response(one, media_type="application/json")

    @app.get("/v1/prompts", **answers(PromptsAnswer))
    async def prompts(
        contains: Annotated[str, Query(max_length=200, description="Only prompts that contain this.")] = "",
        limit: Annotated[int, Query(ge=1, le=MOST_PROMPTS)] = 500,
    ) -> Response:
        """Public prompts that the model was trained on: what it knows how to draw."""
        wanted = contains.casefold()
        found = [encoded for folded, encoded in searched if wanted in folded]
        return StreamingResponse(_listed(found[:limit], total=len(found)), media_type="application/json")


async def _listed(found: list[bytes], *, total: int) -> AsyncIterator[bytes]:
    """The JSON of an answer, a piece as the client takes the one before: it never lies in memory whole."""
    piece = b'{"object": "list", "data": ['
    for place, each in enumerate(found):
        piece += (b", " if place else b"") + each
        if len(piece) >= PIECE:
            yield piece
            piece = b""
    yield piece + b'], "total": %d}' % total


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _add_operation(app: FastAPI, studio: Studio) -> None:
    @app.get("/health", response_model=HealthAnswer, tags=["operation"], responses=ERRORS)
    async def health() -> Any:
        """Whether pictures are being drawn; needs no key."""
        if not studio.batcher.working(studio.settings.drawing_seconds):
            raise ApiError(503, "nothing is being drawn any more; start the service again", code="stuck")
        return {"status": "ok"}

    @app.get(
        "/metrics", response_class=Response, tags=["operation"],
        responses={200: {"content": {CONTENT_TYPE.partition(";")[0]: {}}}, **ERRORS},
    )  # fmt: skip
    async def metrics() -> Response:
        """Counters for Prometheus."""
        studio.metrics.kept.set(studio.gallery.size)
        return Response(studio.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_description(app: FastAPI) -> None:
    content = _json(app.openapi())

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> Response:
        return Response(content, media_type="application/json")


def _add_page(app: FastAPI, files: dict[str, PageFile]) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file(files, "index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def part(name: str) -> Response:
        return _file(files, name)


def _file(files: dict[str, PageFile], name: str) -> Response:
    found = files.get(name)
    if found is None:
        raise ApiError(404, "there is no such page; the API is described at /openapi.json")
    return Response(found.content, headers={"content-type": found.kind, "cache-control": "no-cache"})


async def _unless_left(request: Request, made: asyncio.Future[_Made]) -> _Made:
    """What `made` gives. Raises `ClientLeft` where whoever asked is gone before; `made` is then cancelled."""
    gone = asyncio.ensure_future(_left(request))
    either: set[asyncio.Future[Any]] = {made, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise ClientLeft
        return made.result()
    finally:
        made.cancel()
        gone.cancel()


async def _left(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(of_validation(error.errors()))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is no such path; the API is described at /openapi.json", 405: "this path has no such method"}
    return _response(
        ApiError(error.status_code, said.get(error.status_code, "the body cannot be read"), headers=error.headers)
    )


def _response(error: ApiError) -> Response:
    return Response(error.body(), error.status, dict(error.headers))
