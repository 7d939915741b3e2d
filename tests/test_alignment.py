"""CLIP score and retrieval: equal to transformers and to loops, chance where nothing is known, and every refusal.

Models are real classes of transformers with random weights, made here; what two of them are fitted to is judged on
pictures that they were not fitted on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_text import tiny_model, tiny_tokenizer

from shared.errors import DataError
from shared.metrics import METRICS, Part, Pictures, PublicSets, Setting
from shared.metrics.alignment import ClipScore, Retrieval, as_many_texts, clip_scores, image_to_text, text_to_image
from shared.metrics.dual_encoder import DualEncoder, Embedded, build, dual_encoder, embedded, fit_maps

COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (240, 240, 240),
    "red green": (200, 190, 20), "red blue": (190, 20, 190), "green blue": (20, 190, 190), "ground": (20, 20, 20),
}  # fmt: skip
CAPTIONS = [f"a {colour} square" for colour in COLOURS]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KINDS = ["clip", "siglip", "vision-text-dual-encoder"]


def coloured(count: int, *, seed: int, size: int = 8) -> tuple[np.ndarray, list[str]]:
    """Noisy pictures of one colour each, and what says which; every colour equally often."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(count) % len(COLOURS)
    base = np.array(list(COLOURS.values()))[kinds][:, None, None, :]
    images = np.clip(base + rng.normal(0, 15, (count, size, size, 3)), 0, 255).astype(np.uint8)
    return images, [CAPTIONS[kind] for kind in kinds]


def part(name: str, images: np.ndarray, captions: Sequence[str]) -> Part:
    digest = hashlib.sha256(images.tobytes() + repr(list(captions)).encode()).hexdigest()
    return Part(f"colours, {name}", images, [(caption,) for caption in captions], {}, digest)


def public(**counts: int) -> PublicSets:
    sizes = {"fit": 120, "reference": 8, "floor": 64, "test": 8, **counts}
    return PublicSets(**{name: part(name, *coloured(n, seed=i)) for i, (name, n) in enumerate(sizes.items())})


def setting_of(model: Path | str, **settings: Any) -> Setting:
    def no_extractor(setting: Setting) -> Any:
        raise AssertionError("alignment needs no extractor")

    return Setting(settings.pop("public", None) or public(), no_extractor, dual_encoder=str(model), **settings)


def tiny(kind: str) -> Any:
    import transformers as hf

    torch.manual_seed(5)
    match kind:
        case "siglip":
            words = {"vocab_size": 13, "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 2}
            vision = {"image_size": 8, "patch_size": 4, **SIZES}
            return hf.SiglipModel(hf.SiglipConfig(text_config={**words, **SIZES}, vision_config=vision))
        case "vit":
            return hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **SIZES))
        case "resnet":
            return hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
        case "vision-text-dual-encoder":
            return hf.VisionTextDualEncoderModel(vision_model=tiny("vit"), text_model=tiny_model("bert"))
    return tiny_model(kind)


def image_processor(kind: str) -> Any:
    import transformers as hf

    if kind == "clip":
        return hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    if kind == "siglip":
        return hf.SiglipImageProcessorPil(size={"height": 8, "width": 8})
    return hf.ViTImageProcessorPil(size={"height": 8, "width": 8})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            tiny(kind).save_pretrained(root / kind)
            if kind not in ("vit", "resnet"):
                tiny_tokenizer().save_pretrained(root / kind)
            if kind != "bert":
                image_processor(kind).save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.fixture(scope="module")
def pair(folders: Callable[[str], Path]) -> str:
    return f"{folders('vit')}+{folders('bert')}"


