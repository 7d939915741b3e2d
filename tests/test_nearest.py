"""Nearest neighbours: copies are found, other real pictures are not taken for copies, and the neighbours are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from public_pictures import setting_of, shapes

from shared.errors import DataError
from shared.metrics import Pictures, Setting
from shared.metrics.extractor import Features
from shared.metrics.nearest import Nearest


class Pixels:
    """An extractor whose features are the pixels themselves."""

    name, fingerprint, published = "pixels 00000000", "0" * 64, False

    def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
        return Features(images.reshape(len(images), -1).astype(np.float32), None)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of(shapes(1000), build_extractor=lambda setting: Pixels())


def test_copies_are_very_near_and_their_neighbour_is_the_copied_picture(setting: Setting) -> None:
    reference = setting.public.reference
    measured = Nearest.prepare(setting).measure(Pictures(reference.images[:50], ["x"] * 50))
    figures = {figure.name: figure for figure in measured.figures}
    assert figures["very near"].value == 1.0
    assert figures["median distance"].value == 0.0
    for text, images in measured.galleries[0].rows:
        assert text == "x: 0"
        assert np.array_equal(images[0], images[1])


def test_other_real_pictures_are_as_near_as_real_ones_are(setting: Setting) -> None:
    floor, nearest = setting.public.floor, Nearest.prepare(setting)
    judged = floor.images[1::2]  # the other half says what is very near
    [very_near, _] = nearest.measure(Pictures(judged, ["x"] * len(judged))).figures
    assert very_near.value == very_near.floor
    assert very_near.floor_n == len(judged)
    figures = {f.name: f for f in nearest.measure(Pictures(floor.images, ["x"] * len(floor))).figures}
    assert figures["median distance"].value == pytest.approx(1.0)
    assert figures["median distance"].interval.low <= 1.0 <= figures["median distance"].interval.high


def test_a_median_that_cannot_be_told_is_said(setting: Setting) -> None:
    public = replace(setting.public, floor=setting.public.reference)
    pictures = Pictures(public.floor.images, ["x"] * len(public.floor))
    measured = Nearest.prepare(replace(setting, public=public, _kept={})).measure(pictures)
    assert [figure.name for figure in measured.figures] == ["very near"]
    assert any("no median distance" in note for note in measured.notes)


def test_neighbours_are_those_of_a_slow_loop(setting: Setting) -> None:
    made = shapes(30, seed=5).images
    reference = setting.public.reference
    measured = Nearest.prepare(setting).measure(Pictures(made, [str(n) for n in range(30)]))
    for text, images in measured.galleries[0].rows:
        number, distance = text.split(": ")
        every = [np.linalg.norm(made[int(number)].astype(float) - other.astype(float)) for other in reference.images]
        assert float(distance) == pytest.approx(min(every), rel=2e-3)
        assert np.array_equal(images[1], reference.images[int(np.argmin(every))])


def test_features_that_are_not_finite_are_refused(setting: Setting) -> None:
    class Broken(Pixels):
        def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
            found = super().features(images, step=step)
            if len(images) == 3:
                found.pooled[1, 1] = np.nan
            return found

    broken = setting_of(shapes(1000), build_extractor=lambda setting: Broken())
    with pytest.raises(DataError, match="not finite"):
        Nearest.prepare(broken).measure(Pictures(shapes(3).images, ["x"] * 3))
