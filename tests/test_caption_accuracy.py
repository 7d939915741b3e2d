"""Attribute accuracy: right on real pictures, at chance on noise, and only about prompts it knows."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from shared.data import ImageCaptionDataset
from shared.errors import ConfigError, DataError
from shared.metrics import METRICS
from shared.metrics.caption_accuracy import STRIDES, CaptionAccuracy
from simulations.shapes import Kind, draw, grammar

# Colour and background alone: learned in seconds, so that a test can hold the whole way.
PLAIN = [kind for kind in grammar() if kind.shape == "circle" and kind.size == "large"]


def shapes(
    count: int, *, size: int, channels: int = 3, seed: int = 0, kinds: list[Kind] = PLAIN
) -> ImageCaptionDataset:
    rng = np.random.default_rng(seed)
    picks = [kinds[place] for place in rng.integers(len(kinds), size=count)]
    images = np.stack([draw(kind, image_size=size, rng=rng) for kind in picks])
    if channels == 1:
        images = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])[..., None]
    names = ("background",) if channels == 1 else ("colour", "background")
    attributes = {name: [getattr(kind, name) for kind in picks] for name in names}
    return ImageCaptionDataset(images=images, captions=[(kind.caption,) for kind in picks], attributes=attributes)


def quiet(text: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.metrics.caption_accuracy.LEAST_STEPS", 60)


@pytest.fixture(scope="module")
def metric() -> CaptionAccuracy:
    return CaptionAccuracy.prepare(shapes(600, size=8), cache_dir=None, progress=quiet)


def test_real_pictures_of_another_seed_are_read_right(metric: CaptionAccuracy) -> None:
    real = shapes(300, size=8, seed=9)
    figures = metric.measure(real.images, [captions[0] for captions in real.captions])
    assert figures["accuracy"]["all"] > 0.98
    assert metric.held_out["all"] > 0.98
    assert figures["held_out_real"] == metric.held_out
    assert figures["n"] == 300
    assert figures["left_out"] == 0


def test_chance_is_one_over_the_values_and_all_is_their_product(metric: CaptionAccuracy) -> None:
    real = shapes(20, size=8, seed=9)
    chance = metric.measure(real.images, [captions[0] for captions in real.captions])["chance"]
    assert chance == {"colour": pytest.approx(1 / 6), "background": 1 / 2, "all": pytest.approx(1 / 12)}


def test_pictures_that_ignore_their_prompts_score_at_chance(metric: CaptionAccuracy) -> None:
    real = shapes(1200, size=8, seed=9)
    rng = np.random.default_rng(0)
    prompts = [PLAIN[place].caption for place in rng.integers(len(PLAIN), size=1200)]
    accuracy = metric.measure(real.images, prompts)["accuracy"]
    # Each is a mean of 1,200 independent coins: six standard deviations, false alarm below 1e-8.
    assert abs(accuracy["colour"] - 1 / 6) < 6 * (1 / 6 * 5 / 6 / 1200) ** 0.5
    assert abs(accuracy["background"] - 1 / 2) < 6 * (1 / 4 / 1200) ** 0.5


def test_all_counts_pictures_that_are_right_in_everything(metric: CaptionAccuracy) -> None:
    kinds = {(kind.colour, kind.background): kind.caption for kind in PLAIN}
    real = shapes(120, size=8, seed=9)
    flipped = {"white": "black", "black": "white"}
    columns = zip(real.attributes["colour"], real.attributes["background"], strict=True)
    # A third has the wrong background, another third the wrong colour.
    prompts = [
        kinds[colour if place % 3 != 1 else ("red" if colour != "red" else "blue"),
              background if place % 3 else flipped[background]]
        for place, (colour, background) in enumerate(columns)
    ]  # fmt: skip
    accuracy = metric.measure(real.images, prompts)["accuracy"]
    assert accuracy["colour"] == pytest.approx(2 / 3, abs=0.03)
    assert accuracy["background"] == pytest.approx(2 / 3, abs=0.03)
    assert accuracy["all"] == pytest.approx(1 / 3, abs=0.03)


def test_prompts_that_no_caption_equals_are_left_out_and_counted(metric: CaptionAccuracy) -> None:
    real = shapes(4, size=8, seed=9)
    prompts = [real.captions[0][0], "a unicorn", real.captions[2][0], real.captions[3][0].upper()]
    figures = metric.measure(real.images, prompts)
    assert (figures["n"], figures["left_out"]) == (2, 2)
    with pytest.raises(DataError, match="no prompt equals a caption"):
        metric.measure(real.images, ["a unicorn"] * 4)


def test_a_caption_that_stands_beside_different_attributes_says_nothing() -> None:
    data = shapes(300, size=8)
    data.captions[:] = [("something", captions[0]) for captions in data.captions]
    metric = CaptionAccuracy.prepare(data, cache_dir=None, progress=quiet)
    assert "something" not in metric.captions
    assert metric.matching(["something", PLAIN[0].caption]) == [PLAIN[0].caption]


@pytest.mark.parametrize(
    "attributes",
    [{}, {"one": ["same"] * 60}, {"name": [f"picture {place}" for place in range(60)]}, {"gap": ["a", ""] * 30}],
    ids=["none", "one value", "a name each", "holes"],
)
def test_columns_that_are_no_attributes_are_not_measured(attributes: dict[str, list[str]]) -> None:
    data = ImageCaptionDataset(
        images=np.zeros((60, 8, 8, 3), np.uint8), captions=[("x",)] * 60, attributes=attributes, name="mine"
    )
    with pytest.raises(DataError, match="the reference set mine has no attributes"):
        CaptionAccuracy.prepare(data, cache_dir=None, progress=quiet)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", sorted(STRIDES))
def test_every_image_size_and_number_of_channels_is_learned(size: int, channels: int) -> None:
    data = shapes(240, size=size, channels=channels)
    metric = CaptionAccuracy.prepare(data, cache_dir=None, progress=quiet)
    assert metric.held_out["background"] > 0.95


def test_the_same_reference_set_is_learned_once_and_another_one_again(tmp_path: Path) -> None:
    told: list[str] = []
    first = CaptionAccuracy.prepare(shapes(240, size=8), cache_dir=tmp_path, progress=told.append)
    again = CaptionAccuracy.prepare(shapes(240, size=8), cache_dir=tmp_path, progress=told.append)
    assert len(told) == 1
    assert again.held_out == first.held_out
    probe = shapes(50, size=8, seed=4)
    prompts = [captions[0] for captions in probe.captions]
    assert again.measure(probe.images, prompts) == first.measure(probe.images, prompts)
    other = shapes(240, size=8)
    other.images[0, 0, 0, 0] ^= 1
    CaptionAccuracy.prepare(other, cache_dir=tmp_path, progress=told.append)
    assert len(told) == 2


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    told: list[str] = []
    CaptionAccuracy.prepare(shapes(120, size=8), cache_dir=tmp_path, progress=told.append)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    CaptionAccuracy.prepare(shapes(120, size=8), cache_dir=tmp_path, progress=told.append)
    assert len(told) == 2


def test_the_random_state_of_the_run_is_left_alone() -> None:
    import torch

    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    CaptionAccuracy.prepare(shapes(120, size=8), cache_dir=None, progress=quiet)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_an_unknown_metric_is_answered_with_the_known_ones() -> None:
    assert METRICS.get("caption-accuracy") is CaptionAccuracy
    with pytest.raises(ConfigError, match="unknown metric"):
        METRICS.get("caption")


@pytest.mark.slow
def test_all_attributes_of_the_shapes_are_read_almost_without_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = shapes(8000, size=32, seed=2, kinds=list(grammar()))
    kinds = {kind.caption: kind for kind in grammar()}
    of_all = [kinds[captions[0]] for captions in data.captions]
    data.attributes.update({name: [getattr(kind, name) for kind in of_all] for name in Kind._fields})
    metric = CaptionAccuracy.prepare(data, cache_dir=None, progress=quiet)
    assert metric.held_out["all"] > 0.995