def altered(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


# ---- clip score ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 13])
def test_the_clip_score_is_what_transformers_says_of_each_pair(
    folders: Callable[[str], Path], kind: str, size: int
) -> None:
    images, prompts = coloured(40, seed=7, size=size)
    model, filled = tiny(kind).eval(), {"padding": "max_length", "max_length": 12} if kind == "siglip" else {}
    tokens = tiny_tokenizer()(prompts, return_tensors="pt", return_token_type_ids=False, **{"padding": True, **filled})
    with torch.no_grad():
        output = model(**tokens, **image_processor(kind)(list(images), return_tensors="pt"))
        cosines = output.logits_per_image
        if kind == "siglip":
            cosines = cosines - model.logit_bias
        cosines = (cosines / model.logit_scale.exp()).numpy()
    expected = 100 * np.maximum(cosines.diagonal(), 0)

    setting = setting_of(folders(kind))
    measured = ClipScore.prepare(setting).measure(Pictures(images, prompts))
    np.testing.assert_allclose(clip_scores(embedded(setting, Pictures(images, prompts))), expected, atol=1e-3)
    (figure,) = measured.figures
    assert figure.name == "clip score"
    assert figure.value == pytest.approx(expected.mean(), abs=1e-3)
    assert figure.interval.low <= figure.value <= figure.interval.high
    assert figure.extractor is not None
    assert figure.extractor.split()[0] == kind

    # Chance: the mean over all pairs of a picture and another prompt, which a loop over random derangements approaches.
    other = [[100 * max(cosines[i, j], 0) for j in range(8) if prompts[j] != prompts[i]] for i in range(40)]
    assert figure.chance == pytest.approx(np.mean(other), abs=1e-3)


def test_the_floor_is_the_score_of_real_pictures_with_their_captions(folders: Callable[[str], Path]) -> None:
    setting = setting_of(folders("clip"))
    floor = setting.public.floor
    as_if_generated = Pictures(floor.images, [captions[0] for captions in floor.captions])
    (figure,) = ClipScore.prepare(setting).measure(as_if_generated).figures
    assert figure.floor == pytest.approx(figure.value)
    assert (figure.floor_n, figure.n, figure.reference_n, figure.at_floor_n) == (64, 64, 64, None)
    assert figure.reference == "colours, floor"
    more = Pictures(np.concatenate([floor.images, floor.images[::-1]]), [c[0] for c in floor.captions] * 2)
    (figure,) = ClipScore.prepare(setting).measure(more).figures
    assert figure.at_floor_n == pytest.approx(figure.floor)


def test_the_best_and_the_worst_pictures_are_shown_with_their_prompts(pair: str) -> None:
    images, prompts = coloured(40, seed=8)
    prompts[3] = CAPTIONS[(3 + 4) % 8]  # of another colour
    setting = setting_of(pair)
    best, worst = ClipScore.prepare(setting).measure(Pictures(images, prompts)).galleries
    assert (best.name, worst.name) == ("best by clip", "worst by clip")
    assert [len(gallery.rows) for gallery in (best, worst)] == [8, 8]
    scores = clip_scores(embedded(setting, Pictures(images, prompts)))
    text, shown = worst.rows[0]
    assert text == f"{prompts[3]} ({scores[3]:.1f})"
    np.testing.assert_array_equal(shown, images[3:4])
    np.testing.assert_array_equal(best.rows[0][1][0], images[scores.argmax()])


def test_one_prompt_has_a_score_and_no_chance(folders: Callable[[str], Path]) -> None:
    pictures = Pictures(coloured(4, seed=1)[0], ["a square"] * 4)
    measured = ClipScore.prepare(setting_of(folders("clip"))).measure(pictures)
    assert measured.figures[0].chance is None
    assert "one prompt" in measured.notes[0]


def test_a_model_that_does_not_know_real_pictures_is_called_blind(folders: Callable[[str], Path], pair: str) -> None:
    images, prompts = coloured(16, seed=2)
    colours = public()
    mixed = dataclasses.replace(colours.floor, captions=colours.floor.captions[1:] + colours.floor.captions[:1])
    blind = setting_of(pair, public=dataclasses.replace(colours, floor=mixed))
    for setting, warns in ((setting_of(pair), False), (blind, True)):
        (figure,) = ClipScore.prepare(setting).measure(Pictures(images, prompts)).figures
        assert ("cannot tell" in figure.warning) == warns


# ---- retrieval -----------------------------------------------------------------------------------------------


def brute_force(found: Embedded, k: int) -> tuple[float, float]:
    """Recall at k in both directions by loops; for embeddings without ties and prompts with equally many pictures."""
    right = 0
    for picture, own in zip(found.pictures, found.own, strict=True):
        nearest = sorted(range(len(found.texts)), key=lambda t: -float(picture.astype(float) @ found.texts[t]))
        right += own in nearest[:k]
    pools = len(found) // len(found.texts)
    found_by_text = 0
    for i in range(pools):
        pool = [[row for row in range(len(found)) if found.own[row] == text][i] for text in range(len(found.texts))]
        for text, vector in enumerate(found.texts):
            nearest = sorted(pool, key=lambda row: -float(vector.astype(float) @ found.pictures[row]))
            found_by_text += pool[text] in nearest[:k]
    return right / len(found), found_by_text / (pools * len(found.texts))


@pytest.mark.parametrize("pools", [1, 3])
def test_recall_equals_a_loop(pools: int) -> None:
    rng = np.random.default_rng(3)
    words = [f"prompt {i}" for i in rng.permutation(np.repeat(np.arange(12), pools))]
    texts = unit(rng.normal(size=(12, 5)))
    order = {text: row for row, text in enumerate(dict.fromkeys(words))}
    pictures = unit(texts[[order[text] for text in words]] + rng.normal(0, 0.6, (12 * pools, 5)))
    found = Embedded.of(pictures, words, texts)
    for column, k in enumerate((1, 5, 10)):
        by_image, by_text = brute_force(found, k)
        assert image_to_text(found, (1, 5, 10))[:, column].mean() == pytest.approx(by_image)
        assert text_to_image(found, (1, 5, 10))[:, column].mean() == pytest.approx(by_text)
        assert 0.1 < by_image <= 1


def test_recall_of_vectors_whose_ranks_are_known() -> None:
    """Picture i lies at angle i, text i at angle i + 2.2: its own text is the fifth nearest, on a circle of 12."""

    def circle(shift: float) -> np.ndarray:
        angle = 2 * np.pi * (np.arange(12) + shift) / 12
        return unit(np.stack([np.cos(angle), np.sin(angle)], axis=1))

    found = Embedded.of(circle(0), [str(i) for i in range(12)], circle(2.2))
    np.testing.assert_array_equal(image_to_text(found, (1, 4, 5, 10)), [[0, 0, 1, 1]] * 12)
    np.testing.assert_array_equal(text_to_image(found, (1, 4, 5, 10)), [[0, 0, 1, 1]] * 12)


@pytest.mark.parametrize("jitter", [0.0, 1e-8])
def test_a_constant_embedding_gets_chance_exactly(jitter: float) -> None:
    rng = np.random.default_rng(0)
    words = [f"prompt {i % 20}" for i in range(60)]
    pictures, texts = (unit(np.ones((n, 7)) + rng.normal(0, jitter, (n, 7))) for n in (60, 20))
    found = Embedded.of(pictures, words, texts)
    expected = np.array([1, 5, 10]) / 20
    np.testing.assert_allclose(image_to_text(found, (1, 5, 10)), np.tile(expected, (60, 1)))
    np.testing.assert_allclose(text_to_image(found, (1, 5, 10)), np.tile(expected, (60, 1)))


def test_texts_that_embed_alike_share_their_places() -> None:
    found = Embedded.of(np.eye(3, dtype=np.float32), ["a", "b", "c"], np.eye(3, dtype=np.float32)[[0, 0, 2]])
    np.testing.assert_allclose(image_to_text(found, (1, 2))[0], [0.5, 1])
    np.testing.assert_allclose(image_to_text(found, (1, 2))[1], [1 / 3, 2 / 3])  # all three texts are as far away


def test_prompts_with_unequally_many_pictures_all_stand_in_each_pool() -> None:
    rng = np.random.default_rng(1)
    words = ["a"] * 5 + ["b"]
    found = Embedded.of(unit(rng.normal(size=(6, 4))), words, unit(rng.normal(size=(2, 4))))
    expected = [
        [found.texts[0] @ found.pictures[i] > found.texts[0] @ found.pictures[5] for i in range(3)],
        [found.texts[1] @ found.pictures[5] > found.texts[1] @ found.pictures[i] for i in range(3)],
    ]
    np.testing.assert_array_equal(text_to_image(found, (1,))[:, 0], np.array(expected).T.ravel())


def test_real_pictures_are_ranked_among_as_many_captions_the_prompts_first() -> None:
    rng = np.random.default_rng(1)
    words = [f"caption {i % 6}" for i in range(30)]
    real = Embedded.of(unit(rng.normal(size=(30, 4))), words, unit(rng.normal(size=(6, 4))))
    found = as_many_texts(real, ["caption 4", "something else", "caption 2"])
    assert set(found.words) == {"caption 4", "caption 2", "caption 0"}
    assert len(found) == 15
    for text, row in zip(found.words, found.texts, strict=True):
        np.testing.assert_array_equal(row, real.texts[real.words.index(text)])
    assert as_many_texts(real, [*words, "more"]).words == real.words


def test_figures_of_retrieval_carry_their_marks(pair: str) -> None:
    images, prompts = coloured(80, seed=9)
    measured = Retrieval.prepare(setting_of(pair)).measure(Pictures(images, prompts, seed=4))
    names = [figure.name for figure in measured.figures]
    assert names == [f"{way} recall at {k}" for way in ("image to text", "text to image") for k in (1, 5)]
    assert any("recall at 10 is left out: there are 8 different prompts" in note for note in measured.notes)
    assert any("fitted to each other on the public pictures of colours, fit" in note for note in measured.notes)
    for figure in measured.figures:
        assert figure.better == "higher"
        assert figure.chance == int(figure.name.split()[-1]) / 8
        assert (figure.n, figure.reference, figure.reference_n, figure.floor_n) == (80, "colours, floor", 64, 64)
        assert figure.floor is not None
        assert figure.chance < figure.floor <= 1
        assert figure.interval.low <= figure.value <= figure.interval.high
        assert figure.extractor is not None
        assert figure.extractor.startswith("vit+bert ")
        assert figure.extractor.endswith("fitted on colours, fit")
        assert figure.seeds == {"pictures": [4], "resampling": [0]}


def test_a_floor_with_fewer_captions_says_so(pair: str) -> None:
    images, prompts = coloured(12, seed=9)
    few = dataclasses.replace(public(), floor=part("floor", *(a[:3] for a in coloured(8, seed=3))))
    measured = Retrieval.prepare(setting_of(pair, public=few)).measure(Pictures(images, prompts))
    at_1, at_5 = measured.figures[:2]
    assert at_1.floor is not None
    assert at_5.floor is None
    assert any("among 3 captions, all that there are, and generated ones among 8 prompts" in n for n in measured.notes)


def test_one_prompt_cannot_be_retrieved(pair: str) -> None:
    with pytest.raises(DataError, match="all pictures have one prompt"):
        Retrieval.prepare(setting_of(pair)).measure(Pictures(coloured(4, seed=1)[0], ["a square"] * 4))


# ---- two models ----------------------------------------------------------------------------------------------


def test_two_models_that_never_met_retrieve_what_they_were_not_fitted_on(pair: str) -> None:
    images, prompts = coloured(400, seed=11)
    setting = setting_of(pair)
    right = embedded(setting, Pictures(images, prompts))
    assert image_to_text(right, (1,)).mean() > 0.95  # chance is 1 / 8
    assert text_to_image(right, (1,)).mean() > 0.95
    assert clip_scores(right).mean() > 50

    # A random permutation of the prompts among the N pictures: the number of hits has mean N / 8, whatever the model
    # says, and (Hoeffding 1951) at most the variance of N independent draws, times N / (N - 1). So z is N(0, 1) at the
    # most spread, |z| > 5 has a chance below 6e-7, and recall stays within 0.125 +- 0.083.
    shuffled = [prompts[row] for row in np.random.default_rng(6).permutation(400)]
    hits = image_to_text(embedded(setting, Pictures(images, shuffled)), (1,)).sum()
    z = (hits - 400 / 8) / math.sqrt(400 / 399 * 400 * 1 / 8 * 7 / 8)
    assert abs(z) < 5


@pytest.mark.parametrize("vision", ["resnet", "clip"])
def test_any_model_of_pictures_can_be_one_of_the_two(folders: Callable[[str], Path], vision: str) -> None:
    setting = setting_of(f"{folders(vision)}+{folders('bert')}")
    right = embedded(setting, Pictures(*coloured(64, seed=12)))
    assert image_to_text(right, (1,)).mean() > 0.8
    assert dual_encoder(setting).name.startswith(f"{vision}+bert ")


def test_maps_depend_on_the_part_fit_alone(pair: str) -> None:
    encoder = dual_encoder(setting_of(pair))
    others = {name: part(name, *coloured(24, seed=99)) for name in ("reference", "floor", "test")}
    again = dual_encoder(setting_of(pair, public=dataclasses.replace(public(), **others), seed=5))
    assert again.fingerprint == encoder.fingerprint
    assert again.name == encoder.name
    assert encoder.maps is not None
    assert again.maps is not None
    np.testing.assert_array_equal(again.maps.picture_map, encoder.maps.picture_map)
    np.testing.assert_array_equal(again.maps.text_map, encoder.maps.text_map)
    other = dual_encoder(setting_of(pair, public=public(fit=110)))
    assert other.fingerprint != encoder.fingerprint


def test_correlations_of_the_maps_are_those_of_canonical_correlation_analysis() -> None:
    """Oracle: canonical correlations are cosines of the angles between column spaces (scipy.linalg.subspace_angles)."""
    from scipy.linalg import subspace_angles

    rng = np.random.default_rng(4)
    shared = rng.normal(size=(4000, 2))
    pictures = np.concatenate([shared + rng.normal(0, 0.3, (4000, 2)), rng.normal(size=(4000, 3))], axis=1)
    texts = np.concatenate([shared, rng.normal(size=(4000, 2))], axis=1)
    pictures, texts = pictures @ rng.normal(size=(5, 5)), texts @ rng.normal(size=(4, 4))
    maps = fit_maps(pictures, texts, [[row] for row in range(4000)])
    x, y = maps.pictures(pictures), maps.texts(texts)
    found = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(2)]
    angles = subspace_angles(pictures - pictures.mean(axis=0), texts - texts.mean(axis=0))
    np.testing.assert_allclose(sorted(found), np.cos(np.sort(angles)[:2])[::-1], atol=5e-3)
    assert x[:, 2:].std(axis=0).max() < 0.1 * x[:, :2].std(axis=0).min()  # what is not shared hardly counts


