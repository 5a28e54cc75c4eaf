"""Several processes take the step of one, whatever they share; what they save, any other number and strategy reads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_loop import losses, run, write_recipe

from intervale.core.config import load_recipe
from intervale.core.errors import OutsideError, UserError
from intervale.core.runlog import read_metrics
from intervale.export.export import export
from intervale.model.adapt import newest_checkpoint
from intervale.train import loop, parallel, steps
from intervale.train.parallel import World
from intervale.train.recipe import TrainRecipe
from intervale.train.running import Loop

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (intervale[deepspeed])")
STRATEGIES = [
    pytest.param(["parallel.strategy=ddp"], id="ddp"),
    pytest.param(["parallel.strategy=fsdp"], id="fsdp"),
    *(
        pytest.param(["parallel.strategy=deepspeed", f"parallel.zero_stage={stage}"], id=f"zero-{stage}", marks=needs_deepspeed)
        for stage in (1, 2, 3)
    ),
]


def together(path: Path, *settings: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`intervale train` that starts two processes on the CPU."""
    words = [word for setting in ("parallel.processes=2", *settings) for word in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "-m", "intervale", "train", str(path), *words, *more],
        capture_output=True,
        text=True,
        env=os.environ | {"INTERVALE_DEVICE": "cpu", "INTERVALE_CACHE": str(path.parent / "cache")},
        timeout=100,
        check=False,
    )


def differing(one: Path, two: Path) -> float:
    """The largest difference of any tensor of two checkpoints, relative to the largest value."""
    worst = 0.0
    for file in ("adapter_model.safetensors", "trained.safetensors", "optimizer.safetensors"):
        left, right = load_file(one / file), load_file(two / file)
        assert left.keys() == right.keys()
        worst = max(worst, *(float((left[n] - right[n]).abs().max() / left[n].abs().max().clamp(min=1e-3)) for n in left))
    return worst


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny: Path, plates: Path) -> Path:
    """One process: 8 items, 4 a step, 3 epochs, no dropout."""
    folder = tmp_path_factory.mktemp("alone")
    path = write_recipe(folder, tiny, plates, batch_size=2, accumulation=2, epochs=3, save_steps=3)
    assert run(path, "lora.dropout=0.0").status == "done"
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("settings", STRATEGIES)
def test_two_processes_give_the_losses_of_one_resume_and_export(
    tmp_path: Path, tiny: Path, plates: Path, alone: Path, settings: list[str]
) -> None:
    path = write_recipe(tmp_path, tiny, plates, batch_size=1, accumulation=2, epochs=3, save_steps=3)
    settings = [*settings, "lora.dropout=0.0"]
    done = together(path, *settings)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert len(list((tmp_path / "cache").rglob("*.feat"))) == 8  # each picture's features once, half by each process
    assert "features: 4 pictures" in done.stderr
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    held = [[entry["eval_loss"] for entry in read_metrics(place) if "eval_loss" in entry] for place in (folder, alone)]
    assert held[0] == pytest.approx(held[1], abs=1e-5)
    last = folder / "checkpoints" / "step-00000006"
    assert differing(last, alone / "checkpoints" / "step-00000006") < 1e-3  # Adam divides small gradients by their size
    straight = (losses(folder), {file.name: file.read_bytes() for file in last.glob("*.safetensors")})
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"status": "running"}))
    done = together(path, *settings, more=("--resume",))
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stderr
    assert losses(folder) == straight[0]
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == straight[1]  # bit by bit
    proof = export(folder, tmp_path / "model", "hf", dtype=None, tell=lambda text: None)
    assert proof.changed_tensors > 0


@pytest.mark.slow
def test_what_fsdp_saved_one_process_continues(tmp_path: Path, tiny: Path, plates: Path, alone: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, batch_size=1, accumulation=2, epochs=3, save_steps=3)
    assert together(path, "parallel.strategy=fsdp", "lora.dropout=0.0").returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    (tmp_path / "run" / "run.json").write_text('{"status": "stopped"}')
    other = write_recipe(tmp_path, tiny, plates, batch_size=2, accumulation=2, epochs=3, save_steps=3)
    recipe = load_recipe(other, TrainRecipe, ["lora.dropout=0.0"])
    from intervale.train.loop import train

    assert train(recipe, "r", resume=True, fresh=False, dry_run=False, tell=lambda text: None, accept_changes=True).status == "done"
    assert losses(tmp_path / "run")[3:] == pytest.approx(losses(alone)[3:], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [STRATEGIES[1], STRATEGIES[3], STRATEGIES[4]])
