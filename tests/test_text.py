"""Text encoders: frozen, one row for one text, stable; pretrained ones equal to calling transformers directly."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import string
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.config import TextConfig
from shared.errors import ConfigError, DataError
from shared.text import CaptionEncoder, HashingEncoder, build_encoder, cached_encode, split_words
from shared.torchvision_operators import ensure_importable
from simulations.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES

ensure_importable()  # this file alone, with a torchvision for CUDA beside a torch for the CPU


def cosine(encoder: CaptionEncoder, first: str, second: str) -> float:
    rows = encoder.encode([first, second]).double()
    return float(rows[0] @ rows[1])


FROZEN = {
    "a large red circle on a white background": [
        *(-8192, -24577, 0, 0, -12288, -53250, 4096, -12288),
        *(-53250, 24577, -32769, 4096, 20481, 0, 12288, 32769),
    ],
    "红色圆形": [7692, 7692, 0, 38462, 0, 61538, 15385, -7692, 23077, 38462, 15385, -23077, 0, -38462, 7692, 0],
    "Ein großer roter Kreis": [
        *(-16039, -16039, -28067, -4010, 16039, 36087, -48116, -8019),
        *(-28067, -36087, -4010, 4010, -28067, 16039, -28067, -28067),
    ],
    "دائرة حمراء": [
        *(19094, 19094, 35460, 8183, -19094, -35460, 8183, 8183),
        *(-19094, 19094, -35460, -8183, -35460, -19094, 35460, 35460),
    ],
}
FROZEN_FINGERPRINT = "ca1ee79475d3aaa81d2f7a11867e1e6e9c20b3a731e724365bbcefd749afb382"


# ---- hashing -------------------------------------------------------------------------------------------------


def test_a_row_is_the_sum_of_hashed_words_and_pairs() -> None:
    def signs(token: str) -> np.ndarray:
        bits = "".join(f"{byte:08b}" for byte in hashlib.shake_256(token.encode()).digest(2))
        return np.array([1 if bit == "1" else -1 for bit in bits])

    expected = 5 * (signs("red") + signs("ball") + signs("rolls"))
    expected = expected + 3 * (signs("red ball") + signs("red rolls") + signs("ball rolls"))
    row = HashingEncoder(16).encode(["The RED ball rolls."])[0].numpy()
    np.testing.assert_allclose(row, expected / np.linalg.norm(expected), rtol=1e-6)


def test_rows_of_released_models_never_change() -> None:
    """These numbers stand in models that people keep; they are written down, not computed."""
    encoder = HashingEncoder(16)
    for text, row in FROZEN.items():
        np.testing.assert_allclose(encoder.encode([text])[0].numpy() * 1e5, row, atol=0.51)
    assert HashingEncoder(64).fingerprint == FROZEN_FINGERPRINT


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a large red circle on a white background", "a large blue circle on a white background"),
        ("a large red circle on a white background", "a large red circle on a black background"),
        ("a photo of a T-shirt/top", "a photo of a shirt"),
        ("白色背景上的一个大红色圆形", "白色背景上的一个大绿色圆形"),
        ("دائرة حمراء كبيرة على خلفية بيضاء", "دائرة زرقاء كبيرة على خلفية بيضاء"),
        ("ein großer roter Kreis auf weißem Grund", "ein großer blauer Kreis auf weißem Grund"),
        ("白い背景の赤い大きな丸", "白い背景の青い大きな丸"),
        ("วงกลมสีแดงขนาดใหญ่", "วงกลมสีเขียวขนาดใหญ่"),
        ("red circle, blue square", "blue circle, red square"),
        ("🔴 vendor", "🟢 vendor"),
    ],
)
@pytest.mark.parametrize("dim", [64, 256])
def test_captions_that_differ_in_one_word_lie_clearly_apart(first: str, second: str, dim: int) -> None:
    assert cosine(HashingEncoder(dim), first, second) < 0.89


def test_every_two_prompts_of_the_shapes_grammar_lie_apart() -> None:
    prompts = [
        f"a {size} {colour} {shape} on a {background} background"
        for size, colour, shape, background in itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS)
    ]
    rows = HashingEncoder(64).encode(prompts)
    cosines = (rows @ rows.T)[np.triu_indices(96, 1)]
    assert cosines.max() < 0.85
    assert torch.linalg.matrix_rank(rows) > 40


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ein GROSSER Kreis!", "ein großer kreis"),
        ("ÜBER", unicodedata.normalize("NFD", "über")),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("❤️", "❤"),
        ("a photo of a bag", "bag"),
        ("红色的圆", "红色圆"),
    ],
)
def test_case_width_and_function_words_make_no_difference(one: str, other: str) -> None:
    assert cosine(HashingEncoder(32), one, other) == pytest.approx(1, abs=1e-6)


def test_words_of_any_script_are_found() -> None:
    assert split_words("Straße T-shirt 3D") == ["strasse", "t", "shirt", "3d"]
    assert split_words("दीर्घ वृत्त") == ["दीर्घ", "वृत्त"]  # marks belong to their letter
    assert split_words("大 red円") == ["大", "red", "円"]
    assert split_words("دائرة، حمراء") == ["دائرة", "حمراء"]
    assert split_words("🔴🟢!") == ["🔴", "🟢"]


@given(st.lists(st.text(), max_size=4), st.integers(8, 70))
def test_any_text_is_a_unit_row_of_its_own(texts: list[str], dim: int) -> None:
    encoder = HashingEncoder(dim)
    rows = encoder.encode(texts)
    assert rows.shape == (len(texts), dim)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(texts)))
    for text, row in zip(texts, rows, strict=True):
        assert torch.equal(encoder.encode([text])[0], row)


@pytest.mark.slow
def test_the_fingerprint_tells_sizes_apart_and_another_process_agrees() -> None:
    code = (
        "from shared.text import HashingEncoder as H; e = H(24);"
        "print(e.fingerprint, e.encode(['rotes Rad']).numpy().tobytes().hex())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    encoder = HashingEncoder(24)
    assert other.stdout.split() == [encoder.fingerprint, encoder.encode(["rotes Rad"]).numpy().tobytes().hex()]
    assert encoder.fingerprint != HashingEncoder(25).fingerprint


# ---- transformers --------------------------------------------------------------------------------------------

WORDS = "a red green blue circle square on white ground"
TEXTS = ["a red circle", "a blue square on white ground", "green", "unknown words here", "red " * 40]
KINDS = ["clip", "clip-text", "bert", "bert-mlm", "t5", "bart"]


def tiny_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )


def tiny_model(kind: str) -> Any:
    import transformers as hf

    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    words = {"vocab_size": 13, "max_position_embeddings": 20, "pad_token_id": 0}
    clip = {**words, **sizes, "bos_token_id": 2, "eos_token_id": 3, "attention_dropout": 0.5}
    match kind:
        case "clip":
            vision = {"image_size": 8, "patch_size": 4, **sizes}
            return hf.CLIPModel(hf.CLIPConfig(text_config=clip, vision_config=vision, projection_dim=12))
        case "clip-text":
            return hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(projection_dim=12, **clip))
        case "bert":
            return hf.BertModel(hf.BertConfig(**words, **sizes))
        case "bert-mlm":
            return hf.BertForMaskedLM(hf.BertConfig(**words, **sizes))
        case "t5":
            return hf.T5ForConditionalGeneration(
                hf.T5Config(
                    vocab_size=13, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            )
        case "bart":
            ends = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
            return hf.BartModel(hf.BartConfig(d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **ends, **words))
    raise AssertionError(kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random models on disk, as save_pretrained writes them; each made once."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            tiny_model(kind).save_pretrained(root / kind)
            tiny_tokenizer().save_pretrained(root / kind)
        return root / kind

    return folder


def encoder_of(folder: Path, **settings: Any) -> CaptionEncoder:
    return build_encoder(TextConfig(encoder="transformers", path=str(folder), max_tokens=16, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_a_padded_batch_of_transformers_itself(folders: Callable[[str], Path], kind: str) -> None:
    tokens = tiny_tokenizer()(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    model = tiny_model(kind).eval()
    with torch.no_grad():
        if kind.startswith("clip"):
            output = model.get_text_features(**tokens) if kind == "clip" else model(**tokens)
            pooled = output if torch.is_tensor(output) else output.get("text_embeds", output.get("pooler_output"))
        else:
            part = {"bert-mlm": "bert", "t5": "encoder", "bart": "encoder"}.get(kind)
            hidden = (getattr(model, part) if part else model)(**tokens).last_hidden_state
            mask = tokens["attention_mask"][:, :, None]
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    expected = torch.nn.functional.normalize(pooled, dim=1)
    encoder = encoder_of(folders(kind))
    rows = encoder.encode(TEXTS)
    assert rows.dtype == torch.float32
    assert rows.shape == (len(TEXTS), encoder.dim) == (len(TEXTS), 12 if kind.startswith("clip") else 16)
    torch.testing.assert_close(rows, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_row_is_frozen_and_its_own(folders: Callable[[str], Path], kind: str) -> None:
    encoder = encoder_of(folders(kind))
    rows = encoder.encode(TEXTS)
    assert not rows.requires_grad
    for i, text in enumerate(TEXTS):
        assert torch.equal(encoder.encode([text])[0], rows[i])  # exactly: no batch and no call before changes it
    assert torch.equal(encoder.encode(TEXTS[::-1] * 2), rows.flip(0).repeat(2, 1))
    assert encoder.encode([]).shape == (0, encoder.dim)
    model = encoder._model  # type: ignore[attr-defined]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.enable_grad():
        assert not encoder.encode(["a red circle"]).requires_grad


@pytest.mark.parametrize("kind", ["clip", "bert-mlm", "t5"])
def test_the_fingerprint_follows_the_content_not_the_place(
    folders: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    folder = folders(kind)
    encoder = encoder_of(folder)
    encoder.encode(TEXTS)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    transformers.AutoTokenizer.from_pretrained(copy).save_pretrained(copy)
    assert encoder_of(copy).fingerprint == encoder_of(copy).fingerprint == encoder.fingerprint
    shorter = build_encoder(TextConfig(encoder="transformers", path=str(copy), max_tokens=8))
    assert shorter.fingerprint != encoder.fingerprint
    weights = load_file(copy / "model.safetensors")
    name = next(n for n in sorted(weights) if "layer" in n and "vision" not in n and "decoder" not in n)
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert encoder_of(copy).fingerprint != encoder.fingerprint


def test_long_and_odd_texts_are_rows_too(folders: Callable[[str], Path]) -> None:
    random.seed(1)
    odd = ["", " ", "\0", "\ud800", "红色圆形", "دائرة", "".join(random.choices(string.printable, k=5000))]
    for kind in ("clip-text", "t5"):
        rows = encoder_of(folders(kind)).encode(odd)
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(odd)))


def test_a_checkpoint_that_lacks_weights_is_refused_rather_than_filled_with_random_ones(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folders("bert"), copy)
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks weights, encoder\.layer\.1\.output\.dense\.weight among them"):
        encoder_of(copy)


def test_what_is_no_text_model_is_refused_with_the_next_step(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs text\.path"):
        build_encoder(TextConfig(encoder="transformers"))
    with pytest.raises(ConfigError, match="unknown text encoder 'hashin'") as error:
        build_encoder(TextConfig(encoder="hashin"))
    assert "did you mean 'hashing'?" in str(error.value.hint)
    with pytest.raises(DataError, match="no folder /no/such"):
        encoder_of(Path("/no/such"))
    with pytest.raises(DataError, match="no transformers text model at") as failure:
        encoder_of(tmp_path)
    assert "without network text.path names a folder" in str(failure.value.hint)
    with pytest.raises(DataError, match="no transformers text model at some/model"):
        encoder_of(Path("some/model"))  # a model id; tests run offline

    broken = tmp_path / "broken"
    shutil.copytree(folders("bert"), broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match="no transformers text model"):
        encoder_of(broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    shutil.copy(folders("bert") / "model.safetensors", broken)
    with pytest.raises(DataError, match=r"the tokenizer at .* is not that of the model: 5 tokens, 13 rows"):
        encoder_of(broken)


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="does not read text"):
        encoder_of(tmp_path)


def test_code_in_a_model_folder_never_runs(folders: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders("bert"), copy)
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((copy / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    settings["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError):
        encoder_of(copy)
    assert not (tmp_path / "ran").exists()


def test_hashing_never_imports_transformers() -> None:
    code = (
        "import sys; from shared.text import build_encoder; from shared.config import TextConfig;"
        "build_encoder(TextConfig()).encode(['x']); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- cache ---------------------------------------------------------------------------------------------------


class Counting:
    dim = 8

    def __init__(self, fingerprint: str = "f") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def encode(self, texts: Any) -> torch.Tensor:
        self.calls += 1
        return HashingEncoder(8).encode(texts)


def test_embeddings_are_made_once_for_the_same_encoder_and_texts(tmp_path: Path) -> None:
    encoder = Counting()
    rows = cached_encode(encoder, TEXTS, tmp_path / "cache")
    assert torch.equal(cached_encode(encoder, TEXTS, tmp_path / "cache"), rows)
    assert encoder.calls == 1
    cached_encode(encoder, TEXTS[:-1], tmp_path / "cache")
    cached_encode(Counting("other"), TEXTS, tmp_path / "cache")
    assert encoder.calls == 2
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and nothing half-written


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "cut", "other"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: bytes | str) -> None:
    encoder = Counting()
    rows = cached_encode(encoder, TEXTS, tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "other":
        np.save(path, np.zeros((2, 2)))
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else path.read_bytes()[:-3])
    assert torch.equal(cached_encode(encoder, TEXTS, tmp_path), rows)
    assert torch.equal(cached_encode(encoder, TEXTS, tmp_path), rows)
    assert encoder.calls == 2
