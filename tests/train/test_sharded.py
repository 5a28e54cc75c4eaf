"""What the sharding engines are given."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from intervale.core.errors import UserError
from intervale.train import prepare, sharded
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
        return (SimpleNamespace(optimizer=None),)

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


class Engine:
    """Stands in for DeepSpeed's on two processes that see the same: it sends what it finds when a pass of its own is over."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.sent = model, list[dict[str, torch.Tensor]]()
        self.optimizer = SimpleNamespace(get_grad_norm_direct=None)

    def __call__(self, *given: Any) -> Any:
        return self.model(*given)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Told, not needed."""

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        for gradient in found.values():
            gradient.view(-1)  # as DeepSpeed copies it to what it sends
        self.sent.append(found)
        self.model.zero_grad(set_to_none=True)


class Sums(torch.nn.Module):
    """Two vectors that one sum learns from, so that autograd gives both the same gradient; a matrix, `flat`, whose gradient it gives
    transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        self.flat = torch.nn.Parameter(torch.ones(3, 2))

    def forward(self, batch: torch.Tensor, compute: object) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.one + self.two + (self.flat.t() * torch.tensor([[1.0], [3.0]])).sum(0)
        return both * batch, batch


@pytest.mark.parametrize(
    ("stage", "whole", "sent"),
    [
        (1, 1 << 31, 1),
        (2, 1 << 31, 1),
        (2, 4, 3),
        (1, 4, 3),
        (3, 1 << 31, 3),
    ],
)
def test_a_small_gradient_is_sent_once_a_step_and_is_the_sum_of_its_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: int, whole: int, sent: int
) -> None:
    engine: list[Engine] = []
    monkeypatch.setattr(sharded, "need_deepspeed", lambda: SimpleNamespace(initialize=initialize, __version__="0.19.8"))
    monkeypatch.setattr(sharded, "StepModule", lambda module: module)
    monkeypatch.setattr(sharded, "make_optimizer", lambda *given: SimpleNamespace(only=lambda: None))
    monkeypatch.setattr(sharded, "trainable", lambda module: dict(module.named_parameters()))
    monkeypatch.setattr(prepare, "_WHOLE_GRADIENT", whole)

    def initialize(model: torch.nn.Module, **given: Any) -> tuple[Engine]:
        engine.append(Engine(model))
        return (engine[0],)

    parallel = {"strategy": "deepspeed", "zero_stage": stage}
    recipe = TrainRecipe.model_validate({"model": "nano", "data": {"train": str(tmp_path)}, "parallel": parallel})
    network: Any = Sums()
    zero = Zero(network, recipe, World(0, 2, torch.device("cpu")), spare_batch(), None)
    batches = [torch.tensor([float(at), 2.0, 3.0]) for at in (1, -2, 4)]
    for number, batch in enumerate(batches):
        losses, _ = zero.losses(None, batch, None, number == 2)  # type: ignore[arg-type]
        zero.backward(losses.sum(), number == 2)
    assert len(engine[0].sent) == sent
    together = {name: sum(part[name] for part in engine[0].sent if name in part) for name in ("one", "two", "flat")}
    for name in ("one", "two"):
        assert together[name].tolist() == [2 * 3.0, 2 * 6.0, 2 * 9.0]  # twice: the engine divides by two processes
    assert together["flat"].tolist() == [[6.0, 18.0], [12.0, 36.0], [18.0, 54.0]]


def test_a_deepspeed_that_forgets_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.18.2"))
    with pytest.raises(UserError, match=r"0\.18\.2 may leave gradients out") as caught:
        sharded.need_deepspeed()
    assert "intervale[deepspeed]" in caught.value.fix
    for sound in ("0.18.3", "0.19.8+cu130", "1.0"):
        monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__=sound))
        assert sharded.need_deepspeed().__version__ == sound


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
def test_the_norm_of_all_parts_at_once_is_deepspeeds(monkeypatch: pytest.MonkeyPatch, bad: float | None) -> None:
    """Over all processes; where it is no number it stays none: of DeepSpeed's -1 older versions make 1."""
    optimizer = SimpleNamespace(get_grad_norm_direct=None, _update_model_bit16_weights=lambda group: pytest.fail("made anew"))
    sharded._spare_the_host(optimizer, torch.device("cpu"))
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.mul_(2))  # the other process has the same
    parts = [torch.randn(3, 4), torch.randn(5), torch.zeros(0)]
    want = math.sqrt(2 * sum(float(part.double().square().sum()) for part in parts))
    if bad is not None:
        parts[0][1, 2], want = bad, bad
    assert float(optimizer.get_grad_norm_direct(parts, None)) == pytest.approx(want, nan_ok=True)
    assert float(optimizer.get_grad_norm_direct(iter(()), None)) == 0.0
    optimizer._update_model_bit16_weights(0)
    other = SimpleNamespace()  # a version that calls these otherwise keeps its own
    sharded._spare_the_host(other, torch.device("cpu"))
    assert not vars(other)
