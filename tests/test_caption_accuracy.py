"""Attribute accuracy: right on real pictures, at chance on noise, and only about prompts it knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from public_pictures import PLAIN, as_pictures, setting_of, shapes

from shared.data import ImageCaptionDataset
from shared.errors import ConfigError, DataError
from shared.metrics import METRICS, Measurement, Pictures
from shared.metrics.attributes import STRIDES, measuring_classifier
from shared.metrics.caption_accuracy import CaptionAccuracy
from simulations.shapes import Kind, grammar


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.metrics.attributes.LEAST_STEPS", 60)


@pytest.fixture(scope="module")
def metric() -> CaptionAccuracy:
    with pytest.MonkeyPatch.context() as short:  # the other fixture comes later than this one
        short.setattr("shared.metrics.attributes.LEAST_STEPS", 60)
        return CaptionAccuracy.prepare(setting_of(shapes(1500)))


def values(measured: Measurement) -> dict[str, float]:
    return {figure.name: figure.value for figure in measured.figures}


def test_real_pictures_of_another_seed_are_read_right(metric: CaptionAccuracy) -> None:
    measured = metric.measure(as_pictures(shapes(300, seed=9)))
    first = measured.figures[0]
    assert first.name == "accuracy"
    assert first.value > 0.98
    assert first.floor is not None
    assert first.floor > 0.98
    assert (first.n, first.reference) == (300, "shapes, fit")
    assert first.interval.low <= first.value <= first.interval.high
    assert not any("left out" in note for note in measured.notes)


def chances(metric: CaptionAccuracy, kinds: Sequence[Kind]) -> dict[str, float | None]:
    """Of a model that is asked for each of the kinds twice."""
    prompts = [kind.caption for kind in kinds] * 2
    found = metric.measure(Pictures(shapes(len(prompts)).images, prompts))
    return {figure.name: figure.chance for figure in found.figures}


def test_chance_is_one_over_what_is_asked_for_and_all_is_their_product(metric: CaptionAccuracy) -> None:
    assert chances(metric, PLAIN) == {
        "accuracy": pytest.approx(1 / 12), "accuracy of colour": pytest.approx(1 / 6), "accuracy of background": 1 / 2,
    }  # fmt: skip


def test_a_model_that_always_shows_the_same_scores_at_chance_where_few_things_are_asked_for(
    metric: CaptionAccuracy,
) -> None:
    asked = [kind for kind in PLAIN if kind.background == "white" and kind.colour in ("red", "blue", "green")]
    chance = chances(metric, asked)
    assert chance == {"accuracy": 1 / 3, "accuracy of colour": 1 / 3, "accuracy of background": 1.0}
    real = shapes(1, kinds=asked[:1]).images.repeat(30, axis=0)
    measured = metric.measure(Pictures(real, [kind.caption for kind in asked] * 10))
    assert values(measured) == pytest.approx(chance)


def test_pictures_that_ignore_their_prompts_score_at_chance(metric: CaptionAccuracy) -> None:
    real = shapes(1200, seed=9)
    rng = np.random.default_rng(0)
    prompts = [PLAIN[place].caption for place in rng.integers(len(PLAIN), size=1200)]
    accuracy = values(metric.measure(Pictures(real.images, prompts)))
    # Each is a mean of 1,200 independent coins: six standard deviations, false alarm below 1e-8.
    assert abs(accuracy["accuracy of colour"] - 1 / 6) < 6 * (1 / 6 * 5 / 6 / 1200) ** 0.5
    assert abs(accuracy["accuracy of background"] - 1 / 2) < 6 * (1 / 4 / 1200) ** 0.5


def test_all_counts_pictures_that_are_right_in_everything(metric: CaptionAccuracy) -> None:
    kinds = {(kind.colour, kind.background): kind.caption for kind in PLAIN}
    real = shapes(120, seed=9)
    flipped = {"white": "black", "black": "white"}
    columns = zip(real.attributes["colour"], real.attributes["background"], strict=True)
    # A third has the wrong background, another third the wrong colour.
    prompts = [
        kinds[colour if place % 3 != 1 else ("red" if colour != "red" else "blue"),
              background if place % 3 else flipped[background]]
        for place, (colour, background) in enumerate(columns)
    ]  # fmt: skip
    accuracy = values(metric.measure(Pictures(real.images, prompts)))
    assert accuracy["accuracy of colour"] == pytest.approx(2 / 3, abs=0.03)
    assert accuracy["accuracy of background"] == pytest.approx(2 / 3, abs=0.03)
    assert accuracy["accuracy"] == pytest.approx(1 / 3, abs=0.03)


def test_confusions_count_every_picture_where_it_was_asked_and_read(metric: CaptionAccuracy) -> None:
    real = shapes(200, seed=9)
    tables = {table.title: table for table in metric.measure(as_pictures(real)).tables}
    colours = tables["confusion of colour"]
    assert colours.head == ["asked", *sorted(set(real.attributes["colour"]))]
    for row in colours.rows:
        assert sum(row[1:]) == real.attributes["colour"].count(row[0])


def test_the_worst_by_alignment_are_those_with_a_wrong_prompt(metric: CaptionAccuracy) -> None:
    real = shapes(60, seed=9)
    prompts = [captions[0] for captions in real.captions]
    wrong = next(kind.caption for kind in PLAIN if kind.colour != real.attributes["colour"][7])
    prompts[7] = wrong
    galleries = {gallery.name: gallery for gallery in metric.measure(Pictures(real.images, prompts)).galleries}
    assert galleries["worst"].rows[0][0].startswith(wrong)
    assert np.array_equal(galleries["worst"].rows[0][1][0], real.images[7])


def test_prompts_that_no_caption_equals_are_left_out_and_counted(metric: CaptionAccuracy) -> None:
    real = shapes(4, seed=9)
    prompts = [real.captions[0][0], "a unicorn", real.captions[2][0], real.captions[3][0].upper()]
    measured = metric.measure(Pictures(real.images, prompts))
    assert measured.figures[0].n == 2
    assert any("2 pictures are left out" in note for note in measured.notes)
    with pytest.raises(DataError, match="no prompt equals a caption"):
        metric.measure(Pictures(real.images, ["a unicorn"] * 4))


def test_classes_that_no_prompt_asks_for_are_named(metric: CaptionAccuracy) -> None:
    red = [kind for kind in PLAIN if kind.colour == "red"]
    notes = metric.measure(as_pictures(shapes(20, seed=9, kinds=red))).notes
    assert any(note.startswith("no prompt of the model asks for colour blue") for note in notes)


def test_a_caption_that_stands_beside_different_attributes_says_nothing() -> None:
    data = shapes(600)
    data.captions[:] = [("something", captions[0]) for captions in data.captions]
    classifier = CaptionAccuracy.prepare(setting_of(data)).classifier
    assert "something" not in classifier.captions
    assert classifier.matching(["something", PLAIN[0].caption]) == [1]


def test_few_different_captions_are_an_attribute_where_no_column_is_one() -> None:
    data = shapes(1500)
    data.attributes.clear()
    measured = CaptionAccuracy.prepare(setting_of(data)).measure(as_pictures(shapes(100, seed=9)))
    assert measured.figures[0].value > 0.9
    assert "caption" in measured.tables[0].title


def test_a_column_that_captions_do_not_tell_or_with_a_rare_value_is_left_out_and_named() -> None:
    data = shapes(1500)
    rng = np.random.default_rng(99)  # another than that of the shapes
    data.attributes["scanner"] = [str(letter) for letter in rng.choice(["A", "B"], size=1500)]
    data.attributes["diagnosis"] = ["rare" if row < 3 else "common" for row in range(1500)]
    measured = CaptionAccuracy.prepare(setting_of(data)).measure(as_pictures(shapes(100, seed=9)))
    assert {figure.name for figure in measured.figures} == {
        "accuracy", "accuracy of colour", "accuracy of background",
    }  # fmt: skip
    notes = " | ".join(measured.notes)
    assert "the column scanner is not measured: captions do not tell it" in notes
    assert "the column diagnosis is not measured: 3 pictures have the value 'rare'" in notes


@pytest.mark.parametrize(
    "attributes",
    [{}, {"one": ["same"] * 120}, {"name": [f"picture {place}" for place in range(120)]}, {"gap": ["a", ""] * 60}],
    ids=["none", "one value", "a name each", "holes"],
)
def test_columns_that_are_no_attributes_are_not_measured(attributes: dict[str, list[str]]) -> None:
    images = np.random.default_rng(0).integers(256, size=(120, 8, 8, 3), dtype=np.uint8)
    data = ImageCaptionDataset(images=images, captions=[("x",)] * 120, attributes=attributes, name="mine")
    with pytest.raises(DataError, match="the reference set mine has no attributes"):
        CaptionAccuracy.prepare(setting_of(data))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[] if size < 64 else pytest.mark.slow) for size in sorted(STRIDES)]
)
def test_every_image_size_and_number_of_channels_is_learned(size: int, channels: int) -> None:
    classifier = measuring_classifier(setting_of(shapes(500, size=size, channels=channels)))
    assert classifier.held_out["background"] > 0.95


def test_the_same_reference_set_is_learned_once_and_another_one_again(tmp_path: Path) -> None:
    told: list[str] = []
    first = CaptionAccuracy.prepare(setting_of(shapes(500), cache_dir=tmp_path, told=told.append))
    again = CaptionAccuracy.prepare(setting_of(shapes(500), cache_dir=tmp_path, told=told.append))
    assert len(told) == 1
    assert again.classifier.held_out == first.classifier.held_out
    assert again.classifier.fingerprint == first.classifier.fingerprint
    probe = as_pictures(shapes(50, seed=4))
    assert again.measure(probe).figures == first.measure(probe).figures
    other = shapes(500, seed=1)
    CaptionAccuracy.prepare(setting_of(other, cache_dir=tmp_path, told=told.append))
    assert len(told) == 2


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    told: list[str] = []
    CaptionAccuracy.prepare(setting_of(shapes(500), cache_dir=tmp_path, told=told.append))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    CaptionAccuracy.prepare(setting_of(shapes(500), cache_dir=tmp_path, told=told.append))
    assert len(told) == 2


def test_the_random_state_of_the_run_is_left_alone() -> None:
    import torch

    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    CaptionAccuracy.prepare(setting_of(shapes(500)))
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
    measured = CaptionAccuracy.prepare(setting_of(data, n=1000)).measure(as_pictures(shapes(200, size=32, seed=3)))
    assert measured.figures[0].floor is not None
    assert measured.figures[0].floor > 0.995
