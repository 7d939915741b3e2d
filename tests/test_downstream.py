"""Classifiers trained on generated pictures: equal to scikit-learn's own, at chance on noise, right on real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from public_pictures import PLAIN, as_pictures, setting_of, shapes

from shared.data import ImageCaptionDataset
from shared.errors import DataError
from shared.metrics import Measurement, Pictures
from shared.metrics.downstream import CLASSIFIERS, Downstream, SimpleConvnet, tell, train_convnet


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.metrics.downstream.FEWEST_STEPS", 120)
    monkeypatch.setattr("shared.metrics.downstream.EPOCHS", 4)


def digits() -> ImageCaptionDataset:
    """scikit-learn's 1,797 handwritten digits of 8 x 8, which come with it."""
    from sklearn.datasets import load_digits

    found = load_digits()
    names = [str(label) for label in found.target]
    images = (found.images * 15.9375).astype(np.uint8)[..., None]
    captions = [(f"the digit {name}",) for name in names]
    return ImageCaptionDataset(images=images, captions=captions, attributes={"class": names}, name="digits")


def values(measured: Measurement) -> dict[str, float]:
    return {figure.name: figure.value for figure in measured.figures}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # both end after a stated number of passes
def test_real_digits_are_told_as_scikit_learn_tells_them_from_the_same_pictures() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    setting = setting_of(digits(), n=2000, trainings=1)
    part, test = setting.public.fit, setting.public.test
    measured = Downstream.prepare(setting).measure(Pictures(part.images, [c[0] for c in part.captions]))
    flat, shown = part.images.reshape(len(part), -1) / 255, test.images.reshape(len(test), -1) / 255
    wanted = np.array(test.attributes["class"])
    for name, model in {
        "logistic regression accuracy": LogisticRegression(max_iter=100),
        "mlp accuracy": MLPClassifier(max_iter=30, random_state=0),
    }.items():
        theirs = model.fit(flat, part.attributes["class"]).predict(shown)
        assert values(measured)[name] == pytest.approx(float((theirs == wanted).mean()), abs=0.01)
    assert values(measured)["cnn accuracy"] > 0.9
    # The floor is these very pictures, so it says the same where a training has no seed.
    floors = {figure.name: figure.floor for figure in measured.figures}
    assert floors["logistic regression accuracy"] == values(measured)["logistic regression accuracy"]


def test_pictures_that_do_not_show_their_prompts_teach_nothing() -> None:
    setting = setting_of(shapes(1500), trainings=1)
    real = shapes(400, seed=9)
    prompts = [PLAIN[place].caption for place in np.random.default_rng(0).integers(len(PLAIN), size=400)]
    measured = Downstream.prepare(setting).measure(Pictures(real.images, prompts))
    for figure in measured.figures:
        # Of the background a classifier that learned nothing is right in all or in none: it has one bit.
        if "background" not in figure.name:
            assert figure.chance is not None
            assert figure.value < figure.chance + 0.25  # far from the .9 and more of real pictures
    assert measured.figures[0].floor is not None
    assert measured.figures[0].floor > 0.9


@pytest.mark.slow
def test_every_attribute_has_a_figure_with_interval_seeds_floor_and_chance() -> None:
    setting = setting_of(shapes(1500), trainings=2)
    measured = Downstream.prepare(setting).measure(as_pictures(shapes(300, seed=9)))
    names = [figure.name for figure in measured.figures]
    assert names == [
        f"{classifier} accuracy{of}" for classifier in CLASSIFIERS for of in ("", " of colour", " of background")
    ]
    first = measured.figures[0]
    assert (first.name, first.n, first.reference, first.reference_n) == ("cnn accuracy", 300, "shapes, test", 300)
    assert first.seeds["trainings"] == [0, 1]
    assert first.interval.low < first.value < first.interval.high or first.value == 1
    assert first.floor_n == 300
    confusion = {table.title: table for table in measured.tables}["confusion of colour"]
    assert sum(sum(row[1:]) for row in confusion.rows) == len(setting.public.test)


@pytest.mark.slow
def test_classes_that_no_picture_shows_are_named_and_told_wrong() -> None:
    red_and_blue = [kind for kind in PLAIN if kind.colour in ("red", "blue")]
    setting = setting_of(shapes(1500), trainings=1)
    measured = Downstream.prepare(setting).measure(as_pictures(shapes(200, seed=9, kinds=red_and_blue)))
    assert any("no generated picture shows colour" in note for note in measured.notes)
    share = np.mean([colour in ("red", "blue") for colour in setting.public.test.attributes["colour"]])
    assert values(measured)["cnn accuracy of colour"] <= share