def test_uneven_steps_text_alone_and_a_learning_tower(tmp_path: Path, tiny: Path, settings: list[str]) -> None:
    """Three items a step on two processes, some without a picture: every process still makes as many passes."""
    from conftest import draw_plates
    from intervale.core.records import Message, Record, to_json

    draw_plates(tmp_path, 4)
    draw_plates(tmp_path, 3, "eval.jsonl", seed=1)
    with open(tmp_path / "train.jsonl", "a") as file:
        for number in range(3):
            file.write(to_json(Record(f"t{number}", (Message("user", "颜色?"), Message("assistant", f"红{number}")))) + "\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    more = ["lora.dropout=0.0", "train.vision=full"]
    one = write_recipe(tmp_path / "one", tiny, tmp_path, batch_size=1, accumulation=6, epochs=2)
    run(one, *more)
    two = write_recipe(tmp_path / "two", tiny, tmp_path, batch_size=1, accumulation=3, epochs=2)
    done = together(two, *settings, *more)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two" / "run") == pytest.approx(losses(tmp_path / "one" / "run"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [STRATEGIES[1], STRATEGIES[3]])
def test_a_bfloat16_base_under_float32_adapters_is_shared_too(tmp_path: Path, tiny: Path, plates: Path, settings: list[str]) -> None:
    path = write_recipe(tmp_path, tiny, plates, batch_size=2, accumulation=2, precision="bf16")
    run(path, "lora.dropout=0.0", f"out={tmp_path / 'one'}")
    path = write_recipe(tmp_path, tiny, plates, batch_size=1, accumulation=2, precision="bf16")
    done = together(path, *settings, "lora.dropout=0.0")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)  # bfloat16 has 8 bits


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_every_process_once_and_the_run_goes_on(
    tmp_path: Path, tiny: Path, plates: Path, asked: signal.Signals, code: int
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=400, batch_size=1)
    words = [sys.executable, "-m", "intervale", "train", str(path), "--set", "parallel.processes=2", "--set", "parallel.strategy=ddp"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"INTERVALE_DEVICE": "cpu"}) as process:
        for _ in range(1200):
            if len(read_metrics(tmp_path / "run")) > 3:
                break
            time.sleep(0.1)
        process.send_signal(asked)
        _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "--resume" in said
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) == read_metrics(tmp_path / "run")[-1]["step"]


class Connection:
    """Stands in for torch.distributed beside GPUs: what was opened and closed, and where the numbers lay that were added up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[Any] = []
        monkeypatch.setattr(dist, "init_process_group", self.told.append)
        monkeypatch.setattr(dist, "new_group", lambda backend: self.told.append(backend) or backend)
        monkeypatch.setattr(dist, "get_rank", lambda: 0)
        monkeypatch.setattr(dist, "all_gather", self.gather)
        monkeypatch.setattr(dist, "barrier", self.told.append)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: self.told.append("closed"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def gather(self, found: list[torch.Tensor], own: torch.Tensor, group: object) -> None:
        """All have the same."""
        self.told.append((str(own.device), group))
        for each in found:
            each.copy_(own)


@pytest.mark.parametrize(("here", "hosts"), [("2", "gloo"), ("1", None), (None, None)])
def test_hosts_of_one_machine_have_a_connection_of_their_own(monkeypatch: pytest.MonkeyPatch, here: str | None, hosts: str | None) -> None:
    """Between machines it would need a network of its own settings, without which the start would only wait."""
    connection = Connection(monkeypatch)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    world = parallel.join_world("ddp", "cuda")
    assert (world.device, world.hosts) == (torch.device("cuda:0"), hosts)
    assert connection.told == (["nccl", "gloo"] if hosts else ["nccl"])
    connection.told.clear()
    world = replace(world, device=torch.device("meta"))  # a device that is no CPU, and that every machine has
    if hosts:
        assert parallel.sum_values(world, [2.0, 3.0]) == [4.0, 6.0]
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):  # nothing can be read from it
            parallel.sum_values(world, [2.0, 3.0])
    parallel.wait(world)
    assert connection.told == [("cpu" if hosts else "meta", hosts), hosts]


def test_who_ends_by_an_error_does_not_wait_for_the_others_to_close_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(monkeypatch)
    with pytest.raises(UserError), parallel.left_together(World(0, 2, torch.device("cpu"))):
        raise UserError("what", "fix")
    assert not connection.told
    with parallel.left_together(World(0, 2, torch.device("cpu"))):
        pass
    assert connection.told == ["closed"]


def as_one_of_two(monkeypatch: pytest.MonkeyPatch, kind: type[Loop] = Loop) -> list[Any]:
    """The run's steps take it for one of two processes, of which the other has nothing to say; the loop at each step so far."""
    seen: list[Any] = []
    one_step = steps._one_step

    def step(loop: Any, batches: Any) -> Any:
        seen.append(loop)
        loop.__class__, loop.world = kind, World(0, 2, torch.device("cpu"))
        return one_step(loop, batches)

    monkeypatch.setattr(steps, "of_all", lambda world, values: [(value,) for value in values])
    monkeypatch.setattr(steps, "sum_values", lambda world, values: values)
    monkeypatch.setattr(steps, "wait", lambda world: None)
    monkeypatch.setattr(steps, "_one_step", step)
    return seen


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts at the step after the one in whose numbers it was not."""
    seen = as_one_of_two(monkeypatch)

    def gather(world: World, values: list[float]) -> list[tuple[float, ...]]:
        if len(values) == 4 and seen[0].progress.step == 1:
            seen[0].stop = signal.SIGTERM  # the handler runs while the others are waited for
        return [(value,) for value in values]

    monkeypatch.setattr(steps, "of_all", gather)
    done = run(write_recipe(tmp_path, tiny, plates, epochs=4))
    assert (done.status, done.exit_code, done.step) == ("stopped", 143, 3)


def test_a_signal_between_a_question_and_what_it_leads_to_is_not_lost(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler may run between the reading of a name and the writing of another."""

    class Interrupted(Loop):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "stop" and self.progress.step == 2 and not interrupted:
                interrupted.append(True)
                self.stop = signal.SIGTERM
            return value

    interrupted: list[bool] = []
    as_one_of_two(monkeypatch, Interrupted)
    done = run(write_recipe(tmp_path, tiny, plates, epochs=4))
    assert (done.status, done.exit_code, done.step) == ("stopped", 143, 3)


