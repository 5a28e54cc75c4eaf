"""Runs survive: a resumed run is the straight one bit by bit, and no death, full disk or damage costs more than the last save."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loop import losses, run, write_recipe

from conftest import draw_plates
from intervale.core.config import load_recipe
from intervale.core.errors import UserError
from intervale.core.runlog import read_metrics
from intervale.data.images import PictureError
from intervale.model import adapt
from intervale.model.adapt import attach_lora, newest_checkpoint, verify_checkpoint
from intervale.model.load import load_network
from intervale.train import held_out, state, step, steps
from intervale.train import loop as run_loop
from intervale.train.recipe import TrainRecipe
from intervale.train.resume import already_skipped, sweep
from intervale.train.state import Progress, choose_checkpoint, restore, save_checkpoint, trainable

LAST = "step-00000006"  # 8 items, 4 a step, 3 epochs


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in ("adapter_model.safetensors", "trained.safetensors", "optimizer.safetensors"):
        found |= {f"{file}:{name}": tensor for name, tensor in load_file(folder / file).items()}
    return found


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    left, right = tensors_of(one / "checkpoints" / LAST), tensors_of(two / "checkpoints" / LAST)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny: Path, plates: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert run(write_recipe(folder, tiny, plates, epochs=3)).status == "done"
    return folder / "run"


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do `act` once step `number` is made, before it is saved."""
    real = steps.append_metrics

    def append(folder: Path, entry: dict[str, Any]) -> None:
        real(folder, entry)
        if entry["step"] == number:
            act()

    monkeypatch.setattr(steps, "append_metrics", append)


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("at", [2, 3], ids=["at an epoch's edge", "mid-epoch"])
def test_stopped_and_resumed_is_the_straight_run(
    tmp_path: Path, tiny: Path, plates: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, at: int, workers: int
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3)
    with monkeypatch.context() as patch:
        stop_after(patch, at, lambda: signal.raise_signal(signal.SIGTERM))
        outcome = run(path, f"data.workers={workers}")
    assert (outcome.status, outcome.step, outcome.exit_code) == ("stopped", at, 143)
    assert run(path, f"data.workers={4 - workers}", resume=True).status == "done"
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("death", ["signal", "crash"])
def test_a_stop_between_micro_batches_loses_nothing(
    tmp_path: Path, tiny: Path, plates: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    """A signal in the middle of accumulation finishes the step; a crash there costs that step, which is made again the same."""
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=1)
    real, calls = step.batch_losses, []

    def interrupted(*values: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second micro-batch of step 3
            if death == "crash":
                raise SystemExit("died")
            signal.raise_signal(signal.SIGINT)
        return real(*values)

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_losses", interrupted)
        if death == "crash":
            with pytest.raises(SystemExit):
                run(path)
        else:
            assert run(path).step == 3
    assert run(path, resume=True).status == "done"
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_straight_run(tmp_path: Path, tiny: Path, plates: Path, straight: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=1)
    with subprocess.Popen([sys.executable, "-m", "intervale", "train", str(path)], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(losses(tmp_path / "run")) < 2:
            time.sleep(0.01)
        process.kill()
    assert run(path, resume=True).status == "done"
    assert_same_run(straight, tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*"))


# --- kill -9 at every file boundary of a save -------------------------------------------------------------------------------------

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def _die_at(number: int, run_folder: Path) -> list[int]:
    """SIGKILL this process at its `number`-th file event; the returned list counts them. For a forked child: hooks stay for ever."""
    count = [0]

    def tick() -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event in _EVENTS and (event != "open" or str(values[0]).startswith(str(run_folder))):
            tick()

    real_sync = os.fsync

    def sync(handle: int) -> None:
        tick()
        real_sync(handle)

    def half(real: Callable[..., None]) -> Callable[..., None]:
        def save(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
            tick()
            real(tensors, path, **options)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])  # what a death in the middle of writing leaves
            tick()
            path.write_bytes(whole)

        return save

    os.fsync = sync
    state.save_file, adapt.save_file = half(state.save_file), half(adapt.save_file)
    sys.addaudithook(hook)
    return count


def _set(network: torch.nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    for parameter in trainable(network).values():
        parameter.data.fill_(value)
        optimizer.state[parameter] = {
            "exp_avg": torch.full_like(parameter, value),
            "exp_avg_sq": torch.full_like(parameter, value),
            "step": torch.tensor(value),
        }


def test_a_kill_at_any_file_boundary_of_a_save_leaves_a_good_checkpoint(tmp_path: Path, tiny: Path) -> None:
    network = load_network(tiny, dtype=torch.float32)
    network.requires_grad_(False)
    attach_lora(network, 2, 4, 0.0, "llm")
    network.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable(network).values())
    identity = {"base": {"name": "tiny", "folder": str(tiny), "fingerprint": "0"}}

    def save(folder: Path, number: int) -> None:
        _set(network, optimizer, float(number))
        save_checkpoint(folder, network, optimizer, Progress(number), identity, keep=1)

    save(tmp_path / "before", 1)
    survived = set()
    for number in range(1, 500):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(tmp_path / "before", folder)
        child = os.fork()
        if child == 0:
            _die_at(number, folder)
            save(folder, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        chosen, skipped = choose_checkpoint(folder)
        assert chosen is not None, f"file event {number}: {skipped}"
        found = restore(chosen, network, optimizer).step
        survived.add(found)
        for parameter in trainable(network).values():
            assert bool((parameter == found).all()), number
            assert bool((optimizer.state[parameter]["exp_avg"] == found).all()), number
        sweep(folder)
        assert not list(folder.rglob(".*")), number
        save(folder, 2)
        assert verify_checkpoint(folder / "checkpoints" / "step-00000002") == "", number
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"], number
        shutil.rmtree(folder)
    assert number > 40  # every open, fsync, rename and removal was met
    assert survived == {1, 2}


# --- disks and damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip() or mounted.returncode}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("asked_first", [True, False], ids=["free space is checked", "it fills while saving"])
def test_a_full_disk_keeps_the_last_checkpoint_and_resumes(
    tmp_path: Path, tiny: Path, plates: Path, straight: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, asked_first: bool
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=2)
    out = f"out={small_disk / 'run'}"

    def fill() -> None:
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - (64 << 10))  # room for the logs, not for a checkpoint

    with monkeypatch.context() as patch:
        stop_after(patch, 3, fill)
        if not asked_first:
            patch.setattr(state, "need_space", lambda folder, size: None)
        with pytest.raises(UserError, match="the disk is full"):
            run(path, out)
    assert [entry.name for entry in (small_disk / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    (small_disk / "filler").unlink()
    assert run(path, out, resume=True).status == "done"
    assert_same_run(straight, small_disk / "run")


def test_a_disk_that_turns_read_only_is_told_and_the_run_resumes(
    tmp_path: Path, tiny: Path, plates: Path, straight: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=2)
    out = f"out={small_disk}"  # the lock lies beside it, on another disk: this one has no file open when it turns

    def mode(word: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{word}", str(small_disk)], check=True)

    with monkeypatch.context() as patch:
        stop_after(patch, 3, lambda: mode("ro"))
        with pytest.raises(UserError, match="not allowed to write"):
            run(path, out)
    mode("rw")
    assert run(path, out, resume=True).status == "done"
    assert_same_run(straight, small_disk)


def test_a_folder_that_may_not_be_written_is_refused_at_the_start(tmp_path: Path, tiny: Path, plates: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="not allowed to write") as caught:
        run(write_recipe(tmp_path, tiny, plates), f"out={small_disk / 'run'}")
    assert "another output folder" in caught.value.fix


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_any_damage_to_any_file_is_found_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, tiny: Path, plates: Path, straight: Path
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=2)
    run(path)
    folder = tmp_path / "run"
    shutil.copytree(folder, tmp_path / "whole")
    damages: dict[str, Callable[[Path], None]] = {
        "flipped": _flip,
        "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
        "empty": lambda file: os.truncate(file, 0),
        "gone": Path.unlink,
    }
    newest = folder / "checkpoints" / LAST
    for name in sorted(file.name for file in newest.iterdir()):
        for kind, damage in damages.items():
            shutil.copy(tmp_path / "whole" / "checkpoints" / LAST / name, newest / name)
            damage(newest / name)
            chosen, skipped = choose_checkpoint(folder)
            assert chosen is not None, (name, kind)
            assert chosen.name == "step-00000004", (name, kind)
            assert "manifest" in skipped[0] or name in skipped[0] or name == "MANIFEST.json", skipped
        shutil.copy(tmp_path / "whole" / "checkpoints" / LAST / name, newest / name)
    _flip(newest / "optimizer.safetensors")
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"status": "running"}))
    said: list[str] = []
    assert run(path, resume=True, said=said).status == "done"
    assert f"skipped {LAST}: optimizer.safetensors is damaged" in said
    assert_same_run(straight, folder)


def test_rotation_after_damage_keeps_what_was_just_written(tmp_path: Path, tiny: Path, plates: Path, straight: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=2, save_total_limit=2)
    run(path)
    folder = tmp_path / "run"
    _flip(folder / "checkpoints" / LAST / "trained.safetensors")
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"status": "running"}))
    saved = []
    real = steps.save_checkpoint

    def save(*values: Any) -> Path:
        saved.append(real(*values))
        assert verify_checkpoint(saved[-1]) == ""
        return saved[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "save_checkpoint", save)
        assert run(path, "train.save_steps=1", "train.save_total_limit=1", resume=True).status == "done"
    assert [path.name for path in saved] == ["step-00000005", LAST]
    assert_same_run(straight, folder)


