"""A tiny checkpoint, for what serves tuned and base together."""

from pathlib import Path

import pytest
import torch

from intervale.model.adapt import attach_lora, save_trained, trained_tensors
from intervale.model.load import load_model
from intervale.model.source import fingerprint


@pytest.fixture(scope="session")
def run_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with LoRA (B not 0) and a projector that was trained whole."""
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
