"""FID, KID, inception score, precision, recall, density, coverage: against closed forms, torch-fidelity and prdc."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured_sets import part, setting_of
from scipy.stats import binom

from shared.data.encoding import encode_png
from shared.errors import DataError
from shared.metrics import METRICS, Figure, Measurement, Pictures, PublicSets, Setting
from shared.metrics.frechet import squared_distance
from shared.metrics.inception import build as build_inception
from shared.metrics.kernel_distance import block_interval, squared_discrepancy
from shared.metrics.manifold import Balls, compare
from shared.torchvision_operators import ensure_importable

ensure_importable()
ALL = ("fid", "kid", "is", "prdc")


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def measure(name: str, setting: Setting, pictures: Pictures) -> Measurement:
    return METRICS.get(name).prepare(setting).measure(pictures)


def figure(name: str, setting: Setting, pictures: Pictures) -> Figure:
    return measure(name, setting, pictures).figures[0]


def by_name(measurement: Measurement) -> dict[str, Figure]:
    return {found.name: found for found in measurement.figures}


def exactly(rng: np.random.Generator, n: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """`(n, D)` whose own mean and covariance are those given, up to rounding."""
    rows = rng.standard_normal((n, len(mean)))
    rows -= rows.mean(axis=0)
    rows = np.linalg.solve(np.linalg.cholesky(np.cov(rows, rowvar=False)), rows.T).T
    whole: np.ndarray = rows @ np.linalg.cholesky(covariance).T + mean
    return whole


def same(features: np.ndarray) -> np.ndarray:
    """As logits of two classes: sure of one where the first feature is large."""
    return np.stack([features[:, 0], -features[:, 0]], axis=1)


# ---- closed forms --------------------------------------------------------------------------------------------


def test_fid_is_the_frechet_distance_of_two_gaussians() -> None:
    first, second = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    rng, shift = draws(0), np.array([0.7, -0.2])
    generated = exactly(rng, 300, shift, first)
    reference = exactly(rng, 200, np.zeros(2), second)
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    product = first @ second
    overlap = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    truth = shift @ shift + np.trace(first) + np.trace(second) - 2 * overlap
    found = figure("fid", *setting_of(generated=generated, reference=reference, floor=reference))
    assert found.value == pytest.approx(truth, abs=1e-5)  # features are float32
    assert found.floor == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("n", "m", "dim"), [(60, 50, 8), (20, 60, 30), (60, 20, 30), (20, 25, 30), (2, 2, 5)])
def test_the_fast_form_of_the_frechet_distance_equals_torch_fidelity(n: int, m: int, dim: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = draws(1)
    first, second = rng.standard_normal((n, dim)) * np.linspace(0, 3, dim), rng.standard_normal((m, dim)) + 0.3
    statistics = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (first, second)]
    truth = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    # torch-fidelity takes roots of eigenvalues that are 0 up to rounding: about 1e-8 x D where pictures are few.
    assert squared_distance(first, second) == pytest.approx(truth, abs=1e-4)


def test_fid_of_few_pictures_is_too_high_by_what_the_module_says() -> None:
    n, dim, repeats = 100, 6, 200
    rng = draws(2)
    found = [squared_distance(*rng.standard_normal((2, n, dim))) for _ in range(repeats)]
    # Of the means D (1/n + 1/m), of the covariances D (D + 1) / 4 (1/n + 1/m); the next order is 1/n as much.
    expected = dim * (1 + (dim + 1) / 4) * (2 / n)
    z = (np.mean(found) - expected) / (np.std(found) / math.sqrt(repeats))
    assert abs(z) < 6  # false alarm < 6e-7 at 5; the next order is about 1 % of the bias, which is 1 more


def test_kid_of_a_shift_is_the_closed_form_of_its_kernel() -> None:
    """X = 0 and Y = c in one dimension, always: E k(x,x') = 1, E k(y,y') = (c^2 + 1)^3, E k(x,y) = 1."""
    c = 0.5
    zeros = np.zeros((30, 1))
    found = figure("kid", *setting_of(generated=zeros, reference=np.full((40, 1), c), floor=zeros[:9]))
    truth = 1 + (c**2 + 1) ** 3 - 2
    assert found.value == pytest.approx(truth, abs=1e-6)
    assert found.floor == pytest.approx(truth, abs=1e-6)
    assert found.interval.high - found.interval.low == pytest.approx(0, abs=1e-9)  # nothing varies


def test_the_discrepancy_of_a_block_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kernel_mmd

    rng = draws(3)
    first, second = rng.standard_normal((50, 7)), rng.standard_normal((50, 7)) * 1.2 + 0.2
    own = squared_discrepancy(torch.from_numpy(first), torch.from_numpy(second))
    assert own == pytest.approx(kernel_mmd(first, second), abs=1e-9)


@pytest.mark.parametrize(("logits", "truth"), [(np.eye(3) * 40, 3.0), (np.ones((3, 3)), 1.0)])
def test_inception_score_counts_the_classes_that_are_told_surely(logits: np.ndarray, truth: float) -> None:
    rows = np.tile(logits, (300, 1))
    setting, pictures = setting_of(generated=rows, reference=rows, floor=rows[:600], logits=lambda features: features)
    found = figure("is", setting, pictures)
    # Shuffled into 10 splits of 90: shares of a third within sqrt(2 / 9 / 90); entropy is flat there.
    assert found.value == pytest.approx(truth, abs=0.1)
    assert found.floor == pytest.approx(truth, abs=0.2)
    assert found.interval.low <= found.value <= found.interval.high


def test_identical_sets_have_distance_zero_and_full_precision_recall_density_and_coverage() -> None:
    rows = draws(4).standard_normal((400, 5))
    setting, pictures = setting_of(generated=rows, reference=rows, floor=rows, logits=same)
    assert figure("fid", setting, pictures).value == pytest.approx(0, abs=1e-4)
    kid = figure("kid", setting, pictures)
    assert abs(kid.value) < kid.interval.high - kid.value
    found = by_name(measure("prdc", setting, pictures))
    assert [found[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    # Each picture is in its own ball and in those of the others whose nearest k - 1 it is among: k in the mean.
    assert found["density"].value == pytest.approx(1, abs=1e-6)


# ---- torch-fidelity and prdc ---------------------------------------------------------------------------------


def test_precision_and_recall_equal_torch_fidelity_and_density_and_coverage_equal_prdc(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from prdc import compute_prdc
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = draws(5)
    generated = (rng.standard_normal((1300, 6)) * 0.8 + 0.2).astype(np.float32)  # more than a block
    reference = rng.standard_normal((1100, 6)).astype(np.float32)
    found = by_name(measure("prdc", *setting_of(generated=generated, reference=reference, floor=reference[:50])))
    fidelity = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(reference), verbose=False)
    assert found["precision"].value == pytest.approx(fidelity["precision"], abs=1e-3)
    assert found["recall"].value == pytest.approx(fidelity["recall"], abs=1e-3)
    paper = compute_prdc(reference, generated, nearest_k=5)
    assert found["density"].value == pytest.approx(paper["density"], abs=1e-3)
    assert found["coverage"].value == pytest.approx(paper["coverage"], abs=1e-3)
    # The same k means the same in both; only the rim differs, and nothing lies there.
    narrow = compute_prdc(reference, generated, nearest_k=3)
    assert found["precision"].value == pytest.approx(narrow["precision"], abs=1e-3)
    assert found["recall"].value == pytest.approx(narrow["recall"], abs=1e-3)
    capsys.readouterr()  # prdc prints


def test_the_rim_counts_for_precision_and_recall_alone() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])  # 0 has its third neighbour at 3, its fifth at 5
    at_the_rim = compare(Balls.around(real), torch.tensor([[-3.0], [-30.0], [-31.0]]))
    assert list(at_the_rim["precision"]) == [1, 0, 0]
    inside, rim = (compare(Balls.around(real), torch.tensor([[place], [99.0]])) for place in (-4.99, -5.0))
    assert (inside["density"][0], rim["density"][0]) == (0.2, 0)
    assert (inside["coverage"][0], rim["coverage"][0]) == (1, 0)


def random_inception(path: Path) -> Path:
    """Weights that keep the scale of what passes through, as trained ones do; the usual ones die out in 48 layers."""
    from shared.metrics.inception import _network_without_weights

    network = _network_without_weights()
    rng = torch.Generator().manual_seed(7)
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 4:
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * math.sqrt(2 / tensor[0].numel()))
        if name == "fc.weight":
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * 0.1)
    torch.save(state, path)
    return path


def blobs(seed: int, count: int, *, side: int = 20) -> np.ndarray:
    """`(count, side, side, 3)` uint8: smooth coloured noise, so that features differ."""
    rng = draws(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)).repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    return np.clip(coarse + rng.integers(-20, 20, (count, side, side, 3)) + 10 * seed, 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_all_figures_equal_torch_fidelitys_command_line_on_the_same_files(tmp_path: Path) -> None:
    weights = random_inception(tmp_path / "weights.pth")
    sets = {"generated": blobs(1, 26), "reference": blobs(2, 22)}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for place, image in enumerate(images):
            (tmp_path / name / f"{place:03d}.png").write_bytes(encode_png(image))
    code = (
        "from shared.torchvision_operators import ensure_importable; ensure_importable();"
        "from torch_fidelity.fidelity import main; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "--input1", tmp_path / "generated", "--input2", tmp_path / "reference", "--isc",
         "--fid", "--kid", "--prc", "--kid-subset-size", "22", "--no-cache", "--json", "--silent",
         "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = json.loads(ran.stdout)

    reference = part("reference", sets["reference"])
    public = PublicSets(fit=reference, reference=reference, floor=part("floor", blobs(3, 4)), test=reference)
    setting = Setting(public=public, build_extractor=lambda s: build_inception(s, str(weights)))
    pictures = Pictures(sets["generated"], ["a prompt"] * 26)
    found = {found.name: found.value for name in ALL for found in measure(name, setting, pictures).figures}
    name = setting.extractor.name  # these weights are not the published ones, so the plain names are not theirs
    pairs = {f"frechet distance by {name}": "frechet_inception_distance",
             f"kernel distance by {name}": "kernel_inception_distance_mean",
             f"class score by {name}": "inception_score_mean",
             "precision": "precision", "recall": "recall"}  # fmt: skip
    for ours, theirs in pairs.items():
        assert found[ours] == pytest.approx(said[theirs], rel=1e-3, abs=1e-3), ours
    assert said["frechet_inception_distance"] > 0.1  # the weights tell pictures apart
    assert said["inception_score_mean"] > 1.001


# ---- intervals -----------------------------------------------------------------------------------------------


def covered(one: Callable[[int], tuple[Figure, float]], *, repeats: int) -> int:
    found = [one(seed) for seed in range(repeats)]
    return sum(of.interval.low <= truth <= of.interval.high for of, truth in found)


def enough(count: int, repeats: int, rate: float = 0.93) -> bool:
    """Whether `count` agrees with a coverage of at least `rate`, with a false-alarm rate below 1e-5.

    93 %, not 95: a deviation from 30 replicas is itself uncertain, which costs about 1.5 points. Of 100 repeats an
    interval half as wide covers 67 in the mean, which passes with a probability of 0.4 %.
    """
    return bool(binom.cdf(count, repeats, rate) > 1e-5)


@pytest.mark.slow
def test_the_interval_of_fid_covers_the_expected_fid_at_the_stated_rate() -> None:
    n, dim, shift = 300, 2, 0.8
    truth = shift**2 + dim * (1 + (dim + 1) / 4) * (2 / n)  # with the bias at this n, which the interval is not about

    def one(seed: int) -> tuple[Figure, float]:
        rng = draws(100 + seed)
        generated, reference = rng.standard_normal((2, n, dim))
        generated[:, 0] += shift
        return figure("fid", *setting_of(generated=generated, reference=reference, floor=reference, seed=seed)), truth

    count = covered(one, repeats=100)
    assert enough(count, 100), count


def test_the_interval_of_kid_covers_the_truth_at_the_stated_rate() -> None:
    n, shift = 200, 0.6
    # One dimension, X ~ N(a, 1): E (xy + 1)^3 = E x^3 E y^3 + 3 E x^2 E y^2 + 3 E x E y + 1.
    moments = [np.array([mean, mean**2 + 1, mean**3 + 3 * mean]) for mean in (shift, 0.0)]
    difference = moments[0] - moments[1]
    truth = 3 * difference[0] ** 2 + 3 * difference[1] ** 2 + difference[2] ** 2

    def one(seed: int) -> bool:
        generated, reference = draws(200 + seed).standard_normal((2, n, 1))
        # Of so few pictures a subset is all of them, and the figure the discrepancy of the whole sets.
        value = squared_discrepancy(torch.from_numpy(generated + shift), torch.from_numpy(reference))
        interval = block_interval(value, generated + shift, reference, seed=seed)
        return interval.low <= truth <= interval.high

    count = sum(one(seed) for seed in range(100))
    assert enough(count, 100), count


@pytest.mark.slow
def test_the_intervals_of_precision_and_recall_cover_the_truth_for_the_set_that_is_held_fixed() -> None:
    rng = draws(6)
    fixed = rng.standard_normal((150, 2))
    drawn = rng.standard_normal((20_000, 2)) * 1.5
    many = compare(Balls.around(torch.from_numpy(fixed)), torch.from_numpy(drawn[:4000]))
    truth = float(many["precision"].mean())  # within 0.008 at 1 of 2 draws in 1,000; the intervals are 0.1 wide
    dense = float(many["density"].mean())

    def one(name: str, truth: float) -> Callable[[int], tuple[Figure, float]]:
        def found(seed: int) -> tuple[Figure, float]:
            generated = draws(300 + seed).standard_normal((200, 2)) * 1.5
            setting, pictures = setting_of(generated=generated, reference=fixed, floor=fixed[:9], seed=seed)
            return by_name(measure("prdc", setting, pictures))[name], truth

        return found

    for name, value in (("precision", truth), ("density", dense)):
        count = covered(one(name, value), repeats=100)
        assert enough(count, 100), (name, count)


@pytest.mark.slow
def test_the_interval_of_the_inception_score_covers_the_expected_score_at_the_stated_rate() -> None:
    n, repeats = 200, 100

    def one(seed: int) -> Figure:
        generated = draws(400 + seed).standard_normal((n, 1)) * 2
        setting, pictures = setting_of(generated=generated, reference=generated[:9], floor=generated[:9], logits=same,
                                       seed=seed)  # fmt: skip
        return figure("is", setting, pictures)

    found = [one(seed) for seed in range(repeats)]
    truth = np.mean([of.value for of in found])  # of this n and its splits; its own error is a tenth of theirs
    count = sum(of.interval.low <= truth <= of.interval.high for of in found)
    assert enough(count, repeats, rate=0.92), count


def test_intervals_say_what_was_drawn_and_what_was_held_fixed() -> None:
    rows = draws(7).standard_normal((60, 3))
    setting, pictures = setting_of(generated=rows + 0.3, reference=rows, floor=rows, logits=same)
    how = {found.name: found.interval.how for name in ALL for found in measure(name, setting, pictures).figures}
    assert "30 bootstraps of generated and reference pictures" in how["fid"]
    assert "10 disjoint blocks" in how["kid"]
    assert "200 bootstraps of the pictures of each split" in how["inception score"]
    for name in ("precision", "density"):
        assert how[name].endswith("generated ones; the real pictures held fixed"), how[name]
    for name in ("recall", "coverage"):
        assert how[name].endswith("real ones; the generated pictures held fixed"), how[name]


# ---- floor, names, warnings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_floor_is_the_figure_of_real_pictures_in_place_of_generated_ones(name: str) -> None:
    rng = draws(8)
    generated, reference, floor = (rng.standard_normal((n, 4)) for n in (90, 80, 50))
    generated += 0.5
    found = by_name(measure(name, *setting_of(generated=generated, reference=reference, floor=floor, logits=same)))
    at_floor = by_name(measure(name, *setting_of(generated=floor, reference=reference, floor=floor, logits=same)))
    first = by_name(measure(name, *setting_of(generated=generated[:50], reference=reference, floor=floor, logits=same)))
    for key, of in found.items():
        assert of.floor_n == 50
        assert of.floor == pytest.approx(at_floor[key].value, abs=1e-4)
        assert of.at_floor_n == pytest.approx(first[key].value, abs=1e-4)
        assert first[key].at_floor_n is None
        assert first[key].floor == of.floor
    fewer = by_name(measure(name, *setting_of(generated=generated[:20], reference=reference, floor=floor, logits=same)))
    shorter = by_name(measure(name, *setting_of(generated=floor[:20], reference=reference, floor=floor, logits=same)))
    for key, of in fewer.items():
        assert of.floor_n == 20
        assert of.floor == pytest.approx(shorter[key].value, abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_figure_names_its_sets_seeds_and_extractor_and_survives_json(name: str) -> None:
    rows = draws(9).standard_normal((40, 4))
    setting, pictures = setting_of(generated=rows + 1, reference=rows[:30], floor=rows[:10], logits=same, seed=3)
    for found in measure(name, setting, pictures).figures:
        assert (found.n, found.extractor) == (40, "rows 01234567")
        expected = ("made, floor", 10) if name == "is" else ("made, reference", 30)
        assert (found.reference, found.reference_n) == expected
        assert found.seeds["pictures"] == [3]
        assert found.seeds["resampling"] == [3]
        assert found.better == ("lower" if name in ("fid", "kid") else "higher")
        assert Figure.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.name in METRIC_FIGURES[name]


METRIC_FIGURES = {"fid": ["fid"], "kid": ["kid"], "is": ["inception score"],
                  "prdc": ["precision", "recall", "density", "coverage"]}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_same_pictures_and_seeds_give_the_same_figures(name: str) -> None:
    rows = draws(10).standard_normal((50, 4))
    sets: dict[str, Any] = {"generated": rows + 1, "reference": rows[:40], "floor": rows[:10], "logits": same}
    first, second = (measure(name, *setting_of(**sets)).figures for _ in range(2))
    assert first == second
    assert [found.name for found in first] == METRIC_FIGURES[name]


@pytest.mark.parametrize("name", ALL)
def test_figures_are_the_same_where_features_of_public_pictures_were_kept(name: str, tmp_path: Path) -> None:
    rows = draws(18).standard_normal((40, 3))
    setting, pictures = setting_of(generated=rows + 1, reference=rows, floor=rows[:9], logits=same)
    kept = [replace(setting, cache_dir=tmp_path, _kept={}) for _ in range(2)]
    assert measure(name, kept[0], pictures).figures == measure(name, kept[1], pictures).figures
    assert kept[0].extractor.seen.count(40) == 2 + 1  # type: ignore[attr-defined]  # generated twice, reference once


def test_only_figures_by_published_weights_go_without_a_warning_and_by_their_plain_names() -> None:
    rows = draws(11).standard_normal((60, 2))
    sets: dict[str, Any] = {"generated": rows + 1, "reference": rows, "floor": rows, "logits": same}
    for name in ALL:
        for found in measure(name, *setting_of(**sets, published=False)).figures:
            assert found.warning.startswith("not comparable with published ")
            assert "rows 01234567" in found.warning
            assert found.name not in ("fid", "kid", "inception score")
            assert found.name.endswith(" by rows 01234567") or name == "prdc"
        for found in measure(name, *setting_of(**sets, published=True)).figures:
            assert found.warning == ""


@pytest.mark.parametrize(("n", "dim", "said"), [(10, 12, "10 pictures for 12 features: singular covariance"),
                                                (40, 12, "40 pictures for 12 features: biased upward"),
                                                (60, 12, "")])  # fmt: skip
def test_fid_of_too_few_pictures_says_so(n: int, dim: int, said: str) -> None:
    rows = draws(12).standard_normal((90, dim))
    found = figure("fid", *setting_of(generated=rows[:n], reference=rows, floor=rows, published=True))
    assert found.warning.startswith(said)
    assert bool(found.warning) == bool(said)
    turned = figure("fid", *setting_of(generated=rows, reference=rows[:n], floor=rows, published=True))
    assert turned.warning == found.warning


def test_ten_thousand_pictures_are_enough_for_the_features_of_inception() -> None:
    from shared.metrics.frechet import _too_few

    assert _too_few(10_000, 10_000, 2048) == ""
    assert "biased upward" in _too_few(9_999, 10_000, 2048)
    assert "singular" in _too_few(10_000, 2_048, 2048)


def test_kid_and_inception_score_of_few_pictures_say_that_subsets_and_splits_are_fewer() -> None:
    rows = draws(13).standard_normal((12, 3))
    setting, pictures = setting_of(generated=rows, reference=rows, floor=rows[:4], logits=same)
    assert "KID over subsets of 12 pictures, fewer than the usual 1,000" in measure("kid", setting, pictures).notes
    assert "inception score over 6 splits, fewer than the usual 10" in measure("is", setting, pictures).notes
    assert not measure("prdc", setting, pictures).notes


# ---- what cannot be measured ---------------------------------------------------------------------------------


def test_no_inception_score_without_classes() -> None:
    rows = draws(14).standard_normal((12, 3))
    setting, _ = setting_of(generated=rows, reference=rows, floor=rows)
    with pytest.raises(DataError, match="rows 01234567 tells no classes") as error:
        METRICS.get("is").prepare(setting)
    assert "local" in str(error.value.hint)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("place", "what"), [(0, "the generated pictures"), (12, "made, reference"), (24, "made, floor")]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_by_name(name: str, place: int, what: str, value: float) -> None:
    rows = draws(15).standard_normal((36, 3))
    rows[place, 1] = value
    setting, pictures = setting_of(generated=rows[:12], reference=rows[12:24], floor=rows[24:], logits=same)
    with pytest.raises(DataError, match=f"{what}: features of 1 of 12 pictures by rows 01234567 are not finite"):
        measure(name, setting, pictures)


@pytest.mark.parametrize("name", ALL)
def test_one_picture_has_no_distance_and_two_have_one(name: str) -> None:
    rows = draws(16).standard_normal((30, 3))
    with pytest.raises(DataError, match="the generated pictures: 1 pictures"):
        measure(name, *setting_of(generated=rows[:1], reference=rows, floor=rows, logits=same))
    for found in measure(name, *setting_of(generated=rows[:2], reference=rows, floor=rows, logits=same)).figures:
        assert math.isfinite(found.value)
        assert found.interval.low <= found.value <= found.interval.high
    for found in measure(name, *setting_of(generated=rows, reference=rows[:2], floor=rows[:2], logits=same)).figures:
        assert math.isfinite(found.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("generated", "reference"), [(True, False), (False, True), (True, True)])
def test_sets_of_one_picture_over_and_over_are_measured(name: str, generated: bool, reference: bool) -> None:
    rows, other = draws(17).standard_normal((2, 30, 3))
    if generated:
        rows[:] = rows[0]
    if reference:
        other[:] = other[0]
    for found in measure(name, *setting_of(generated=rows, reference=other, floor=other[:9], logits=same)).figures:
        assert math.isfinite(found.value)
        assert found.interval.low <= found.value <= found.interval.high
        assert found.floor is not None
        assert math.isfinite(found.floor)