def test_hosts_exchange_numbers_twice_a_step_and_wait_for_each_other_where_one_has_more_to_do(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPUs are idle meanwhile."""
    asked: list[str] = []
    monkeypatch.setattr(steps, "wait", lambda world: asked.append("wait"))
    real = parallel.of_all
    monkeypatch.setattr(steps, "of_all", lambda *given: asked.append("numbers") or real(*given))
    monkeypatch.setattr(steps, "sum_values", lambda world, values: values)  # what DDP asks besides while its GPUs compute
    path = write_recipe(tmp_path, tiny, plates, epochs=4, save_steps=3)
    assert run(path).step == 8
    assert "".join(word[0] for word in asked) == "nnnnnnw" * 2 + "nnnnw"


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_without_a_traceback(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=5000, save_steps=3)
    settings = ["parallel.processes=2", "parallel.strategy=ddp"]
    words = [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"INTERVALE_DEVICE": "cpu", "INTERVALE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "intervale", "train", str(path), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        for _ in range(600):
            if newest_checkpoint(tmp_path / "run") is not None:
                break
            time.sleep(0.1)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        second = next(child for child in children if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))
        os.kill(int(second), signal.SIGKILL)
        _, said = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGKILL
    assert "another process of this run has ended" in said
    assert "process 1 of 2 was killed by signal 9" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_fault_of_the_input_is_told_and_ends_all(tmp_path: Path, tiny: Path, plates: Path) -> None:
    done = together(write_recipe(tmp_path, tiny, plates), "parallel.strategy=ddp", "data.train=/nowhere.jsonl")
    assert done.returncode == 1
    # By the first process; by another one too when that was the first to end, for then its words may be the only ones.
    assert done.stderr.count("/nowhere.jsonl: cannot be read") in (1, 2)
    assert "Traceback" not in done.stderr


def test_an_end_of_another_is_heard_from_the_first_question_on(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process may be refused the run's folder, which another run holds, while the others ask whether the run is complete."""

    def asked(*given: object) -> list[float]:
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    Connection(monkeypatch)
    monkeypatch.setattr(loop, "join_world", lambda *given: World(1, 2, torch.device("cpu")))
    monkeypatch.setattr(loop, "sum_values", asked)
    with pytest.raises(OutsideError, match="another process of this run has ended"):
        run(write_recipe(tmp_path, tiny, plates), "parallel.strategy=ddp")


def test_more_processes_need_a_strategy_and_muon_needs_whole_matrices(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    with pytest.raises(UserError, match=r"parallel\.processes is 2: set parallel\.strategy"):
        load_recipe(path, TrainRecipe, ["parallel.processes=2"])
    with pytest.raises(UserError, match="muon needs whole matrices"):
        load_recipe(path, TrainRecipe, ["parallel.strategy=fsdp", "train.optimizer=muon"])


def test_deepspeed_that_is_not_there_is_told_before_anything(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="deepspeed") as caught:
        run(write_recipe(tmp_path, tiny, plates), "parallel.strategy=deepspeed")
    assert "intervale[deepspeed]" in caught.value.fix
    assert not (tmp_path / "run").exists()
