"""The service over real sockets: OpenAI's shapes, the same pictures whoever else asks, and an end to every wait."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from released_run import make_released_run
from served_model import HeldBack, Served, command, served, wait_until
from test_generate_and_report import PROMPTS, make_run

from server.generator import Generator
from server.prompting import PromptPipeline
from server.serving.batching import Batcher
from server.serving.describing import Describer
from server.serving.errors import ApiError
from server.serving.gallery import Gallery
from server.serving.keys import ApiKeys, add_key, read_keys
from server.serving.load import Load
from server.serving.log import Lines
from server.serving.page import read_page
from shared.cli import run
from shared.errors import PromptError, TrustError
from simulations.scenarios import demo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture(scope="module")
def generator(model: Path) -> Generator:
    return Generator.load(model)


@pytest.fixture(scope="module")
def service(generator: Generator) -> Iterator[Served]:
    with served(generator, hosts=("127.0.0.1", "localhost")) as service:
        yield service


@pytest.fixture
def held(generator: Generator) -> HeldBack:
    return HeldBack(generator)


def pictures(answer: httpx.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))) for made in answer.json()["data"]]


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """OpenAI's shape, whatever went wrong: https://platform.openai.com/docs/guides/error-codes."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    about = answer.json()["error"]
    assert set(about) == {"message", "type", "param", "code"}
    assert about["message"]
    return dict(about)


# ---- pictures


def test_pictures_are_those_of_the_command_line_with_the_same_seed(
    service: Served, model: Path, tmp_path: Path
) -> None:  # fmt: skip
    line = ["generate", "a red circle", "--model", str(model), "--n", "3", "--seed", "7", "--out", str(tmp_path)]
    assert run(line) == 0
    for index, picture in enumerate(pictures(service.draw(n=3, seed=7))):
        written = Image.open(tmp_path / f"a-red-circle-{index:03d}.png")
        assert np.array_equal(np.asarray(picture), np.asarray(written))
        assert picture.text == written.text  # type: ignore[attr-defined]
        assert picture.text["epsilon"] == "1.5"  # type: ignore[attr-defined]


def test_a_chosen_seed_is_told_and_draws_the_same_again(service: Served) -> None:
    first = service.draw()
    seed = first.json()["data"][0]["seed"]
    assert first.json()["data"][0]["b64_json"] == service.draw(seed=seed).json()["data"][0]["b64_json"]
    assert seed < 2**53  # JavaScript reads it exactly
    assert service.draw().json()["data"][0]["seed"] != seed


def test_a_picture_is_the_same_whatever_shares_its_batch(tmp_path: Path) -> None:
    # At the demo's size: a toy's kernels do not differ with the number of rows.
    drawn = Generator.load(make_run(tmp_path / "demo", demo(), rounds=1))
    wanted = [(f"a large red circle {number % 5}", 1 + number % 3, number) for number in range(40)]
    batcher = Batcher(drawn)
    asked = [batcher.submit(prompt, n=n, seed=seed, truncation=1.0) for prompt, n, seed in wanted]
    batcher.start()
    try:
        for (prompt, n, seed), done in zip(wanted, asked, strict=True):
            alone = [picture.array for picture in drawn.generate([prompt], n=n, seed=seed)]
            assert np.array_equal(alone, done.result(60))
    finally:
        batcher.stop()


def test_truncation_is_kept_apart_in_a_shared_batch(generator: Generator) -> None:
    seen: list[tuple[int, float]] = []
    batcher = Batcher(generator, observe=lambda n, seconds: seen.append((n, seconds)))
    settings = [1.0, 0.5, 1.0, 0.0, 0.5]
    asked = [batcher.submit("a red circle", n=2, seed=3, truncation=truncation) for truncation in settings]
    batcher.start()
    for truncation, done in zip(settings, asked, strict=True):
        expected = generator.generate(["a red circle"], n=2, seed=3, truncation=truncation)
        assert all(np.array_equal(a, e.array) for a, e in zip(done.result(30), expected, strict=True))
    batcher.stop()
    assert [n for n, _ in seen] == [4, 4, 2]


def test_requests_that_wait_share_a_batch(held: HeldBack) -> None:
    with served(held) as service, ThreadPoolExecutor(9) as pool:  # type: ignore[arg-type]
        first = pool.submit(service.draw, seed=1)
        assert held.asked.wait(30)
        others = [pool.submit(service.draw, seed=seed, n=2) for seed in range(8)]
        wait_until(lambda: service.studio.load.units == 17)
        time.sleep(0.1)
        held.let.set()
        assert all(len(pictures(done.result())) == 2 for done in others)
        assert len(pictures(first.result())) == 1
    assert [len(batch) for batch in held.batches] == [1, 16]


