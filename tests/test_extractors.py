"""Extractors: Inception from a file that may be anything, image sides of transformers models, and their names."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured_sets import setting_of

from shared.errors import DataError, UsageError
from shared.metrics import Setting, extractor, inception
from shared.metrics.extractor import EXTRACTORS, Features, in_batches, named
from shared.metrics.pretrained import hub_answers, load_pretrained
from shared.metrics.vision_model import build as build_vision
from shared.registry import Registry
from shared.torchvision_operators import ensure_importable

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                        "vocab_size": 20}  # fmt: skip


def pictures(count: int = 5, *, channels: int = 3, side: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def a_setting(**given: Any) -> Setting:
    rows = np.zeros((4, 2))
    made, _ = setting_of(generated=rows, reference=rows, floor=rows)
    return Setting(public=made.public, build_extractor=made.build_extractor, **given)


def silent(done: int, total: int) -> None:
    pass


# ---- torchvision beside torch for CPU ------------------------------------------------------------------------


def python(code: str) -> str:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_torchvision_and_torch_fidelity_can_be_imported_after_the_operators_were_declared() -> None:
    made = "from shared.torchvision_operators import ensure_importable as e; e(); e();"
    assert python(f"{made} import torchvision, torch_fidelity; e(); print(torch_fidelity.__version__)").strip()


@pytest.mark.slow
def test_operators_that_are_there_are_left_alone() -> None:
    """As with torch for CUDA, where the compiled ones are loaded: declaring them again would raise."""
    code = (
        "import torch; lib = torch.library.Library('torchvision', 'DEF');"
        "[lib.define(f'{n}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor') for n in ('nms', 'qnms')];"
        "lib.impl('nms', lambda dets, scores, iou_threshold: dets + 1, 'CPU');"
        "from shared import torchvision_operators as t; t.ensure_importable(); import torchvision;"
        "print(len(t._declared), float(torch.ops.torchvision.nms(torch.zeros(1), torch.zeros(1), 0.5)))"
    )
    assert python(code).split() == ["0", "1.0"]


# ---- what --extractor means ----------------------------------------------------------------------------------


def test_a_name_a_file_a_folder_and_a_name_with_a_path_each_mean_an_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {name: f"{__name__}:{name}" for name in ("inception", "clip", "local")}
    monkeypatch.setattr(extractor, "EXTRACTORS", Registry[Any]("extractor", entries))
    for name in entries:
        monkeypatch.setattr(sys.modules[__name__], name, name, raising=name == "inception")
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    known: dict[str, tuple[str, str]] = {
        "inception": ("inception", ""),
        "clip": ("clip", ""),
        "local": ("local", ""),
        str(file): ("inception", str(file)),
        str(tmp_path): ("clip", str(tmp_path)),
        f"inception:{file}": ("inception", str(file)),
        "clip:openai/clip-vit-base-patch32": ("clip", "openai/clip-vit-base-patch32"),
    }
    for text, meant in known.items():
        assert named(text) == meant
    monkeypatch.chdir(tmp_path)
    Path("clip").write_bytes(b"")
    assert named("clip") == ("clip", "")  # the name comes first
    assert named("./clip") == ("inception", "./clip")


@pytest.mark.parametrize("text", ["incepton", "incepton:file", "/no/such/file", "openai/clip", "", "clip:"])
def test_what_is_no_extractor_is_answered_with_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match="unknown extractor") as error:
        named(text)
    assert "known: clip, inception, local" in str(error.value.hint)
    if text.startswith("incepton"):
        assert "did you mean 'inception'?" in str(error.value.hint)


def test_every_entry_but_that_of_others_can_be_had() -> None:
    assert EXTRACTORS.names() == ["clip", "inception", "local"]
    assert EXTRACTORS.get("inception") is inception.build
    assert EXTRACTORS.get("clip") is build_vision


# ---- batches -------------------------------------------------------------------------------------------------


def test_batches_are_joined_in_order_and_counted_and_long_work_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
    steps: list[tuple[int, int]] = []
    lines: list[str] = []

    def network(batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(batch.reshape(-1, 1)).float()
        return rows, -rows

    def made() -> Features:
        return in_batches(images, network, size=3, what="features", progress=lines.append,
                          step=lambda done, total: steps.append((done, total)))  # fmt: skip

    found = made()
    assert found.logits is not None
    assert list(found.pooled[:, 0]) == list(-found.logits[:, 0]) == list(range(7))
    assert found.pooled.dtype == np.float32
    assert steps == [(3, 7), (6, 7), (7, 7)]
    assert not lines
    monkeypatch.setattr(extractor, "LONG", 0.0)
    made()
    assert lines == ["features of 7 pictures: about 0 s on this machine"]
    assert extractor.in_words(840) == "14 min"


# ---- Inception -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    ensure_importable()
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = inception._network_without_weights().state_dict()
    return state


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def refused(path: Path, match: str) -> DataError:
    with pytest.raises(DataError, match=match) as error:
        inception.build(a_setting(), str(path))
    assert str(path) in error.value.message
    assert "--extractor" in str(error.value.hint)
    return error.value


def test_inception_gives_2048_features_and_logits_and_grey_is_repeated(
    weights: dict[str, torch.Tensor], weights_file: Path
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    made = inception.build(a_setting(), str(weights_file))
    assert not made.published
    assert made.name == f"inception {made.fingerprint[:8]}"
    grey = pictures(2, channels=1)
    found = made.features(grey, step=silent)
    assert found.logits is not None
    assert (found.pooled.shape, found.logits.shape) == ((2, 2048), (2, 1008))
    own = FeatureExtractorInceptionV3("oracle", ["2048", "logits_unbiased"], str(weights_file))
    pooled, logits = own(torch.from_numpy(grey.repeat(3, axis=3)).permute(0, 3, 1, 2))
    assert np.allclose(found.pooled, pooled, rtol=1e-4, atol=1e-6)
    assert np.allclose(found.logits, logits, rtol=1e-4, atol=1e-6)
    assert np.isfinite(found.pooled).all()


def test_building_inception_draws_nothing_from_the_callers_generator(weights_file: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    inception.build(a_setting(), str(weights_file))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_the_fingerprint_is_of_the_weights_and_not_of_their_file(
    weights: dict[str, torch.Tensor], weights_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "weights.safetensors")
    older = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
    torch.save(older, tmp_path / "older.pt")
    of_file = inception.build(a_setting(), str(weights_file)).fingerprint
    for name in ("weights.safetensors", "older.pt"):
        assert inception.build(a_setting(), str(tmp_path / name)).fingerprint == of_file
    torch.save({**weights, "fc.bias": weights["fc.bias"] + 1e-3}, tmp_path / "other.pth")
    assert inception.build(a_setting(), str(tmp_path / "other.pth")).fingerprint != of_file


class Code:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_of_weights_never_runs(how: str, tmp_path: Path) -> None:
    file, ran = tmp_path / "weights.pth", tmp_path / "ran"
    content = {"fc.bias": torch.zeros(1008), "more": Code(ran)}
    if how == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    error = refused(file, "holds no tensors")
    assert "nothing in it was run" in str(error.hint)
    assert not ran.exists()
    # The same file runs it where it is believed, so that this test can fail.
    torch.load(file, weights_only=False) if how == "torch" else pickle.loads(file.read_bytes())
    assert ran.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"once upon a time\n", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_file_that_holds_no_weights_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    refused(file, "holds no tensors|is none: it has no")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: {"fc.bias": torch.zeros(1008)}, r"is none: it has no Conv2d_1a_3x3\.bn\.bias"),
        (lambda state: {**state, "head.weight": torch.zeros(1)}, r"is none: it has, beside Inception's, head\.weight"),
        (lambda state: {**state, "fc.bias": torch.zeros(1000)}, r"fc\.bias is of shape \(1000,\), where .* \(1008,\)"),
        (lambda state: {**state, "fc.bias": torch.full((1008,), torch.inf)}, r"is damaged: fc\.bias has values"),
        (lambda state: {**state, "fc.bias": torch.zeros(1008) * 1j}, r"fc\.bias holds no plain numbers"),
        (lambda state: {**state, "fc.bias": torch.zeros(1008).to_sparse()}, r"fc\.bias holds no plain numbers"),
    ],
)  # fmt: skip
def test_weights_of_something_else_or_damaged_ones_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], match: str, weights: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(DataError, match=f"extractor file a/file .*{match}"):
        inception._checked(change(weights), weights, Path("a/file"))


@pytest.mark.parametrize("content", [{"state_dict": {"fc.bias": torch.zeros(3)}}, [torch.zeros(3)], torch.zeros(3)])
def test_tensors_without_names_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "is no table of tensors by name")


def test_weights_that_are_no_numbers_are_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({**weights, "fc.bias": torch.full((1008,), torch.nan)}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", r"is damaged: fc\.bias has values that are not finite")


@pytest.mark.slow
def test_only_the_file_with_the_published_digest_is_published(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    monkeypatch.setattr(inception, "PUBLISHED", hashlib.sha256(weights_file.read_bytes()).hexdigest()[:8])
    assert inception.build(a_setting(), str(weights_file)).published
    # And the one in PyTorch's cache is found without any network.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / inception.FILE
    cached.parent.mkdir(parents=True)
    shutil.copy(weights_file, cached)
    assert inception.build(a_setting(), "").published
    monkeypatch.setattr(inception, "PUBLISHED", "00000000")
    with pytest.raises(DataError, match="is not the published file: its SHA-256 begins with"):
        inception.build(a_setting(), "")


def test_the_digest_is_that_of_torch_fidelitys_own_link() -> None:
    ensure_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3.endswith(f"/{inception.FILE}")
    assert inception.FILE.endswith(f"-{inception.PUBLISHED}.pth")


def test_without_network_the_next_step_is_a_file_or_the_local_extractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def no_network(url: str, dst: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    lines: list[str] = []
    with pytest.raises(DataError, match="cannot be had: Name or service not known") as error:
        inception.build(a_setting(progress=lines.append), "")
    assert "--extractor PATH" in str(error.value.hint)
    assert "--extractor local" in str(error.value.hint)
    assert asked[0][1] == "6726825d"
    assert asked[0][0] in lines[0]


# ---- transformers --------------------------------------------------------------------------------------------


def save_model(kind: str, folder: Path, *, processor: bool = True) -> Path:
    """A tiny model with random weights, as `save_pretrained` leaves it."""
    ensure_importable()
    import transformers as t

    torch.manual_seed(1)
    vision: dict[str, Any] = SIZES
    models: dict[str, Callable[[], Any]] = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=6)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=vision)),
        "dual": lambda: t.VisionTextDualEncoderModel(
            vision_model=t.ViTModel(t.ViTConfig(**vision)), text_model=t.BertModel(t.BertConfig(**TEXT)),
            config=t.VisionTextDualEncoderConfig.from_vision_text_configs(
                t.ViTConfig(**vision), t.BertConfig(**TEXT), projection_dim=6),
        ),
        "vit": lambda: t.ViTModel(t.ViTConfig(**vision)),
        "classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**vision, num_labels=3)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**vision)),
        "text": lambda: t.BertModel(t.BertConfig(**TEXT)),
    }  # fmt: skip
    models[kind]().eval().save_pretrained(folder)
    if processor:
        t.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


KINDS = ("clip", "siglip", "dual", "vit", "classifier", "dinov2")


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_model_itself_gives(kind: str, tmp_path: Path) -> None:
    folder = save_model(kind, tmp_path)
    import transformers as t

    made = build_vision(a_setting(), str(folder))
    images = pictures()
    found = made.features(images, step=silent)

    pixels = t.ViTImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]
    own = (t.ViTForImageClassification if kind == "classifier" else t.AutoModel).from_pretrained(folder).eval()
    with torch.no_grad():
        if kind in ("clip", "siglip", "dual"):
            expected = own.get_image_features(pixel_values=pixels).pooler_output
        elif kind == "classifier":
            expected = own.vit(pixel_values=pixels).last_hidden_state[:, 0]
            assert found.logits is not None
            assert np.allclose(found.logits, own(pixel_values=pixels).logits, atol=1e-5)
        else:
            expected = own(pixel_values=pixels).pooler_output
    assert np.allclose(found.pooled, expected, atol=1e-5)
    assert (found.logits is None) == (kind != "classifier")
    assert found.pooled.shape == (5, 6 if kind in ("clip", "dual") else 16)
    assert made.name == f"clip {made.fingerprint[:8]}"
    assert not made.published
    assert np.std(found.pooled, axis=0).max() > 1e-4  # pictures differ


def test_grey_pictures_are_repeated_and_small_ones_with_three_rows_are_not_taken_for_channels(tmp_path: Path) -> None:
    made = build_vision(a_setting(), str(save_model("vit", tmp_path)))
    grey = pictures(channels=1, side=3)
    colour = made.features(grey.repeat(3, axis=3), step=silent)
    assert np.array_equal(made.features(grey, step=silent).pooled, colour.pooled)


def test_without_settings_for_pictures_they_are_resized_plainly_and_that_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = save_model("clip", tmp_path, processor=False)
    made = build_vision(a_setting(progress=lines.append), str(folder))
    assert lines == [f"{folder} says nothing about its pictures: resized to 8 x 8 px, mean and deviation 0.5"]
    model = load_pretrained(str(folder), "AutoModel")
    images = pictures(side=8)  # of the model's size already
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert np.allclose(made.features(images, step=silent).pooled, expected, atol=1e-5)
    assert made.features(pictures(side=12), step=silent).pooled.shape == (5, 6)


def test_the_fingerprint_changes_with_weights_and_with_what_happens_to_pictures_and_not_with_the_folder(
    tmp_path: Path,
) -> None:
    first = save_model("vit", tmp_path / "first")
    copy = shutil.copytree(first, tmp_path / "copy")
    fingerprints = {build_vision(a_setting(), str(folder)).fingerprint for folder in (first, copy)}
    assert len(fingerprints) == 1
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.1, 0.1]}))
    fingerprints.add(build_vision(a_setting(), str(copy)).fingerprint)
    from safetensors.torch import load_file, save_file

    state = load_file(first / "model.safetensors")
    state["layernorm.bias"] += 0.1
    save_file(state, first / "model.safetensors", metadata={"format": "pt"})
    fingerprints.add(build_vision(a_setting(), str(first)).fingerprint)
    assert len(fingerprints) == 3


def test_a_missing_pooler_gives_the_class_token_and_other_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    made = [build_vision(a_setting(), str(folder)) for _ in range(2)]
    assert made[0].fingerprint == made[1].fingerprint  # the pooler is drawn anew each time
    first, second = (of.features(pictures(), step=silent).pooled for of in made)
    assert np.array_equal(first, second)
    del without["layernorm.weight"]
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks weights, layernorm\.weight among them"):
        build_vision(a_setting(), str(folder))


def test_a_folder_without_model_and_a_model_of_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, match in (("/no/such/folder", "no folder /no/such/folder"),
                        (str(tmp_path / "empty"), "no model of transformers at .*empty"),
                        (str(save_model("text", tmp_path / "text")), "reads no images")):  # fmt: skip
        with pytest.raises(DataError, match=match) as error:
            build_vision(a_setting(), path)
        assert error.value.hint
    broken = save_model("vit", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match="no model of transformers"):
        build_vision(a_setting(), str(broken))


def test_a_processor_that_does_not_fit_the_model_is_refused_with_the_size(tmp_path: Path) -> None:
    folder = save_model("vit", tmp_path)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    made = build_vision(a_setting(), str(folder))
    with pytest.raises(DataError, match="cannot read pictures of 12 x 12 px"):
        made.features(pictures(), step=silent)


def test_code_in_a_model_folder_never_runs(tmp_path: Path) -> None:
    folder, ran = save_model("vit", tmp_path / "model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"layernorm.bias": Code(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="no model of transformers"):
        build_vision(a_setting(), str(folder))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    settings = json.loads((folder / "config.json").read_text())
    settings.update(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, model_type="evil")
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError):
        build_vision(a_setting(), str(folder))
    assert not ran.exists()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Session:
        asked = 0

        def head(self, url: str, timeout: float) -> None:
            Session.asked += 1
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    hub_answers.cache_clear()
    try:
        for kind in ("AutoConfig", "AutoModel"):
            with pytest.raises(DataError, match="no model of transformers at some/model: OSError"):
                load_pretrained("some/model", kind)
    finally:
        hub_answers.cache_clear()
    assert Session.asked == 1


def test_a_model_is_named_by_path_else_by_the_settings_dual_encoder_else_it_is_clip(tmp_path: Path) -> None:
    folder = str(save_model("clip", tmp_path))
    assert build_vision(a_setting(dual_encoder=folder), "").path == folder
    assert build_vision(a_setting(dual_encoder="/no/such"), folder).path == folder
    with pytest.raises(DataError, match="at openai/clip-vit-base-patch32: OSError") as error:  # tests run offline
        build_vision(a_setting(), "")
    assert "without network name a folder" in str(error.value.hint)
