"""What the fused LoRA layers read is what their parameters hold, wherever these are kept. No GPU is needed: nothing is computed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_products_read_parameters_that_were_given_another_memory() -> None:
    """DeepSpeed lays what learns end to end in a memory of its own; a copy of the old one would never learn."""
    from intervale.model.fast_lora import FastLora, Together

    network = torch.nn.Module()
    for name in ("q_proj", "k_proj"):
        network.add_module(name, torch.nn.Linear(8, 6, bias=False))
    get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    layers = [network.q_proj, network.k_proj]
    together = Together(layers)
    adapter = FastLora([together])
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    flat = torch.randn(sum(one.numel() for one in learning))
    for parameter, part in zip(learning, flat.split([one.numel() for one in learning]), strict=True):
        parameter.data = part.view_as(parameter)
    for _ in range(2):
        adapter.refresh()
        for at, layer in enumerate(layers):
            rows, ranks = slice(6 * at, 6 * at + 6), slice(4 * at, 4 * at + 4)
            assert torch.equal(together.small_GRK[ranks], layer.lora_A["default"].weight)
            assert torch.equal(together.wide_NKR[rows, 8:][:, ranks], layer.lora_B["default"].weight)
        flat += 1.0
