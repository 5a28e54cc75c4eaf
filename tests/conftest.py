"""What the tests share: the folder with real data (skipped when absent), tiny models and drawn data sets, built once."""

import os
from pathlib import Path

os.environ["INTERVALE_LANG"] = "en"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, on models too small to share among threads

import pytest
from PIL import Image, ImageDraw

from intervale.core.records import Message, Record, to_json

SHARED = Path(__file__).parents[2] / "shared"
PLATES = {"红色": (200, 40, 40), "绿色": (40, 160, 60), "蓝色": (40, 70, 190), "黄色": (220, 190, 40)}


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared with golden outputs and photographs; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random official model (float32)."""
    from intervale.model.presets import init_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    init_model(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def run_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with LoRA (B not 0) and a projector that was trained whole."""
    import torch

    from intervale.model.adapt import attach_lora, save_trained, trained_tensors
    from intervale.model.load import load_model
    from intervale.model.source import fingerprint

    tuned = load_model(tiny, device="cpu")
    network = tuned.network
    attach_lora(network, 4, 8, 0.0, "llm")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    folder.mkdir()
    save_trained(folder, network, {"name": "tiny", "folder": str(tiny), "fingerprint": fingerprint(tiny)})
    assert trained_tensors(network)
    return folder


def draw_plates(folder: Path, count: int, name: str = "train.jsonl", seed: int = 0) -> Path:
    """A data set of `count` coloured plates of several sizes: what colour is it? Returns the JSONL file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    names = list(PLATES)
    for number in range(count):
        colour = names[(number + seed) % len(names)]
        size = (56 + 14 * (number % 3), 56 + 10 * ((number + seed) % 2))
        picture = Image.new("RGB", size, (235, 235, 225 - seed))
        ImageDraw.Draw(picture).ellipse([8, 8, size[0] - 8, size[1] - 8], fill=PLATES[colour], outline=(number, seed, 0))
        image = f"images/{Path(name).stem}-{number}.png"
        picture.save(folder / image)
        messages = (Message("user", "<image>\n盘子是什么颜色?"), Message("assistant", f"{colour}，图中的菜是菜{number}"))
        record = Record(f"p{number}", messages, (image,), tuple(names), names.index(colour), {"colour": colour})
        lines.append(to_json(record))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.fixture(scope="session")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn plates with train.jsonl and four more in eval.jsonl."""
    folder = tmp_path_factory.mktemp("plates")
    draw_plates(folder, 8)
    draw_plates(folder, 4, "eval.jsonl", seed=1)
    return folder


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `intervale WORDS`, through the real entry point."""
    from intervale.cli.main import main
    from intervale.core.lang import set_language

    monkeypatch.setattr("sys.argv", ["intervale", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        set_language(None)
    return 0