# --- changes, batches that give no number, pictures that do not open, memory that ends -------------------------------------------------


def test_changes_are_refused_field_by_field_unless_accepted(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        run(path)
    changes = ["train.learning_rate=2e-3", "train.weight_decay=0.0"]
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 -> 0\.002; recipe\.train\.weight_decay: 0\.05 -> 0\.0"):
        run(path, *changes, resume=True)
    other = tmp_path / "other"
    draw_plates(other, 9)
    with pytest.raises(UserError, match="data: "):
        run(path, f"data.train={other / 'train.jsonl'}", resume=True)
    recipe = load_recipe(path, TrainRecipe)
    wide = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 8})})
    with pytest.raises(UserError, match=r"lora_A.*\[4, .*and \[8, "):
        run_loop.train(wide, "r", resume=True, fresh=False, dry_run=False, tell=lambda text: None, accept_changes=True)
    said: list[str] = []
    faster = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 2e-3})})
    done = run_loop.train(faster, "r", resume=True, fresh=False, dry_run=False, tell=said.append, accept_changes=True)
    assert done.status == "done"
    assert any("learning_rate: 0.001 -> 0.002" in line for line in said)


def test_a_base_that_changed_is_refused_and_the_same_one_put_back_is_not(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    path = write_recipe(tmp_path, tmp_path / "base", plates, epochs=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        run(path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "kept")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="base: "):
        run(path, resume=True)
    (tmp_path / "kept").rename(tmp_path / "base" / "model.safetensors")
    assert run(path, resume=True).status == "done"


@pytest.mark.parametrize("first", [True, False], ids=["at the first step", "later"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_batch(
    tmp_path: Path, tiny: Path, plates: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=1)
    real, calls = step.batch_losses, []

    def poisoned(network: Any, batch: Any, compute: Any) -> Any:
        found, correct = real(network, batch, compute)
        calls.append(batch)
        return (found * float("nan") if len(calls) == (2 if first else 6) else found), correct

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_losses", poisoned)
        with pytest.raises(UserError, match="the loss is nan") as caught:
            run(path)
    number = 1 if first else 3
    kept = tmp_path / "run" / "nonfinite" / f"step-{number:08d}"
    about = json.loads((kept / "about.json").read_text())
    assert [batch["items"] for batch in about["batches"]] == [list(calls[-2].ids), list(calls[-1].ids)]
    assert about["batches"][1]["loss"] == "nan"
    assert ", ".join(calls[-1].ids) in caught.value.what
    stored = load_file(kept / "batch-1.safetensors")
    assert torch.equal(stored["ids_1T"], calls[-1].ids_1T)
    assert torch.equal(stored["tiles_PHWC"], calls[-1].tiles_PHWC)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert run(path, resume=True).status == "done"
    assert_same_run(straight, tmp_path / "run")


def test_an_unreadable_picture_is_listed_once_over_a_stop_and_a_resume(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    bad = tmp_path / "images" / "train-3.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    path = write_recipe(tmp_path, tiny, tmp_path, epochs=3)
    assert run(path, "data.on_bad_sample=skip").status == "done"
    whole = losses(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        run(path, "data.on_bad_sample=skip", fresh=True)
    assert run(path, "data.on_bad_sample=skip", resume=True).status == "done"
    listed = [json.loads(line)["id"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert listed == ["p3"]
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_memory_that_ends_is_told_with_what_to_set(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: RuntimeError
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=1)
    real, calls = steps.accumulate, []

    def accumulate(*values: Any) -> Any:
        calls.append(1)
        if len(calls) >= at:  # also with less in a pack
            raise error
        return real(*values)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "accumulate", accumulate)
        with pytest.raises(UserError, match="memory is not enough") as caught:
            run(path)
    assert "data.max_tiles" in caught.value.fix
    assert ("train.pack_tokens: 1" in caught.value.fix) != isinstance(error, torch.OutOfMemoryError)
    if at == 1:
        assert not (tmp_path / "run").exists()  # nothing was made: the corrected recipe starts without a flag
    else:
        newest = newest_checkpoint(tmp_path / "run")
        assert newest is not None
        assert newest.name == "step-00000002"
        assert len([entry for entry in read_metrics(tmp_path / "run") if "loss" in entry]) == 2


@pytest.mark.parametrize("at", [1, 4])
def test_a_step_that_found_no_memory_is_made_again_in_smaller_packs_then_recomputed(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The ladder ends where it fits, says each rung, and the run's losses are those of a run with memory to spare."""
    path = write_recipe(tmp_path, tiny, plates, epochs=3)  # no save beside a step, whose end would be waited for first
    spare = tmp_path / "spare"
    run(path, "lora.dropout=0", f"out={spare}")
    real, calls, packs, recomputed = steps.accumulate, [], [], []

    def accumulate(network: Any, batches: Any, compute: Any, targets: int, *more: Any) -> Any:
        calls.append(1)
        if at <= len(calls) and not compute.walk.recompute:
            packs.append(max(len(batch.ids) for batch in batches))
            raise torch.OutOfMemoryError("CUDA out of memory")
        recomputed.append(compute.walk.recompute)
        return real(network, batches, compute, targets, *more)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(steps, "accumulate", accumulate)
        recipe = load_recipe(path, TrainRecipe, ["lora.dropout=0"])
        done = run_loop.train(recipe, "r", resume=False, fresh=False, dry_run=False, tell=said.append)
    assert done.status == "done"
    assert packs == [2, 1]
    assert [text for text in said if "memory ended" in text][-1].endswith("activations recomputed")
    assert recomputed.count(True) == len(losses(spare)) - at + 1
    assert losses(tmp_path / "run") == pytest.approx(losses(spare), rel=1e-5)


def test_a_process_without_memory_asks_nobody_who_waits_for_it_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where passes need all processes, the others wait in the middle of one: an answer would never come."""

    def accumulate(*values: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "accumulate", accumulate)
    monkeypatch.setattr(steps, "sum_values", lambda *values: pytest.fail("asked"))
    parts = {name: SimpleNamespace() for name in ("world", "network", "compute", "spare", "job")}
    loop: Any = SimpleNamespace(**parts, saver=SimpleNamespace(busy=False), strategy=SimpleNamespace(uniform=True))
    with pytest.raises(torch.OutOfMemoryError):
        steps._gradients(loop, [], 1, [])


@pytest.fixture(scope="module")
def straight_pair(tmp_path_factory: pytest.TempPathFactory, tiny: Path, plates: Path) -> Path:
    """The folder of a run by two processes that torchrun started, dropout on, every step saved: 4 items a step, 6 steps."""
    folder = tmp_path_factory.mktemp("pair")
    path = write_recipe(folder, tiny, plates, epochs=3, save_steps=1, save_total_limit=-1, batch_size=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "intervale", "train"]
    command = [*launch, str(path), "--set", "parallel.strategy=ddp", "--set", "data.workers=0", "--set", "parallel.processes=2"]
    subprocess.run(command, check=True, env=os.environ | {"INTERVALE_DEVICE": "cpu"}, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("at", [2, 3], ids=["at an epoch's edge", "mid-epoch"])
def test_two_processes_resume_to_their_straight_run(tmp_path: Path, straight_pair: Path, at: int, workers: int) -> None:
    """Both died in the middle of step `at` + 1; the command that starts its own processes goes on with what torchrun's left."""
    shutil.copytree(straight_pair / "run", tmp_path / "run")
    for number in range(at + 1, 7):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{number:08d}")
    (tmp_path / "run" / "run.json").write_text(json.dumps(json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "running"}))
    settings = ["parallel.strategy=ddp", "parallel.processes=2", f"data.workers={workers}", f"out={tmp_path / 'run'}"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "intervale", "train", str(straight_pair / "r.yaml"), *words, "--resume"]
    subprocess.run(command, check=True, env=os.environ | {"INTERVALE_DEVICE": "cpu"}, capture_output=True, timeout=200)
    assert_same_run(straight_pair / "run", tmp_path / "run")


@pytest.mark.slow
def test_another_number_of_processes_is_refused_whoever_starts_them(tmp_path: Path, straight_pair: Path) -> None:
    """A step of one process has half the items: going on at the same step's number would leave items out."""
    shutil.copytree(straight_pair / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / LAST)
    (tmp_path / "run" / "run.json").write_text(json.dumps(json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "running"}))
    with pytest.raises(UserError, match=r"not the run that was started: processes: 2 -> 1\n"):
        run(straight_pair / "r.yaml", "parallel.strategy=ddp", f"out={tmp_path / 'run'}", resume=True)


def test_what_another_process_could_not_read_counts_too(tmp_path: Path) -> None:
    """Each lists what it meets; an item that both meet in their turns is listed once, and the limit is of all."""
    data = SimpleNamespace(on_bad_sample="skip")
    job = SimpleNamespace(folder=tmp_path, recipe=SimpleNamespace(data=data), train=range(100))
    one, two = (SimpleNamespace(job=job, world=SimpleNamespace(size=2), skipped=set()) for _ in range(2))
    steps._list_bad(one, [("a", PictureError("a is cut short", ""))])  # type: ignore[arg-type]
    steps._list_bad(two, [("a", PictureError("a is cut short", ""))])  # type: ignore[arg-type]
    assert already_skipped(tmp_path) == {"a"}
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1
    with pytest.raises(UserError, match=r"2 of 100 items cannot be read, .*; the last: b is cut short"):
        steps._list_bad(two, [("b", PictureError("b is cut short", ""))])  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["in the step", "in its evaluation"])
@pytest.mark.parametrize("at", [2, 6], ids=["mid-run", "the last step"])
def test_a_stop_does_not_wait_for_an_evaluation_which_is_made_when_the_run_goes_on(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, at: int, where: str
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, eval_steps=2, save_steps=100)
    run(path, f"out={tmp_path / 'straight'}")
    passes: list[int] = []
    real = held_out.load_item

    def load(record: Any, *given: Any) -> Any:
        passes.append(1)
        if where == "in its evaluation" and len(passes) == 4 * (at // 2 - 1) + 1:  # the first held-out item of step `at`
            signal.raise_signal(signal.SIGTERM)
        return real(record, *given)

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "load_item", load)
        if where == "in the step":
            stop_after(patch, at, lambda: signal.raise_signal(signal.SIGTERM))
        outcome = run(path)
    assert (outcome.status, outcome.step, outcome.exit_code) == ("stopped", at, 143)
    assert len(passes) <= 4 * (at // 2 - 1) + 2  # of the step's four, no more than the micro-batch that was begun
    assert not [entry for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry and entry["step"] == at]
    assert run(path, resume=True).status == "done"
    told = [
        [{k: e[k] for k in ("step", "eval_loss")} for e in read_metrics(folder) if "eval_loss" in e]
        for folder in (tmp_path / "run", tmp_path / "straight")
    ]
    assert told[0] == told[1]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    bests = [json.loads((folder / "run.json").read_text())["best"] for folder in (tmp_path / "run", tmp_path / "straight")]
    assert bests[0] == bests[1]


def test_a_held_out_picture_that_does_not_decode_costs_no_step(tmp_path: Path, tiny: Path) -> None:
    draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    picture = tmp_path / "images" / "eval-1.png"
    Image.open(picture).save(picture, "JPEG")  # whose header alone is read before the run
    path = write_recipe(tmp_path, tiny, tmp_path, epochs=3, eval_steps=4, save_steps=100)
    run(path, f"out={tmp_path / 'straight'}")
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-100])
    with pytest.raises(PictureError, match=r"eval\.jsonl:2.*damaged"):
        run(path)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    picture.write_bytes(whole)
    assert run(path, resume=True).status == "done"
    assert_same_run(tmp_path / "straight", tmp_path / "run")
