"""An adapter in a network: its file's own numbers, all of them, and nothing that changes later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from intervale.core.errors import UserError
from intervale.model.adapt import ADAPTER, adapted_network, attach_lora, save_trained
from intervale.model.load import load_network

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Path) -> Path:
    """An adapter of random float32 numbers; none of them is a bfloat16."""
    network = load_network(tiny, dtype=torch.float32).requires_grad_(False)
    attach_lora(network, 4, 8, 0.0, "llm+vision")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_trained(tmp_path, network, {"name": "tiny", "folder": str(tiny), "fingerprint": "0"})
    return tmp_path


def _adapter_in(network: torch.nn.Module) -> Tensors:
    named = dict(network.named_parameters())
    return {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in named.items() if ".lora_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_keeps_its_float32_numbers_whatever_the_type_of_its_base(checkpoint: Path, tiny: Path, dtype: torch.dtype) -> None:
    stored = load_file(checkpoint / ADAPTER)
    own = _adapter_in(adapted_network(load_network(tiny, dtype=dtype), checkpoint))
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: dict(sorted(tensors.items())[1:]), "1 not there"),
        (lambda tensors: tensors | {"base_model.model.nowhere.lora_A.weight": torch.ones(4, 4)}, r"1 too many, .*nowhere\.lora_A"),
    ],
    ids=["one less", "one more"],
)
def test_an_adapter_that_is_not_what_its_configuration_names_is_refused(
    checkpoint: Path, tiny: Path, dtype: torch.dtype, change: Callable[[Tensors], Tensors], told: str
) -> None:
    save_file(change(load_file(checkpoint / ADAPTER)), checkpoint / ADAPTER, {"format": "pt"})
    with pytest.raises(UserError, match=told):
        adapted_network(load_network(tiny, dtype=dtype), checkpoint)


def test_writing_over_the_file_changes_no_network_that_was_made_from_it(checkpoint: Path, tiny: Path) -> None:
    own = _adapter_in(adapted_network(load_network(tiny, dtype=torch.float32), checkpoint))
    size = (checkpoint / ADAPTER).stat().st_size
    with open(checkpoint / ADAPTER, "r+b") as file:
        file.write(bytes(size))
    assert all(bool(tensor.any()) for tensor in own.values())
