"""Muon moves the matrices, AdamW the rest, and a checkpoint keeps both."""

from pathlib import Path

import torch

from intervale.model.load import load_network
from intervale.train.optimizer import Muon, make_optimizer
from intervale.train.prepare import freeze_and_adapt
from intervale.train.recipe import Data, Train, TrainRecipe
from intervale.train.state import Progress, restore, save_checkpoint, trainable


def prepared(tiny: Path, optimizer: str) -> tuple[torch.nn.Module, TrainRecipe]:
    recipe = TrainRecipe(model="m", data=Data(train="t"), train=Train(vision="full", llm="full", optimizer=optimizer))
    network = load_network(tiny, dtype=torch.float32)
    freeze_and_adapt(network, recipe)
    return network, recipe


def stepped(network: torch.nn.Module, optimizer: object, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in trainable(network).values():
        parameter.grad = torch.randn_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_matrices_and_leaves_tables_kernels_and_vectors_to_adamw(tiny: Path) -> None:
    network, recipe = prepared(tiny, "muon")
    optimizer = make_optimizer(network, recipe)
    stepped(network, optimizer, 0)
    by_muon = {name for name, parameter in trainable(network).items() if "momentum_buffer" in optimizer.state[parameter]}
    assert all(parameter.dim() == 2 for name, parameter in trainable(network).items() if name in by_muon)
    assert not [name for name in by_muon if "embed" in name or "lm_head" in name]
    assert any("q_proj" in name for name in by_muon)
    assert any("multi_modal_projector" in name for name in by_muon)
    rest = {name for name, parameter in trainable(network).items() if "exp_avg_sq" in optimizer.state[parameter]}
    assert by_muon | rest == set(trainable(network))
    assert not by_muon & rest


def test_a_muon_step_is_as_long_as_an_adamw_step(tiny: Path) -> None:
    lengths = []
    for name in ("adamw", "muon"):
        network, recipe = prepared(tiny, name)
        weight = next(parameter for key, parameter in trainable(network).items() if "mlp" in key and parameter.dim() == 2)
        before = weight.detach().clone()
        stepped(network, make_optimizer(network, recipe), 0)
        lengths.append(float((weight.detach() - before).square().mean().sqrt()))
    assert 0.1 < lengths[1] / lengths[0] < 0.4  # AdamW's first step is at its longest: 1 x rate; in training it is about 0.2 x


def test_matrices_stepped_together_go_where_torch_takes_them_one_by_one() -> None:
    def fresh() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (8, 24), (16, 16))]

    ours, theirs = fresh(), fresh()
    mine = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [parameter.detach().clone() for parameter in ours]
    for step in range(3):
        for optimizer in (mine, reference):
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                group["lr"] = 0.02
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for before, own, other in zip(start, ours, theirs, strict=True):
        assert (own - other).norm() < 0.01 * (other - before).norm()  # bfloat16 products, in another order


def test_a_restored_muon_run_steps_as_the_straight_one(tiny: Path, tmp_path: Path) -> None:
    network, recipe = prepared(tiny, "muon")
    optimizer = make_optimizer(network, recipe)
    stepped(network, optimizer, 0)
    folder = save_checkpoint(tmp_path, network, optimizer, Progress(step=1), {"base": {"name": str(tiny), "folder": str(tiny)}}, 1)
    stepped(network, optimizer, 1)
    other, _ = prepared(tiny, "muon")
    again = make_optimizer(other, recipe)
    assert restore(folder, other, again).step == 1
    stepped(other, again, 1)
    straight, resumed = trainable(network), trainable(other)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_changed_optimizer_starts_with_moments_of_its_own(tiny: Path, tmp_path: Path) -> None:
    network, recipe = prepared(tiny, "muon")
    optimizer = make_optimizer(network, recipe)
    stepped(network, optimizer, 0)
    folder = save_checkpoint(tmp_path, network, optimizer, Progress(step=1), {"base": {"name": str(tiny), "folder": str(tiny)}}, 1)
    other, adamw = prepared(tiny, "adamw")
    again = make_optimizer(other, adamw)
    restore(folder, other, again)
    stepped(other, again, 1)
    assert not [p for p in trainable(other).values() if "momentum_buffer" in again.state[p]]
