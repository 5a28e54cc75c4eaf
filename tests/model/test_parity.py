"""Golden outputs of the official code (../shared) against this package. Skipped where the golden folder is absent."""

import gzip
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from intervale.model.load import load_network
from intervale.model.tokenizer import Tokenizer, byte_level, from_sentencepiece, load_tokenizer


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "data" / "golden" / "official_internlm2_tiny"


@torch.no_grad()
def test_features_logits_and_loss_are_the_official_ones(golden: Path) -> None:
    network = load_network(golden, dtype=torch.float32, device="cpu", image_token_id=290)
    known = load_file(golden / "reference.safetensors")
    pixels = known["pixel_values"]
    features = network.model.get_image_features(pixel_values=pixels).pooler_output
    assert (features - known["vision_features"]).abs().max() <= 1e-5
    for length in ("short", "long"):
        logits = network(input_ids=known[f"ids_{length}"], pixel_values=pixels).logits
        assert (logits - known[f"logits_{length}"]).abs().max() <= 2e-5
    loss = network(input_ids=known["ids_short"], pixel_values=pixels, labels=known["labels"]).loss
    assert abs(float(loss - known["loss"])) <= 1e-6


def test_greedy_sequences_are_the_official_ones_also_past_the_context(golden: Path) -> None:
    network = load_network(golden, dtype=torch.float32, device="cpu", image_token_id=290)
    known = load_file(golden / "reference.safetensors")
    for name in ("greedy", "greedy_cross"):
        wanted = known[name][0]
        made = network.generate(
            input_ids=known["ids_short"], pixel_values=known["pixel_values"], max_new_tokens=len(wanted), do_sample=False, eos_token_id=None
        )
        assert torch.equal(made[0, -len(wanted) :], wanted)


@torch.no_grad()
def test_our_own_feature_path_equals_transformers(golden: Path) -> None:
    from intervale.model.forward import picture_features

    network = load_network(golden, dtype=torch.float32, device="cpu", image_token_id=290)
    pixels = load_file(golden / "reference.safetensors")["pixel_values"]
    assert torch.equal(picture_features(network, pixels), network.model.get_image_features(pixel_values=pixels).pooler_output)


@pytest.mark.parametrize("text", ["what dish?", "  这是鱼香肉丝 🍜\n", "naïve—½ 𠮷\x00"])
@pytest.mark.parametrize("kind", ["nano", "byte level", "InternLM2"])
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer | None
    if kind == "nano":
        tokenizer = load_tokenizer(Path(str(files("intervale") / "assets" / "nano")))
    elif kind == "byte level":
        tokenizer = Tokenizer(byte_level(400, {300: "<|im_end|>"}), False, "test")
    else:
        shared: Path = request.getfixturevalue("shared")
        tokenizer = Tokenizer(from_sentencepiece(shared / "data" / "internlm2_tokenizer" / "tokenizer.model"), True, "test")
    assert tokenizer is not None
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))) == text.encode()
    assert tokenizer.bytes_of(tokenizer.control("<|im_end|>")) == b"<|im_end|>"
    assert tokenizer.bytes_of(10**6) == b""


def test_the_internlm2_tokenizer_gives_the_official_ids(shared: Path) -> None:
    backend = from_sentencepiece(shared / "data" / "internlm2_tokenizer" / "tokenizer.model")
    with gzip.open(shared / "data" / "golden" / "internlm2_tokenizer.jsonl.gz", "rt", encoding="utf-8") as file:
        known = [json.loads(line) for line in file]
    wrong = [entry["text"] for entry in known if backend.encode(entry["text"]).ids != entry["ids"]]
    assert len(known) == 1500
    assert wrong == []
    tokenizer = Tokenizer(backend, True, "test")
    controls = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    plain = [entry for entry in known if not any(control in entry["text"] for control in controls)]
    assert len(plain) > 1000
    assert all(tokenizer.encode(entry["text"]) == entry["ids"][1:] for entry in plain)