def test_several_captions_of_a_picture_share_its_weight() -> None:
    rng = np.random.default_rng(2)
    pictures, texts = rng.normal(size=(50, 4)), rng.normal(size=(50, 3))
    once = fit_maps(pictures, texts, [[row] for row in range(50)])
    twice = fit_maps(pictures, texts, [[row, row] if row % 3 else [row] for row in range(50)])
    np.testing.assert_allclose(abs(twice.pictures(pictures)), abs(once.pictures(pictures)), rtol=1e-6, atol=1e-9)


def test_captions_that_are_all_alike_cannot_be_fitted(pair: str) -> None:
    alike = part("fit", coloured(24, seed=1)[0], ["a square"] * 24)
    with pytest.raises(DataError, match=r"cannot be fitted to each other on colours, fit: all captions look alike"):
        dual_encoder(setting_of(pair, public=dataclasses.replace(public(), fit=alike)))


# ---- encoders ------------------------------------------------------------------------------------------------


def test_pictures_are_embedded_once_for_both_metrics_and_public_ones_once_for_ever(
    folders: Callable[[str], Path], pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.metrics import dual_encoder as module

    counts: list[int] = []
    real = module._pixels

    def counted(processor: Any, images: np.ndarray) -> Any:
        counts.append(len(images))
        return real(processor, images)

    monkeypatch.setattr(module, "_pixels", counted)
    images, prompts = coloured(40, seed=7)
    figures = []
    for _ in range(2):
        counts.clear()
        setting = setting_of(pair, cache_dir=tmp_path)
        figures.append([METRICS.get(name).prepare(setting).measure(Pictures(images, prompts)).figures
                        for name in ("clip-score", "retrieval")])  # fmt: skip
    assert sum(counts) == 2 + 40  # the trial of the model, and the generated ones: fit and floor are kept
    assert figures[0] == figures[1]
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    counts.clear()
    again = ClipScore.prepare(setting_of(pair, cache_dir=tmp_path)).measure(Pictures(images, prompts)).figures
    assert sum(counts) == 2 + 120 + 64 + 40
    assert again == figures[0][0]


def test_grey_pictures_are_the_same_as_their_repeated_channel(folders: Callable[[str], Path]) -> None:
    encoder, grey = build(setting_of(folders("clip"))), coloured(5, seed=3)[0][..., :1]
    setting = setting_of(folders("clip"))
    rows = encoder.pictures(grey, setting=setting)
    np.testing.assert_array_equal(rows, encoder.pictures(np.repeat(grey, 3, axis=-1), setting=setting))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


def test_long_work_says_how_long_it_will_take(folders: Callable[[str], Path]) -> None:
    told: list[Any] = []
    setting = setting_of(folders("clip"), progress=told.append, step=lambda done, total: told.append((done, total)))
    ClipScore.prepare(setting)
    name = dual_encoder(setting).name
    assert told[0] == f"loading {folders('clip')}"
    assert told[1:] == [f"embedding 64 pictures with {name}: about 0 s", (32, 64), (64, 64)]


def test_the_fingerprint_follows_the_content_not_the_place(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("clip"), tmp_path / "copy+of it")  # a plus sign in a folder's name makes no pair
    first, copy = (build(setting_of(path)) for path in (folders("clip"), tmp_path / "copy+of it"))
    assert first.fingerprint == copy.fingerprint
    assert first.name == f"clip {first.fingerprint[:8]}"

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["visual_projection.weight"][0, 0] += 1e-3

    other = build(setting_of(altered(folders("clip"), tmp_path / "other", nudge)))
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("half", ["vit", "bert"])
def test_the_fingerprint_of_two_models_follows_both(
    folders: Callable[[str], Path], pair: str, tmp_path: Path, half: str
) -> None:
    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights[next(name for name in sorted(weights) if "query.weight" in name)][0, 0] += 1e-3

    changed = altered(folders(half), tmp_path / half, nudge)
    halves = {"vit": folders("vit"), "bert": folders("bert"), half: changed}
    assert build(setting_of(f"{halves['vit']}+{halves['bert']}")).fingerprint != build(setting_of(pair)).fingerprint


# ---- refusals ------------------------------------------------------------------------------------------------


def refused(model: Path | str, match: str, hint: str) -> None:
    for metric in (ClipScore, Retrieval):
        with pytest.raises(DataError, match=match) as failure:
            metric.prepare(setting_of(model))
        assert hint in str(failure.value.hint)


def test_no_model_and_no_folder_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    refused("", "no CLIP model was named: --clip PATH or id", "VIT")
    refused("/no/such", "no folder /no/such", "config.json")
    refused(tmp_path, f"there is no model in the folder {tmp_path}", "save_pretrained")
    refused("some/model", "some/model is not on this machine, and huggingface.co cannot be reached", "hf download some")
    refused(f"{folders('vit')}+some/text", "no transformers text model at some/text", "model of texts last")
    refused(f"some/vision+{folders('bert')}", "the model some/vision is not on this machine", "hf download some/vision")
    refused("one+", r"'one\+' names one model and a plus sign", "VIT+TEXT")
    refused("+one", r"'\+one' names one model and a plus sign", "VIT+TEXT")


def test_models_of_the_wrong_kind_are_refused(folders: Callable[[str], Path]) -> None:
    refused(folders("vit"), "the vit model at .* embeds no texts", "VIT+TEXT")
    refused(folders("bert"), "the bert model at .* embeds no pictures", "VIT+TEXT")
    refused(f"{folders('bert')}+{folders('vit')}", "the bert model at .* reads no pictures", "pictures first")
    refused(f"{folders('vit')}+{folders('vit')}", "no transformers text model", "model of texts last")


def test_incomplete_folders_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        del weights["text_projection.weight"]

    refused(altered(folders("clip"), tmp_path / "cut", cut), "lacks weights, text_projection.weight", "save_pretrained")
    for name, match, hint in [
        ("preprocessor_config.json", "does not say how pictures are prepared", "preprocessor_config.json"),
        ("tokenizer.json", "tokenizer", "save model and tokenizer into one folder"),
        ("model.safetensors", "no transformers model at", "safetensors"),
    ]:
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(folders("clip"), copy)
        (copy / name).unlink()
        if name == "model.safetensors":
            torch.save(tiny("clip").state_dict(), copy / "pytorch_model.bin")  # pickled: never read
        refused(copy, match, hint)


def test_weights_and_vectors_that_are_no_numbers_are_refused(
    folders: Callable[[str], Path], pair: str, tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["visual_projection.weight"][0, 0] = math.nan

    spoilt = altered(folders("clip"), tmp_path / "spoilt", spoil)
    refused(spoilt, "weights that are not finite, visual_projection.weight among them", "damaged")

    def overflow(weights: dict[str, torch.Tensor]) -> None:
        weights["visual_projection.weight"][:] = 3e38

    refused(altered(folders("clip"), tmp_path / "huge", overflow), "embeds as numbers that are not finite", "damaged")


class Sometimes:
    """Embeds black pictures and the text "black" as what is no number."""

    kind = fingerprint = "sometimes"

    def __init__(self) -> None:
        self.read: list[str] = []

    def pictures(self, images: np.ndarray) -> np.ndarray:
        return np.where(images.reshape(len(images), -1)[:, :3].any(axis=1, keepdims=True), 1.0, math.nan)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.read += texts
        return np.array([[math.inf if text == "black" else 1.0] * 3 for text in texts])


def test_one_vector_that_is_no_number_is_refused() -> None:
    encoder, images = DualEncoder(Sometimes(), "sometimes 0", "0"), coloured(40, seed=1)[0]
    setting = setting_of("")
    encoder.pictures(images, setting=setting)
    images[33] = 0
    with pytest.raises(DataError, match="sometimes 0 embeds pictures as numbers that are not finite"):
        encoder.pictures(images, setting=setting)
    with pytest.raises(DataError, match="sometimes 0 embeds texts as numbers that are not finite"):
        encoder.texts(["white", "black"], setting=setting)


def test_a_text_is_embedded_once() -> None:
    towers, setting = Sometimes(), setting_of("")
    encoder = DualEncoder(towers, "sometimes 0", "0")
    assert encoder.texts(["a", "b", "a"], setting=setting).shape == (3, 3)
    encoder.texts(["c", "b"], setting=setting)
    assert towers.read == ["a", "b", "c"]


def test_code_in_a_model_folder_never_runs(folders: Callable[[str], Path], tmp_path: Path) -> None:
    import json

    copy = tmp_path / "copy"
    shutil.copytree(folders("clip"), copy)
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((copy / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    settings["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(settings))
    refused(copy, "no transformers model at", "save_pretrained")
    assert not (tmp_path / "ran").exists()


def test_a_library_that_does_not_fit_is_told_from_a_missing_model(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def broken(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("Could not import module 'CLIPModel'")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", broken)
    refused(folders("clip"), "transformers cannot load the model", "torchvision")
