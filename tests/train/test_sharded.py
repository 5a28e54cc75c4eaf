"""What the sharding engines are given."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intervale.train import sharded
from intervale.train.parallel import World
from intervale.train.recipe import TrainRecipe
from intervale.train.sharded import Zero, zero_settings
from intervale.train.strategy import spare_batch


def test_deepspeed_is_not_to_send_what_is_frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It sends every parameter at its start but those it calls a process's own; a frozen matrix that is part of another cannot be sent."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False).requires_grad_(False))
    network[1].weight.data = torch.zeros(4, 8)[:, :4]
    sent: list[torch.Tensor] = []

    def initialize(model: torch.nn.Module, **given: Any) -> tuple[Any, ...]:
        sent.extend(parameter for parameter in model.parameters() if not hasattr(parameter, "ds_optim_param"))
        return (SimpleNamespace(),)

    monkeypatch.setattr(sharded, "need_deepspeed", lambda: SimpleNamespace(initialize=initialize, __version__="0.19.8"))
    monkeypatch.setattr(sharded, "StepModule", lambda module: module)
    monkeypatch.setattr(sharded, "make_optimizer", lambda *given: SimpleNamespace(only=lambda: None))
    monkeypatch.setattr(sharded, "trainable", lambda module: dict(module[0].named_parameters()))
    recipe = TrainRecipe.model_validate({"model": "nano", "data": {"train": str(tmp_path)}})
    Zero(network, recipe, World(0, 1, torch.device("cpu")), spare_batch(), None)  # type: ignore[arg-type]
    assert {id(one) for one in sent} == {id(one) for one in network[0].parameters()}


@pytest.mark.parametrize(
    ("device", "stage", "version", "beside"),
    [
        ("cuda", 2, "0.19.8", True),
        ("cuda", 1, "0.19.3+cu128", True),
        ("cuda", 2, "0.19.2", False),
        ("cuda", 1, "0.18.10", False),
        ("cuda", 2, "1.0.0", True),
        ("cuda", 3, "0.18.0", True),
        ("cpu", 2, "0.19.8", False),
    ],
)
def test_gradients_are_sent_beside_the_way_back_where_deepspeed_waits_for_them(
    tmp_path: Path, device: str, stage: int, version: str, beside: bool
) -> None:
    parallel = {"strategy": "deepspeed", "zero_stage": stage}
    recipe = TrainRecipe.model_validate({"model": "nano", "data": {"train": str(tmp_path)}, "parallel": parallel})
    assert zero_settings(recipe, torch.device(device), version)["zero_optimization"]["overlap_comm"] is beside