def test_a_size_that_the_model_does_not_draw_is_refused_or_scaled_when_asked(service: Served) -> None:
    about = error(service.draw(size="256x256"), 400)
    assert about["param"] == "size"
    assert "8x8 only" in about["message"]
    made = pictures(service.draw(size="256x256", resize=True, seed=1))[0]
    assert made.size == (256, 256)
    assert made.text["resized-from"] == "8x8"  # type: ignore[attr-defined]
    assert pictures(service.draw(size="8x8"))[0].size == (8, 8)
    for size in ("256x128", "2048x2048"):
        assert error(service.draw(size=size, resize=True), 400)["param"] == "size"
    assert error(service.draw(size="1024x1024", resize=True, n=5), 400)["param"] == "n"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": "  "}, "prompt"), ({"prompt": "x" * 513}, "prompt"),
        ({"prompt": "a\nb"}, "prompt"), ({"prompt": "a\0b"}, "prompt"), ({"prompt": 7}, "prompt"),
        ({"prompt": None}, "prompt"), ({"n": 0}, "n"), ({"n": 11}, "n"), ({"n": "3"}, "n"), ({"n": True}, "n"),
        ({"n": 1.5}, "n"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"seed": 10**400}, "seed"),
        ({"truncation": 1.5}, "truncation"), ({"truncation": -0.1}, "truncation"), ({"size": "big"}, "size"),
        ({"size": "0x0"}, "size"), ({"response_format": "gif"}, "response_format"), ({"describe": "yes"}, "describe"),
        ({"stream": True}, "stream"), ({"style": "vivid"}, "style"), ({"output_format": "webp"}, "output_format"),
        ({"describe": True, "prompt": "?!"}, "prompt"), ({"describe": True, "prompt": "a\0b"}, "prompt"),
        ({"describe": True, "prompt": "x" * 513}, "prompt"), ({"previous": ["a"]}, "previous"),
        ({"describe": True, "previous": "a"}, "previous"), ({"describe": True, "previous": ["a"] * 9}, "previous"),
        ({"describe": True, "previous": [""]}, "previous.0"), ({"describe": True, "previous": ["?"]}, "previous"),
        ({"describe": True, "previous": ["x" * 513]}, "previous.0"),
        ({"describe": True, "previous": [7]}, "previous.0"), ({"describe": True, "previous_seed": 1}, "previous_seed"),
        ({"describe": True, "previous": ["a"], "previous_seed": 2**63}, "previous_seed"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(service: Served, fields: dict[str, Any], param: str) -> None:
    about = error(service.draw(**fields), 400)
    assert about["param"] == param
    assert about["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "truncation": NaN}',
        b'{"prompt": "a", "seed": 1e999}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b"[" * 60_000,
        b'{"prompt": "a", "\\ud800<script>": 1}', b'{"prompt": {"a": [1]}}',
    ],
    ids=range(13),
)  # fmt: skip
def test_a_body_that_is_none_is_400_and_the_service_stays_up(service: Served, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error(service.client.post("/v1/images/generations", content=body, headers=headers), 400)
    assert service.client.get("/health").json() == {"status": "ok"}


def test_a_body_of_another_type_is_not_read_as_json(service: Served) -> None:
    # What a page elsewhere can make a browser send without asking first.
    headers = {"content-type": "text/plain"}
    error(service.client.post("/v1/images/generations", content=b'{"prompt": "a"}', headers=headers), 400)


def test_a_body_that_is_too_long_is_413_however_it_comes(service: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 1024

    headers = {"content-type": "application/json"}
    for content in (b" " * 80_000, pieces()):
        about = error(service.client.post("/v1/images/generations", content=content, headers=headers), 413)
        assert about["code"] == "body_too_long"


def test_a_prompt_that_cannot_be_encoded_fails_alone(held: HeldBack, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrays(prompts: list[str], **options: Any) -> np.ndarray:
        if "bad" in prompts:
            raise PromptError("it cannot be encoded")
        if "bug" in prompts:
            raise ZeroDivisionError("a bug that quotes: bug")
        return HeldBack.arrays(held, prompts, **options)

    monkeypatch.setattr(held, "arrays", arrays, raising=False)
    with served(held) as service, ThreadPoolExecutor(4) as pool:  # type: ignore[arg-type]
        first = pool.submit(service.draw)
        assert held.asked.wait(30)
        asked = [pool.submit(service.draw, prompt=prompt) for prompt in ("bad", "good", "bug")]
        wait_until(lambda: service.studio.load.units == 4)
        time.sleep(0.1)
        held.let.set()
        assert error(asked[0].result(), 400)["message"] == "it cannot be encoded"
        assert len(pictures(asked[1].result())) == 1
        about = error(asked[2].result(), 500)
        assert about["type"] == "server_error"
        assert "bug" not in about["message"]
        assert len(pictures(first.result())) == 1
        wait_until(lambda: service.studio.load.units == 0)


# ---- in the model's own words

SHAPES = [
    f"a {size} {colour} {shape} on a {ground} background" for size in ("small", "large")
    for colour in ("red", "green", "blue") for shape in ("circle", "star") for ground in ("white", "black")
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator.load(make_released_run(tmp_path_factory.mktemp("runs") / "shapes", prompts=SHAPES))


@pytest.fixture(scope="module")
def drawer(shapes: Generator) -> Iterator[Served]:
    with served(shapes) as service:
        yield service


def test_a_prompt_is_said_in_the_models_words_and_that_is_drawn(drawer: Served, shapes: Generator) -> None:
    answer = drawer.draw(prompt="kids party,\nblue theme \u200f", describe=True, n=2, seed=3)
    sentence = "a small blue circle on a white background"
    for index, (made, picture) in enumerate(zip(answer.json()["data"], pictures(answer), strict=True)):
        assert made["revised_prompt"] == sentence
        expected = shapes.generate([sentence], n=2, seed=3)[index]
        assert np.array_equal(np.asarray(picture), expected.array)
        assert picture.text == expected.about  # type: ignore[attr-defined]
    about = answer.json()["fedcanvas"]
    assert (about["prompt"], about["trained_on_prompt"]) == (sentence, True)
    assert about["description"] == PromptPipeline(SHAPES).describe("kids party,\nblue theme \u200f").to_dict()
    assert list(about["unknown_words"]) == ["kids", "party", "theme"]


def test_without_describe_a_prompt_is_drawn_as_it_is_and_words_that_are_unknown_are_named(drawer: Served) -> None:
    answer = drawer.draw(prompt="a small crimson circle beside a unicorn")
    about = answer.json()["fedcanvas"]
    assert about["prompt"] == pictures(answer)[0].text["prompt"] == "a small crimson circle beside a unicorn"  # type: ignore[attr-defined]
    assert about["unknown_words"]["crimson"] == ["red"]
    assert about["unknown_words"]["unicorn"] == []
    assert "description" not in about
    assert "revised_prompt" not in answer.json()["data"][0]
    # Every word of it was trained on, though not the sentence.
    assert drawer.draw(prompt="circle, red").json()["fedcanvas"]["unknown_words"] == {}
    assert drawer.draw(prompt="!!!").json()["fedcanvas"]["unknown_words"] == {}


def test_a_conversation_changes_the_description_and_keeps_the_latents(drawer: Served) -> None:
    said: list[str] = []
    seeds, drawn = [], []
    for text in ("a red star on black", "the same but larger", "now in green", "another one"):
        fields = {"previous": said, "previous_seed": seeds[-1]} if said else {}
        answer = drawer.draw(prompt=text, describe=True, **fields).json()
        drawn.append(answer["fedcanvas"]["prompt"])
        seeds.append(answer["data"][0]["seed"])
        said.append(text)
    green = "a large green star on a black background"
    assert drawn == [
        "a small red star on a black background", "a large red star on a black background", green, green,
    ]  # fmt: skip
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3]
    # What was drawn says as much as all that was said before it.
    short = drawer.draw(prompt="smaller", describe=True, previous=[drawn[2]], previous_seed=2**63 - 1).json()
    assert short["fedcanvas"]["prompt"] == "a small green star on a black background"
    assert short["data"][0]["seed"] == 2**63 - 1
    both = drawer.draw(prompt="smaller", describe=True, previous=[drawn[2]], previous_seed=1, seed=2).json()
    assert both["data"][0]["seed"] == 2  # a seed that was asked for is taken


class SlowWriter:
    """A language model that writes when `let` is set, and counts who is in it at once."""

    name = "slow"

    def __init__(self) -> None:
        self.let, self.asked, self.threads = threading.Event(), threading.Event(), set[int]()
        self.inside = self.most = self.calls = 0

    def write(self, request: str, *, sentences: Sequence[str], examples: object) -> str:
        self.inside, self.calls = self.inside + 1, self.calls + 1
        self.most = max(self.most, self.inside)
        self.threads.add(threading.get_ident())
        self.asked.set()
        assert self.let.wait(60)
        time.sleep(0.01)
        self.inside -= 1
        return sentences[-1]


def test_a_language_model_is_asked_by_one_thread_while_the_service_answers_others(shapes: Generator) -> None:
    pipeline, writer = PromptPipeline(SHAPES), SlowWriter()
    pipeline._model = writer  # type: ignore[assignment]
    with served(shapes, pipeline=pipeline) as service, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(service.draw, prompt="a unicorn", describe=True) for _ in range(6)]
        assert writer.asked.wait(30)
        assert service.client.get("/health").status_code == 200
        assert service.draw(prompt="another unicorn").status_code == 200
        writer.let.set()
        for done in asked:
            about = done.result().json()["fedcanvas"]
            assert about["prompt"] == PromptPipeline(SHAPES).grammar.sentences[-1]
            assert about["description"]["writer"] == "language model slow"
    assert (writer.most, writer.calls, len(writer.threads)) == (1, 6, 1)


def test_describing_counts_under_the_time_and_is_given_up_with_its_client(shapes: Generator) -> None:
    pipeline, writer = PromptPipeline(SHAPES), SlowWriter()
    pipeline._model = writer  # type: ignore[assignment]
    with served(shapes, pipeline=pipeline, drawing_seconds=1.0) as service:
        body = json.dumps({"prompt": "a unicorn", "describe": True})
        with service.connect() as gone:
            gone.sendall(_request(body))
            assert writer.asked.wait(30)
        wait_until(lambda: service.studio.load.units == 0)
        assert error(service.draw(prompt="a dragon", describe=True, previous=["a unicorn"]), 504)["code"] == "timeout"
        assert service.studio.load.units == 0
        writer.let.set()
        assert service.draw(prompt="a dragon", describe=True).status_code == 200
        assert service.figure("fedcanvas_given_up_total") == 1
    assert writer.calls == 2  # nobody waited for what came between


class Telling:
    """A pipeline that describes when `let` is set; `clock` goes on by `seconds` with each text.

    Attributes:
        told: the texts, in order.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.let, self.asked, self.told = threading.Event(), threading.Event(), list[str]()
        self.clock, self.seconds = 0.0, seconds

    def describe(self, text: str, *, previous: str | None) -> str:
        self.told.append(text)
        self.asked.set()
        assert self.let.wait(60)
        self.clock += self.seconds
        return f"{previous or ''}{text}"


@contextlib.contextmanager
def describing(pipeline: Telling, **limits: Any) -> Iterator[Describer]:
    describer = Describer(pipeline, **{"most_texts": 100, "within_seconds": 1e6, **limits})  # type: ignore[arg-type]
    describer.start()
    try:
        yield describer
    finally:
        pipeline.let.set()
        describer.stop()


def test_conversations_are_described_whole_first_come_first_served_and_left_between_texts() -> None:
    pipeline = Telling()
    with describing(pipeline) as describer:
        left = describer.submit("c", previous="ab")
        others = [describer.submit(text, previous=previous) for text, previous in (("f", "de"), ("h", "g"), ("j", "i"))]
        assert pipeline.asked.wait(30)
        assert left.cancel()
        assert others[1].cancel()
        assert describer.texts == 5
        pipeline.let.set()
        assert [str(others[0].result(30)), str(others[2].result(30))] == ["def", "ij"]
        wait_until(lambda: describer.texts == 0)
    assert pipeline.told == list("adefij")


def test_more_texts_than_can_be_described_in_half_the_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Telling(seconds=2.0)
    monkeypatch.setattr("server.serving.describing.time", SimpleNamespace(monotonic=lambda: pipeline.clock))
    pipeline.let.set()
    with describing(pipeline, within_seconds=20) as describer:
        describer.submit("it takes 2 s").result(30)
        pipeline.let.clear()
        asked = [describer.submit("c", previous="ab"), describer.submit("e", previous="d")]  # 10 s
        with pytest.raises(ApiError) as refused:
            describer.submit("f")
        assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "6")  # half of 12 s
        pipeline.seconds = 0.0
        pipeline.let.set()
        assert [str(done.result(30)) for done in asked] == ["abc", "de"]
        for _ in range(20):
            describer.submit("it takes no time").result(30)
        pipeline.let.clear()
        assert len([describer.submit("a") for _ in range(50)]) == 50
    # However long a text takes, one conversation alone is let in, or nothing would tell that it has become better.
    pipeline = Telling(seconds=1000.0)
    pipeline.let.set()
    with describing(pipeline, within_seconds=20) as describer:
        assert [str(describer.submit("b", previous="a").result(30)) for _ in range(2)] == ["ab", "ab"]


def test_a_crowd_that_wants_descriptions_is_refused_and_those_let_in_are_served(shapes: Generator) -> None:
    pipeline, writer = PromptPipeline(SHAPES), SlowWriter()
    pipeline._model = writer  # type: ignore[assignment]
    talk = {"prompt": "a unicorn", "describe": True, "previous": ["a unicorn"] * 8}
    with served(shapes, pipeline=pipeline, most_texts=20) as service, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(service.draw, **talk) for _ in range(2)]
        wait_until(lambda: service.studio.describer.texts == 18)
        for _ in range(30):
            answer = service.draw(**talk)
            assert error(answer, 429)["code"] == "rate_limit_exceeded"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        asked.append(pool.submit(service.draw, prompt="a dragon", describe=True))  # there is room for one text
        wait_until(lambda: service.studio.describer.texts == 19)
        assert service.draw(prompt="a unicorn").status_code == 200  # whoever wants no description waits for none
        writer.let.set()
        assert [done.result().status_code for done in asked] == [200] * 3
        assert service.draw(**talk).status_code == 200
        assert service.figure('fedcanvas_refused_total{why="load"}') == 30
        wait_until(lambda: service.studio.load.units == 0)


# ---- URLs


def test_a_url_leads_to_the_picture_and_needs_no_key(service: Served) -> None:
    url = service.draw(seed=3, response_format="url").json()["data"][0]["url"]
    assert re.fullmatch(rf"{service.url}/v1/images/files/[0-9a-f]{{32}}\.png", url)
    found = httpx.get(url, trust_env=False)
    assert found.headers["content-type"] == "image/png"
    assert base64.b64encode(found.content).decode() == service.draw(seed=3).json()["data"][0]["b64_json"]
    error(service.client.get("/v1/images/files/" + "0" * 32 + ".png"), 404)
    error(service.client.get("/v1/images/files/..%2f..%2fetc%2fpasswd.png"), 404)


def test_kept_pictures_never_take_more_than_their_room_nor_stay_longer_than_their_time() -> None:
    now = [0.0]
    gallery = Gallery(most_bytes=10_000, seconds=60, clock=lambda: now[0])
    names = [gallery.keep(bytes([number]) * 2000) for number in range(100)]
    assert gallery.size <= 10_000
    assert [gallery.find(name) is not None for name in names[-4:]] == [False, True, True, True]
    assert gallery.find(names[99]) == bytes([99]) * 2000
    now[0] = 61.0
    assert gallery.find(names[99]) is None
    assert (len(gallery), gallery.size) == (0, 0)


# ---- what it says of itself


def test_models_come_with_card_and_epsilon_in_openais_shape(service: Served, generator: Generator) -> None:
    listed = service.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (about,) = listed["data"]
    assert (about["id"], about["object"], about["owned_by"]) == ("a", "model", "fedcanvas")
    said = about["fedcanvas"]
    assert (said["epsilon"], said["delta"], said["unit"]) == (1.5, 1e-4, "subject")
    assert said["size"] == "8x8"
    assert said["card"]["spent"]["epsilon"] == 1.5
    assert said["verified"] is False
    assert str(generator.line).partition(":")[0] not in json.dumps(about)  # no folder of this machine
    for name in ("a", generator.digest):
        assert service.client.get(f"/v1/models/{name}").json() == about
        assert service.draw(model=name).status_code == 200
    assert error(service.client.get("/v1/models/dall-e-3"), 404)["code"] == "model_not_found"
    assert error(service.draw(model="dall-e-3"), 404)["code"] == "model_not_found"


def test_an_unverified_model_says_so_in_its_pictures_and_everywhere(model: Path) -> None:
    read = Generator.load(model)
    generator = Generator(read.model, name="a", digest=read.digest, line="a: NOT VERIFIED", unverified=True)
    with served(generator) as service:
        answer = service.draw()
        assert pictures(answer)[0].text["warning"] == "UNVERIFIED"  # type: ignore[attr-defined]
        assert answer.json()["fedcanvas"]["warning"] == "UNVERIFIED"
        said = service.client.get("/v1/models").json()["data"][0]["fedcanvas"]
        assert (said["warning"], said["line"], said["verified"]) == ("UNVERIFIED", "NOT VERIFIED", False)


def test_a_runs_own_model_is_not_verified_whatever_its_card_says(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    card = json.loads((path / "model/model.json").read_text())
    claimed = {"epsilon_max": 0.1, "delta": 1e-9, "unit": "subject", "adjacency": "add-remove", "private": True}
    (path / "model/model.json").write_text(json.dumps({**card, "privacy": claimed}))
    with served(Generator.load(path)) as service:
        assert service.client.get("/v1/models").json()["data"][0]["fedcanvas"]["verified"] is False


def test_prompts_are_found_by_what_they_contain_and_capped(service: Served) -> None:
    assert service.client.get("/v1/prompts").json() == {"object": "list", "data": list(PROMPTS), "total": 3}
    found = service.client.get("/v1/prompts", params={"contains": "CIRCLE", "limit": 1}).json()
    assert found == {"object": "list", "data": ["a red circle"], "total": 1}
    assert error(service.client.get("/v1/prompts", params={"limit": 1001}), 400)["param"] == "limit"


def test_whether_the_prompt_is_one_of_training_is_said(service: Served) -> None:
    assert service.draw().json()["fedcanvas"]["trained_on_prompt"] is True
    assert service.draw(prompt="a unicorn").json()["fedcanvas"]["trained_on_prompt"] is False


def test_paths_and_methods_that_are_none_are_answered_in_the_same_shape(service: Served) -> None:
    error(service.client.get("/nope"), 404)
    error(service.client.get("/health/"), 404)
    error(service.client.get("/page/../app.py"), 404)
    error(service.client.get("/page/%00"), 404)
    answer = service.client.delete("/health")
    error(answer, 405)
    assert "GET" in answer.headers["allow"]
    error(service.client.request("BREW", "/health"), 405)


def test_metrics_count_without_a_label_that_a_client_could_invent(service: Served) -> None:
    before = service.figure("fedcanvas_pictures_total")
    service.draw(n=3)
    wait_until(lambda: service.figure("fedcanvas_pictures_total") == before + 3)  # counted beside the answer
    service.client.request("INVENTED", "/invented")
    text = service.client.get("/metrics").text
    assert "nvented" not in text
    assert "INVENTED" not in text
    assert 'fedcanvas_requests_total{method="POST",route="/v1/images/generations",status="200"}' in text


# ---- who may call


def test_every_answer_has_the_headers_that_close_a_browser(service: Served) -> None:
    for answer in (service.client.get("/v1/models"), service.client.get("/nope"), service.draw(n=0)):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "script-src 'self';" in policy
        assert "img-src 'self' data: blob:" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_no_other_origin_may_read_an_answer(service: Served) -> None:
    asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    for answer in (
        service.client.options("/v1/images/generations", headers=asked),
        service.client.get("/v1/models", headers=asked),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:99", 200), ("evil.example", 421), ("a b", 400), ("localhost@x", 400)],
)
def test_a_page_elsewhere_cannot_reach_it_by_a_name_of_its_own(service: Served, host: str, status: int) -> None:
    answer = service.client.get("/health", headers={"host": host})
    assert answer.status_code == status
    if status != 200:
        assert error(answer, status)["code"] == "bad_host"


def test_without_a_key_of_the_file_nothing_is_drawn(generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    key = add_key(path, "alice")
    with served(generator, ApiKeys(path)) as service:
        for given in (None, "", "Bearer", "Bearer fc-wrong", f"Basic {key}", key, f"Bearer {key[:-1]}"):
            headers = {} if given is None else {"authorization": given}
            for answer in (
                service.client.post("/v1/images/generations", json={"prompt": "a"}, headers=headers),
                service.client.get("/v1/models", headers=headers), service.client.get("/metrics", headers=headers),
            ):  # fmt: skip
                assert error(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert service.client.get("/health").status_code == 200
        service.client.headers["authorization"] = f"Bearer {key}"
        assert len(pictures(service.draw())) == 1
        # Its line is taken out: the key ends at once.
        other = add_key(path, "bob")
        path.write_text("\n".join(line for line in path.read_text().splitlines() if "alice" not in line))
        error(service.draw(), 401)
        service.client.headers["authorization"] = f"Bearer {other}"
        assert service.draw().status_code == 200
        path.write_text("rubbish")
        error(service.draw(), 401)


def test_the_file_of_keys_holds_no_key_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    keys = [add_key(path, name) for name in ("alice", "bob")]
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [key for key in keys if key in text or key.removeprefix("fc-") in text]
    assert f"bob sha256:{hashlib.sha256(keys[1].encode()).hexdigest()}" in text
    assert len(base64.urlsafe_b64decode(keys[0].removeprefix("fc-") + "=")) == 32
    found = ApiKeys(path)
    assert [found.holder(key) for key in (*keys, "", "fc-", "\udcff")] == ["alice", "bob", None, None, None]


@pytest.mark.parametrize("text", ["alice", "fc-secret", "alice sha256:ab", f"a/b sha256:{'0' * 64}", "\0"])
def test_a_damaged_file_of_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(TrustError) as refused:
        ApiKeys(tmp_path / "keys.txt")
    assert "secret" not in refused.value.message


def test_a_file_of_keys_that_others_can_write_is_refused(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.txt", "alice")
    (tmp_path / "keys.txt").chmod(0o622)
    with pytest.raises(TrustError, match="others can write"):
        ApiKeys(tmp_path / "keys.txt")


def test_a_key_that_is_taken_out_while_the_file_is_read_is_not_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.txt"
    key, other = add_key(path, "alice"), add_key(path, "bob")

    def reads_and_is_edited(path: Path) -> dict[str, str]:
        found = read_keys(path)
        path.write_text("\n".join(line for line in path.read_text().splitlines() if "alice" not in line))
        return found

    monkeypatch.setattr("server.serving.keys.read_keys", reads_and_is_edited)
    found = ApiKeys(path)
    monkeypatch.undo()
    assert [found.holder(each) for each in (key, other)] == [None, "bob"]


def test_a_file_of_keys_that_an_editor_saved_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    key = add_key(path, "alice")
    found = ApiKeys(path)
    (entry,) = [line for line in path.read_text().splitlines() if line.startswith("alice")]
    path.write_bytes(b"\xef\xbb\xbf" + entry.encode() + b"\r\n")
    other = add_key(path, "bob")
    assert [keys.holder(each) for keys in (found, ApiKeys(path)) for each in (key, other)] == ["alice", "bob"] * 2


def test_a_new_key_goes_into_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    real, link = tmp_path / "secrets/keys.txt", tmp_path / "keys.txt"
    link.symlink_to("secrets/keys.txt")
    keys = [add_key(link, "alice"), add_key(link, "bob")]  # the first makes the file
    assert link.is_symlink()
    assert [ApiKeys(real).holder(key) for key in keys] == ["alice", "bob"]
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


# ---- too much, too slow, gone


def test_what_is_too_much_is_refused_with_a_time_to_come_back_and_then_served(held: HeldBack) -> None:
    with served(held, most_units=4) as service, ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
        first = pool.submit(service.draw, n=4)
        assert held.asked.wait(30)
        for _ in range(50):
            answer = service.draw()
            about = error(answer, 429)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert (about["type"], about["code"]) == ("requests", "rate_limit_exceeded")
        assert service.client.get("/health").status_code == 200  # answers while it sheds
        held.let.set()
        assert len(pictures(first.result())) == 4
        wait_until(lambda: service.studio.load.units == 0)
        assert service.draw(n=4).status_code == 200
        assert service.figure('fedcanvas_refused_total{why="load"}') == 50


def test_one_request_larger_than_the_limit_is_served_alone() -> None:
    load = Load(4)
    alone = load.admit(64)
    with pytest.raises(ApiError):
        load.admit(1)
    alone.release()
    alone.release()
    assert load.units == 0


def test_a_client_that_leaves_is_not_drawn_for(held: HeldBack) -> None:
    with served(held) as service, ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
        first = pool.submit(service.draw, seed=1)
        assert held.asked.wait(30)
        body = json.dumps({"prompt": "nobody waits for this", "n": 10})
        with service.connect() as gone:
            gone.sendall(_request(body))
            wait_until(lambda: service.studio.load.units == 11)
        wait_until(lambda: service.studio.load.units == 1)  # its room is free before anything was drawn
        held.let.set()
        assert len(pictures(first.result())) == 1
        assert len(pictures(service.draw(seed=2))) == 1
        assert service.figure("fedcanvas_given_up_total") == 1
    assert not [prompt for batch in held.batches for prompt in batch if prompt.startswith("nobody")]


def test_drawing_that_takes_too_long_is_504_and_its_room_is_free(held: HeldBack) -> None:
    with served(held, drawing_seconds=0.2) as service:  # type: ignore[arg-type]
        answer = service.draw()
        assert error(answer, 504)["code"] == "timeout"
        assert "retry-after" in answer.headers
        # A batch that never ends: whoever looks after the service is told.
        wait_until(lambda: service.client.get("/health").status_code == 503)
        held.let.set()
        wait_until(lambda: service.client.get("/health").status_code == 200)
        assert service.studio.load.units == 0


def test_work_that_outlasts_the_end_of_the_service_is_503(held: HeldBack) -> None:
    with served(held, ending_seconds=1) as service, ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
        asked = [pool.submit(service.draw, seed=seed) for seed in range(2)]
        wait_until(lambda: service.studio.load.units == 2)
        service.service.should_exit = True
        try:
            assert {error(done.result(), 503)["type"] for done in asked} == {"server_error"}
        finally:
            held.let.set()
    assert service.studio.load.units == 0


def test_work_under_way_is_finished_when_the_service_ends(held: HeldBack) -> None:
    with served(held) as service, ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
        asked = [pool.submit(service.draw, seed=seed) for seed in range(2)]
        wait_until(lambda: service.studio.load.units == 2)
        service.service.should_exit = True
        wait_until(lambda: not _accepts(service))
        held.let.set()
        assert [len(pictures(done.result())) for done in asked] == [1, 1]


def _accepts(service: Served) -> bool:
    try:
        service.connect().close()
    except ConnectionError:
        return False
    return True


def test_clients_that_hang_before_their_request_is_whole_are_let_go(generator: Generator) -> None:
    with served(generator, head_seconds=0.5, body_seconds=0.5) as service:
        silent, half_head, half_body = service.connect(), service.connect(), service.connect()
        with silent, half_head, half_body:
            half_head.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nX: ")
            half_body.sendall(_request('{"prompt": "a"}')[:-1])
            assert service.draw().status_code == 200
            assert _rest(half_body).startswith(b"HTTP/1.1 408")
            assert _rest(silent) == _rest(half_head) == b""
        wait_until(lambda: len(service.service.server_state.connections) <= 1)


@pytest.mark.slow
def test_a_client_that_sends_its_head_drop_by_drop_is_let_go_too(generator: Generator) -> None:
    with served(generator, head_seconds=0.5) as service, service.connect() as slow:
        wait_until(lambda: _drips(slow))


class Clock:
    """In place of `time` where the service looks how long a client takes: a machine that stalls does not move it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.serving.service.time", clock)
    monkeypatch.setattr("server.serving.service.SWEEP_TICKS", 1)
    return clock


def test_a_client_that_does_not_take_its_answer_is_let_go_and_its_room_freed(
    generator: Generator, clock: Clock
) -> None:  # fmt: skip
    with served(generator, sending_seconds=5.0) as service, _narrow(service) as slow:
        slow.sendall(_request(json.dumps(LARGE)))
        _sent_slowly(service)
        clock.now = 4.0
        assert service.draw().status_code == 200
        wait_until(lambda: service.studio.load.units == 64)  # the room of what was sent is freed after it arrived

        def goes_on() -> bool:
            clock.now += 1.0
            return service.studio.load.units == 0

        wait_until(goes_on)


def _narrow(service: Served) -> socket.socket:
    """A client for which the kernel takes little."""
    made = socket.socket()
    made.settimeout(30)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects
    made.connect(("127.0.0.1", service.port))
    return made


LARGE = {"prompt": "a", "n": 4, "size": "1024x1024", "resize": True, "seed": 1}


def _sent_slowly(service: Served) -> Any:
    """The connection whose answer is on its way, once the service has begun to look at that."""

    def slow() -> list[Any]:
        return [one for one in list(service.service.server_state.connections) if one._sending is not None]

    wait_until(lambda: bool(slow()))
    return slow()[0]


def _taken(slow: socket.socket, connection: Any) -> bytes:
    """What a client takes until more was sent to it, and the service has seen that."""
    parts, before = [b""], connection._counting.taken
    while connection._counting.taken == before and (part := slow.recv(2**14)):
        parts.append(part)
    wait_until(lambda: connection._sending is None or connection._sending.last > before)
    return b"".join(parts)


def test_a_client_that_takes_its_answer_slowly_but_steadily_gets_all_of_it(
    generator: Generator, clock: Clock
) -> None:  # fmt: skip
    with served(generator, sending_seconds=10.0, least_sending_rate=100) as service, _narrow(service) as slow:
        slow.sendall(_request(json.dumps(LARGE), last=True))
        connection, parts = _sent_slowly(service), []
        for _ in range(4):  # for more than three times as long as it may take nothing at all
            parts.append(_taken(slow, connection))
            clock.now += 9.0
        assert connection._sending is not None  # there was more to come all the time
        while part := slow.recv(2**15):
            parts.append(part)
        answer = json.loads(b"".join(parts).partition(b"\r\n\r\n")[2])
        assert answer["data"] == service.client.post("/v1/images/generations", json=LARGE).json()["data"]


def test_a_client_that_trickles_is_let_go_though_it_never_stops(generator: Generator, clock: Clock) -> None:
    with served(generator, sending_seconds=10.0, least_sending_rate=2**40) as service, _narrow(service) as slow:
        slow.sendall(_request(json.dumps(LARGE), last=True))
        connection, taken = _sent_slowly(service), 0
        for _ in range(2):
            taken += len(_taken(slow, connection))
            clock.now += 6.0  # it never takes nothing for 10 s
        wait_until(lambda: service.studio.load.units == 0)
        taken += len(_rest(slow))
        assert taken < len(service.client.post("/v1/images/generations", json=LARGE).content)


def test_answers_that_nobody_takes_lie_in_memory_in_pieces(tmp_path: Path) -> None:
    prompts = [f"{i} " + "word " * 99 for i in range(1000)]  # an answer of half a megabyte
    generator = Generator.load(make_released_run(tmp_path / "long", prompts=[prompt.strip() for prompt in prompts]))
    asked = b"GET /v1/prompts?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served(generator) as service, contextlib.ExitStack() as clients:
        assert len(service.client.get("/v1/prompts", params={"limit": 1000}).content) > 500_000
        before = _resident()
        for _ in range(200):
            clients.enter_context(client := _narrow(service))
            client.sendall(asked)
        wait_until(lambda: sum(_begun(connection) for connection in service.service.server_state.connections) >= 200)
        assert service.client.get("/health").status_code == 200
        assert _resident() - before < 200 * 200_000  # whole they would be 100 MB
        # Whoever takes it gets it whole.
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += client.recv(2**16)
    assert b'"total": 1000}' in answer


def _begun(connection: Any) -> bool:
    return connection.cycle is not None and connection.cycle.response_started


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_pictures_behind_urls_that_nobody_takes_are_bounded_together(generator: Generator) -> None:
    with served(generator, gallery_bytes=2**20) as service:
        (one,) = service.draw(**{**LARGE, "n": 1}, response_format="url").json()["data"]
        size = len(service.client.get(one["url"]).content)
        path = one["url"].removeprefix(service.url)
        with contextlib.ExitStack() as clients:
            for _ in range(2**20 // size):
                client = clients.enter_context(_narrow(service))
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            wait_until(lambda: service.client.get(path).status_code == 429)
        wait_until(lambda: service.client.get(path).status_code == 200)


def test_what_is_no_http_is_answered_in_the_same_shape(service: Served) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\r\n\r\n", b"X" * 70_000 + b"\r\n\r\n"):
        with service.connect() as client:
            client.sendall(sent)
            answer = _rest(client)
        if not answer:
            continue  # what was not read when it was closed made the kernel reset it
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert json.loads(body)["error"]["code"] == "bad_http"
    assert service.client.get("/health").status_code == 200


def test_more_connections_than_there_may_be_are_told_so(generator: Generator) -> None:
    with served(generator, most_connections=3) as service:
        idle = [service.connect() for _ in range(3)]
        wait_until(lambda: len(service.service.server_state.connections) == 3)
        answer = service.client.get("/health")
        assert error(answer, 429)["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"]
        for client in idle:
            client.close()
        wait_until(lambda: not service.service.server_state.connections)
        assert service.client.get("/health").status_code == 200


@pytest.mark.slow
def test_a_thousand_connections_at_once_are_each_served_or_told_to_come_again(generator: Generator) -> None:
    with served(generator, most_units=600) as service:
        clients = [service.connect() for _ in range(1000)]
        for number, client in enumerate(clients):
            client.sendall(_request(json.dumps({"prompt": f"a red circle {number}"}), last=True))
        answers = [_rest(client) for client in clients]
        for client in clients:
            client.close()
        statuses = [int(answer[9:12]) for answer in answers]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 600
        wait_until(lambda: service.studio.load.units == 0)
        assert service.draw().status_code == 200


def _request(body: str, *, last: bool = False) -> bytes:
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}{'Connection: close' if last else 'A: b'}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def _rest(client: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    parts = []
    try:
        while part := client.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def _drips(client: socket.socket) -> bool:
    """Sends another byte of a head that never ends; whether the other end has had enough."""
    try:
        client.sendall(b"G")
    except OSError:
        return True
    return False


# ---- the page


def test_only_files_of_the_pages_folder_are_served_and_only_of_its_kinds(tmp_path: Path) -> None:
    (tmp_path / "page/icons").mkdir(parents=True)
    for name in ("page/index.html", "page/icons/a.svg", "page/notes.txt", "secret.html"):
        (tmp_path / name).write_text(name)
    found = read_page(tmp_path / "page")
    assert set(found) == {"index.html", "icons/a.svg"}
    assert found["icons/a.svg"].kind == "image/svg+xml"
    assert read_page(tmp_path / "none") == {}


# ---- the command


@pytest.mark.slow
def test_openais_own_client_draws_with_the_command(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    key = add_key(path, "alice")
    with command("--model", str(model), "--api-keys", str(path)) as (process, address, said):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
            (about,) = client.models.list().data
            assert about.id == client.models.retrieve("a").id == "a"
            assert about.model_extra is not None
            assert about.model_extra["fedcanvas"]["epsilon"] == 1.5
            made = client.images.generate(
                prompt="a secret wish", model="a", n=2, response_format="b64_json", extra_body={"seed": 4}
            )
            assert made.data is not None
            expected = Generator.load(model).generate(["a secret wish"], n=2, seed=4)
            for one, picture in zip(made.data, expected, strict=True):
                assert one.b64_json is not None
                assert base64.b64decode(one.b64_json) == picture.png()
            kept = client.images.generate(prompt="a red circle", response_format="url").data
            assert kept is not None
            assert httpx.get(str(kept[0].url), trust_env=False).headers["content-type"] == "image/png"
            with pytest.raises(openai.BadRequestError, match="8x8 only") as wrong:
                client.images.generate(prompt="a secret wish", size="1024x1024")
            assert wrong.value.param == "size"
            with pytest.raises(openai.NotFoundError):
                client.images.generate(prompt="a", model="dall-e-3")
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="fc-wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.images.generate(prompt="a")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    log = "".join(said)
    assert "no evidence beside it" in said[0]  # the model's own line comes first
    assert "secret" not in log
    assert key not in log
    assert "holder=alice" in log
    assert said[-1] == "stopped\n"


@pytest.mark.slow
def test_openais_client_waits_and_tries_again_after_429(held: HeldBack) -> None:
    with served(held, most_units=1) as service, ThreadPoolExecutor(2) as pool:  # type: ignore[arg-type]
        first = pool.submit(service.draw)
        assert held.asked.wait(30)
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError):
                client.images.generate(prompt="a")
            again = pool.submit(client.with_options(max_retries=5).images.generate, prompt="a")
            wait_until(lambda: service.figure('fedcanvas_refused_total{why="load"}') == 2)
            held.let.set()
            assert again.result(30).data
        assert first.result().status_code == 200


@pytest.mark.parametrize("asked_for", [False, True])
def test_prompts_stand_in_the_log_only_when_asked_for(
    generator: Generator, caplog: pytest.LogCaptureFixture, asked_for: bool
) -> None:
    with caplog.at_level(logging.INFO, logger="fedcanvas.serve"), served(generator, log_prompts=asked_for) as service:
        service.draw(prompt="a wish\x1b[2J")
    (record,) = caplog.records
    line, fields = Lines("text").format(record), json.loads(Lines("json").format(record))
    assert (fields["text"], fields["status"], fields["pictures"]) == ("POST /v1/images/generations", 200, 1)
    assert fields.get("prompt") == ("a wish\x1b[2J" if asked_for else None)
    assert ("wish" in line) == asked_for
    assert line.isprintable()


def test_a_port_that_is_taken_is_told_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(["serve", "--model", str(model), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err


def test_it_listens_for_others_only_with_keys_or_when_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::"):
        assert run(["serve", "--model", str(model), "--host", host]) == 2
        assert "there are no keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ([], 2, "missing --model"),
        (["--model", "nowhere"], 8, "no model at"),
        (["--model", "{model}", "--api-keys", "{folder}/none.txt"], 10, "--new-key"),
        (["--model", "{model}", "--api-keys", "{folder}/empty.txt"], 2, "holds no key"),
        (["--model", "{model}", "--host", "no.such.name.invalid"], 2, "nobody knows a machine"),
        (["--model", "{model}", "--host", "192.0.2.1", "--public-without-keys"], 2, "cannot be listened on"),
        (["--new-key", "alice"], 2, "--new-key needs --api-keys"),
        (["--api-keys", "{folder}/keys.txt", "--new-key", "../alice"], 2, "a name of a key is"),
    ],
)
def test_what_cannot_be_served_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], code: int, said: str
) -> None:
    (tmp_path / "empty.txt").touch()
    assert run(["serve", "--port", "0", *(word.format(model=model, folder=tmp_path) for word in line)]) == code
    assert said in capsys.readouterr().err


def test_a_new_key_is_printed_once_and_a_second_of_that_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["serve", "--api-keys", str(tmp_path / "keys.txt"), "--new-key", "alice"]
    assert run(line) == 0
    key = capsys.readouterr().out.strip()
    assert ApiKeys(tmp_path / "keys.txt").holder(key) == "alice"
    assert run(line) == 2
    assert "alice has a key already" in capsys.readouterr().err


# ---- over the whole of the API


@pytest.mark.slow
def test_schemathesis_finds_no_500_and_no_answer_that_the_document_does_not_allow(
    service: Served, tmp_path: Path
) -> None:  # fmt: skip
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    found = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--seed", "1",
         "--checks", f"{checks},unsupported_method", "--phases", "coverage,fuzzing", "--max-examples", "100"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    assert "7 selected / 7 total" in found.stdout
    assert service.client.get("/health").status_code == 200


@pytest.mark.slow
def test_memory_is_flat_over_many_requests(service: Served) -> None:
    for _ in range(200):
        service.draw(n=10)
    before = _resident()
    for _ in range(1000):
        service.draw(n=10)
    # 10,000 pictures and their answers, 2 KB each: kept by mistake, they would be about 20 MB.
    assert _resident() - before < 5_000_000
