"""Views of images: the right shape, only what was asked for, inside its bounds, and record by record."""

from __future__ import annotations

import numpy as np
import pytest

from shared.config import DataConfig
from shared.data import augment

ALL = {"crop": 0.2, "flip": True, "rotation": 20.0, "brightness": 0.3, "contrast": 0.3, "saturation": 0.5}


def noise(count: int, *, side: int = 28, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def views(images: np.ndarray, seed: int = 1, **settings: float | bool) -> np.ndarray:
    return augment(images, config=DataConfig(**settings), rng=np.random.default_rng(seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 64])
def test_views_have_their_own_axis(count: int, channels: int, side: int) -> None:
    images = noise(count, side=side, channels=channels)
    made = views(images, views=3, **ALL)
    assert made.shape == (count, 3, side, side, channels)
    assert made.dtype == np.uint8


def test_without_any_change_the_view_is_the_image() -> None:
    images = noise(4)
    assert np.array_equal(views(images)[:, 0], images)


def test_the_images_themselves_stay_as_they_are() -> None:
    images = noise(4)
    images.setflags(write=False)
    before = images.copy()
    views(images, views=2, **ALL)
    assert np.array_equal(images, before)


def test_equal_seeds_give_equal_views_and_views_differ_from_one_another() -> None:
    images = noise(3)
    made = views(images, views=4, **ALL)
    assert np.array_equal(made, views(images, views=4, **ALL))
    assert not np.array_equal(made, views(images, seed=2, views=4, **ALL))
    assert len({view.tobytes() for record in made for view in record}) == 12


def test_a_record_does_not_change_the_views_of_another() -> None:
    images = noise(6)
    other = images.copy()
    other[2] = 255 - other[2]
    changed = (views(images, views=3, **ALL) != views(other, views=3, **ALL)).any(axis=(1, 2, 3, 4))
    assert changed.tolist() == [False, False, True, False, False, False]


def test_flipping_mirrors_left_and_right_exactly_in_about_half_of_the_views() -> None:
    images = noise(400, side=8)
    made = views(images, flip=True)[:, 0]
    mirrored = (made == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (made == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    # Binomial(400, 1/2): five standard deviations are 50, false alarm < 6e-7.
    assert abs(int(mirrored.sum()) - 200) < 50


def test_a_crop_shows_a_part_of_the_image_and_reaches_every_corner() -> None:
    # Red is the column and green the row of a pixel: a view tells which part it shows.
    ramp = np.zeros((28, 28, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.meshgrid(np.arange(28) * 9, np.arange(28) * 9)
    made = views(np.repeat(ramp[None], 500, axis=0), crop=0.5)[:, 0].astype(float) / 9
    left, right = made[:, 14, 0, 0], made[:, 14, -1, 0]
    top, bottom = made[:, 0, 14, 1], made[:, -1, 14, 1]
    width, height = right - left, bottom - top
    assert abs(width - height).max() < 0.5  # square, upright
    assert width.min() > 27 * 0.5 - 0.6
    assert width.max() <= 27.01
    assert width.min() < 27 * 0.55
    assert left.min() < 0.6
    assert right.max() > 26.4
    # Never beyond the border: a repeated border would show as a flat edge.
    assert (made[:, 14, 1, 0] > made[:, 14, 0, 0] - 1e-9).all()


def test_a_turn_stays_within_its_angle_and_repeats_the_border() -> None:
    image = np.full((1, 64, 64, 1), 200, np.uint8)
    assert (views(image, rotation=180.0) == 200).all()  # no black corners

    line = np.zeros((1, 64, 64, 1), np.uint8)
    line[:, :, 31:33] = 255
    angles = []
    for seed in range(60):
        view = views(line, seed=seed, rotation=30.0)[0, 0, :, :, 0].astype(float)
        rows = np.arange(16, 48)
        columns = (view[rows] * np.arange(64)).sum(axis=1) / view[rows].sum(axis=1)
        angles.append(np.degrees(np.arctan(np.polyfit(rows, columns, 1)[0])))
    assert max(np.abs(angles)) < 30.5
    assert max(angles) > 20
    assert min(angles) < -20


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_is_a_factor_within_its_bound(channels: int) -> None:
    image = np.full((200, 8, 8, channels), 100, np.uint8)
    made = views(image, brightness=0.4)[:, 0].reshape(200, -1)
    assert (made == made[:, :1]).all()
    assert made.min() >= 60
    assert made.max() <= 140
    assert made.min() < 66
    assert made.max() > 134


def test_contrast_moves_values_away_from_mid_grey_or_towards_it() -> None:
    image = np.zeros((200, 8, 8, 1), np.uint8) + np.array([77.5, 177.5], np.uint8).repeat(4)[:, None]
    made = views(image, contrast=0.5)[:, 0].astype(float)
    dark, light = made[:, 0, 0, 0], made[:, 0, -1, 0]
    assert abs((dark - 127.5) / (77 - 127.5) - (light - 127.5) / (177 - 127.5)).max() < 0.03  # one factor for both
    factor = (light - 127.5) / (177 - 127.5)
    assert 0.48 < factor.min() < 0.6
    assert 1.4 < factor.max() < 1.52


def test_saturation_keeps_the_luma_and_leaves_grey_alone() -> None:
    image = np.zeros((100, 8, 8, 3), np.uint8) + np.array([120, 100, 60], np.uint8)
    made = views(image, saturation=0.6)[:, 0, 0, 0].astype(float)
    luma = np.array([0.299, 0.587, 0.114])
    assert abs(made @ luma - np.array([120, 100, 60]) @ luma).max() < 1
    spread = made.max(axis=1) - made.min(axis=1)
    assert spread.min() < 30 < 60 < 80 < spread.max()
    grey = noise(5, channels=1)
    assert abs(views(np.repeat(grey, 3, axis=3), saturation=1.0)[:, 0].astype(int) - grey).max() <= 1
    assert np.array_equal(views(grey, saturation=1.0)[:, 0], grey)


def test_switching_one_change_on_leaves_the_draws_of_the_others() -> None:
    image = np.full((50, 8, 8, 3), 100, np.uint8)  # flat: geometry shows nothing
    assert np.array_equal(views(image, brightness=0.4), views(image, brightness=0.4, crop=0.3, rotation=10.0))