def test_prompts_that_ask_for_one_thing_or_nothing_known_are_refused() -> None:
    metric = Downstream.prepare(setting_of(shapes(600), trainings=1))
    images = shapes(20).images
    for prompt in ("a unicorn", PLAIN[0].caption):
        with pytest.raises(DataError, match="fewer than two things"):
            metric.measure(Pictures(images, [prompt] * 20))


@pytest.mark.slow
def test_what_real_pictures_get_is_measured_once_and_kept(tmp_path: Path) -> None:
    told: list[str] = []
    probe = as_pictures(shapes(100, seed=9))
    for _ in range(2):
        setting = setting_of(shapes(600), cache_dir=tmp_path, told=told.append, trainings=1)
        found = Downstream.prepare(setting).measure(probe)
    assert sum("real pictures" in line for line in told) == len(CLASSIFIERS)
    assert found.figures[0].floor is not None


@pytest.mark.slow
def test_chance_is_what_telling_the_commonest_gets() -> None:
    setting = setting_of(shapes(600), trainings=1)
    columns = setting.public.test.attributes
    pairs = list(zip(columns["colour"], columns["background"], strict=True))
    figures = {figure.name: figure for figure in Downstream.prepare(setting).measure(as_pictures(shapes(100))).figures}
    most = {name: max(columns[name].count(value) for value in columns[name]) for name in columns}
    assert figures["cnn accuracy of colour"].chance == pytest.approx(most["colour"] / len(pairs))
    assert figures["cnn accuracy"].chance == pytest.approx(max(pairs.count(pair) for pair in pairs) / len(pairs))


@pytest.mark.slow
def test_where_real_pictures_are_fewer_the_figure_for_as_few_generated_ones_stands_beside() -> None:
    setting = setting_of(shapes(300), trainings=2)
    fit = len(setting.public.fit)
    measured = Downstream.prepare(setting).measure(as_pictures(shapes(400, seed=9)))
    made = as_pictures(shapes(400, seed=9))
    fewer = Downstream.prepare(setting).measure(Pictures(made.images[:fit], made.prompts[:fit]))
    for more, less in zip(measured.figures, fewer.figures, strict=True):
        assert (more.n, more.floor_n, less.n, less.at_floor_n) == (400, fit, fit, None)
        assert more.at_floor_n is not None
        if "regression" in more.name:  # no seed decides it, only which pictures
            assert more.at_floor_n == less.value


@pytest.mark.slow
def test_a_prompt_that_stands_beside_different_things_is_nobody_s_label() -> None:
    data = shapes(600)
    vague = [("something",) if place % 3 == 0 else captions for place, captions in enumerate(data.captions)]
    setting = setting_of(dataclasses.replace(data, captions=vague), trainings=1)
    real = shapes(120, seed=9)
    prompts = ["something" if place % 4 == 0 else captions[0] for place, captions in enumerate(real.captions)]
    measured = Downstream.prepare(setting).measure(Pictures(real.images, prompts))
    assert measured.figures[0].n == 90
    assert any(note.startswith("30 pictures are left out") for note in measured.notes)


@pytest.mark.slow
def test_an_interval_is_never_a_point_nor_beyond_what_an_accuracy_can_be() -> None:
    setting = setting_of(shapes(600), trainings=1)
    for figure in Downstream.prepare(setting).measure(as_pictures(shapes(300, seed=9))).figures:
        assert 0 <= figure.interval.low < figure.interval.high <= 1


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (28, 1), (32, 3), (64, 1)])
def test_the_convnet_fits_every_image_size(size: int, channels: int) -> None:
    network = SimpleConvnet(image_size=size, channels=channels, classes=[3, 2])
    first, second = network(torch.rand(5, channels, size, size))
    assert (first.shape, second.shape) == ((5, 3), (5, 2))


def test_the_convnet_for_28_px_is_the_published_one() -> None:
    """https://keras.io/examples/vision/mnist_convnet/ prints 34,826 parameters."""
    network = SimpleConvnet(image_size=28, channels=1, classes=[10])
    assert sum(parameter.numel() for parameter in network.parameters()) == 34_826


@pytest.mark.slow
def test_a_training_depends_on_its_seed_alone() -> None:
    images, labels = shapes(100).images, {"x": np.arange(100) % 2}
    torch.manual_seed(5)
    first = train_convnet(images, labels, 3)
    torch.manual_seed(6)
    again = train_convnet(images, labels, 3)
    assert np.array_equal(tell(first, images)[0], tell(again, images)[0])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
