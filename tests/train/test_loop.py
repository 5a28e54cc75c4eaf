"""`intervale train` end to end on a tiny model: it learns, leaves its traces, stops, resumes, and refuses what cannot work."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from conftest import draw_plates
from intervale.core.config import load_recipe
from intervale.core.errors import UserError
from intervale.core.lang import in_language
from intervale.core.runlog import read_metrics
from intervale.model.adapt import newest_checkpoint
from intervale.train import loop
from intervale.train.loop import Outcome, train
from intervale.train.prepare import Cost, of_each
from intervale.train.recipe import TrainRecipe
from intervale.train.state import choose_checkpoint

FULL = ["train.vision=full", "train.llm=full"]


def write_recipe(folder: Path, model: Path, data: Path, **more: object) -> Path:
    lines = [
        f"model: {model}",
        f"out: {folder / 'run'}",
        f"data: {{train: {data / 'train.jsonl'}, eval: {data / 'eval.jsonl'}, max_length: 600}}",
    ]
    lines.append("lora: {rank: 4, alpha: 8, dropout: 0.1}")
    settings = {"epochs": 2, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3, "precision": "fp32"} | more
    lines.append("train: " + json.dumps(settings))
    (folder / "r.yaml").write_text("\n".join(lines))
    return folder / "r.yaml"


def run(
    path: Path, *overrides: str, resume: bool = False, fresh: bool = False, dry_run: bool = False, said: list[str] | None = None
) -> Outcome:
    recipe = load_recipe(path, TrainRecipe, overrides)
    return train(recipe, path.stem, resume=resume, fresh=fresh, dry_run=dry_run, tell=(said if said is not None else []).append)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


def test_a_run_learns_and_leaves_its_traces(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=12, eval_steps=6)
    outcome = run(path, *FULL, "train.learning_rate=3e-3")
    folder = tmp_path / "run"
    assert (outcome.status, outcome.step) == ("done", 24)
    found = losses(folder)
    assert len(found) == 24
    assert found[-1] < 0.5 * found[0]
    held = [entry for entry in read_metrics(folder) if "eval_loss" in entry]
    assert [entry["step"] for entry in held] == [6, 12, 18, 24]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((folder / "run.json").read_text())
    assert (state["status"], state["train"]["items"]) == ("done", 8)
    said: list[str] = []
    assert run(path, *FULL, "train.learning_rate=3e-3", said=said).status == "done"
    assert "complete already" in said[-1]


def test_the_commands_at_the_end_of_a_run_name_folders_of_its_own(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=1)
    told = []
    for name in ("one", "an other"):
        said: list[str] = []
        run(path, f"out={tmp_path / name}", said=said)
        told.append([shlex.split(line) for line in said[-1].splitlines() + said if line.startswith("  intervale")])
    outs = [{words[words.index("--out") + 1] for words in lines if "--out" in words} for lines in told]
    assert outs == [{str(tmp_path / f"{name}-{side}") for side in ("before", "after")} for name in ("one", "an other")]
    assert all(["intervale", "compare", *sorted(own, reverse=True)] in lines for own, lines in zip(outs, told, strict=True))


def test_resumed_is_the_straight_run_bit_by_bit(tmp_path: Path, tiny: Path, plates: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    straight = write_recipe(tmp_path / "a", tiny, plates, epochs=3)
    run(straight)
    parts = write_recipe(tmp_path / "b", tiny, plates, epochs=3, save_steps=3)
    run(parts)
    folder = tmp_path / "b" / "run"
    shutil.rmtree(folder / "checkpoints" / "step-00000006")  # as if it had died after step 5, saved at 3
    state = json.loads((folder / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(state))
    said: list[str] = []
    run(parts, resume=True, said=said)
    assert any("step 3" in line for line in said)
    assert losses(tmp_path / "a" / "run") == losses(folder)
    from safetensors.torch import load_file

    for file in ("adapter_model.safetensors", "trained.safetensors", "optimizer.safetensors"):
        one, two = (load_file(tmp_path / name / "run" / "checkpoints" / "step-00000006" / file) for name in ("a", "b"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_skips_a_damaged_checkpoint_and_says_so(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=2)
    run(path)
    folder = tmp_path / "run"
    newest = newest_checkpoint(folder)
    assert newest is not None
    data = bytearray((newest / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "adapter_model.safetensors").write_bytes(data)
    chosen, skipped = choose_checkpoint(folder)
    assert chosen is not None
    assert chosen.name == "step-00000002"
    assert skipped == [f"{newest.name}: adapter_model.safetensors is damaged"]


def test_a_changed_recipe_or_data_is_not_resumed(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    run(path)
    (tmp_path / "run" / "run.json").write_text('{"status": "stopped"}')
    with pytest.raises(UserError, match=r"recipe\.train\.learning_rate: 0\.001 -> 0\.5"):
        run(path, "train.learning_rate=0.5", resume=True)
    with pytest.raises(UserError, match="not finished"):
        run(path)
    run(path, fresh=True)
    assert (tmp_path / "run.old-1" / "metrics.jsonl").exists()


def test_a_finished_run_of_another_recipe_is_not_called_complete(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    run(path)
    assert run(path, "data.workers=0", "train.save_steps=7").status == "done"
    with pytest.raises(UserError, match=r"recipe\.train\.seed: 42 -> 7"):
        run(path, "train.seed=7")


def test_a_damaged_last_checkpoint_is_made_again(tmp_path: Path, tiny: Path, plates: Path) -> None:
    from intervale.model.adapt import verify_checkpoint

    path = write_recipe(tmp_path, tiny, plates, save_steps=2)
    run(path)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    whole = (newest / "trained.safetensors").read_bytes()
    (newest / "trained.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 2]))
    state = json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "running"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    run(path, resume=True)
    assert verify_checkpoint(newest) == ""
    assert (newest / "trained.safetensors").read_bytes() == whole


def test_resume_without_a_run_is_refused(tmp_path: Path, tiny: Path, plates: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        run(write_recipe(tmp_path, tiny, plates), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_how_to_prove_it(tmp_path: Path, tiny: Path, plates: Path) -> None:
    said: list[str] = []
    run(write_recipe(tmp_path, tiny, plates), "data.max_tiles=2", said=said)
    assert [line.split()[1:3] for line in said if "intervale evaluate" in line] == [
        ["evaluate", str(tiny)],
        ["evaluate", str(tmp_path / "run")],
    ]
    assert all("--max-tiles 2" in line for line in said if "intervale evaluate" in line)


def test_a_folder_has_one_writer(tmp_path: Path, tiny: Path, plates: Path) -> None:
    from intervale.core.files import locked

    path = write_recipe(tmp_path, tiny, plates)
    with locked(tmp_path / "run"), pytest.raises(UserError, match="written by another process"):
        run(path)
    assert run(path).status == "done"
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_may_have_any_name(tmp_path: Path, tiny: Path, plates: Path) -> None:
    folder = tmp_path / "run $a^$ 菜"
    assert run(write_recipe(tmp_path, tiny, plates), f"out={folder}").status == "done"
    assert (folder / "loss.png").exists()


def test_rotation_keeps_the_newest_and_minus_one_keeps_all(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=1)
    for limit, count in ((2, 2), (-1, 6)):
        run(path, f"train.save_total_limit={limit}", fresh=True)
        names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
        assert (len(names), names[-1]) == (count, "step-00000006")


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path, tiny: Path, plates: Path) -> None:
    said: list[str] = []
    run(write_recipe(tmp_path, tiny, plates, epochs=5), dry_run=True, said=said)
    text = "\n".join(said)
    assert "steps: 10" in text
    for word in ("tokens", "trainable", "memory", "GiB"):
        assert word in text
    assert not (tmp_path / "run").exists()


def test_the_tokens_of_a_run_are_those_of_its_steps(tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 epochs that end after 3 steps of 2 an epoch; whether compiling pays goes by them too, and by what a resumed run has left."""
    path = write_recipe(tmp_path, tiny, plates, epochs=20, save_steps=1)
    said: list[str] = []
    run(path, dry_run=True, said=said)
    run(path, "train.max_steps=3", dry_run=True, said=said)
    whole, cut = (
        (int(tokens.replace(",", "")), epochs)
        for tokens, epochs in re.findall(r"^tokens: ([\d,]+) in ([\d.]+) epochs", "\n".join(said), re.M)
    )
    assert (whole[1], cut[1]) == ("20", "1.5")
    assert cut[0] == pytest.approx(whole[0] * 1.5 / 20, abs=1)
    asked: list[int] = []
    monkeypatch.setattr(loop, "worth_compiling", lambda *given: bool(asked.append(given[-1])))
    run(path, "train.max_steps=3")
    assert asked == [cut[0]]


def test_dry_run_counts_the_processes_that_the_recipe_starts(tmp_path: Path, tiny: Path, plates: Path) -> None:
    said: list[str] = []
    run(write_recipe(tmp_path, tiny, plates), "parallel.strategy=ddp", "parallel.processes=2", dry_run=True, said=said)
    assert "steps: 2" in said  # 8 items, 2 x 2 x 2 a step, 2 epochs
    assert any(line.startswith("memory, estimated for each of 2 processes (ddp): ") for line in said)


def test_dry_run_tells_what_one_of_several_processes_holds(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned whole language model on four processes: gradient (4 bytes), moments (8), DeepSpeed's copy (4), in parts as the engine has them.
    ZeRO-2 has a small gradient whole, and sends it once a step."""
    seen: list[Cost] = []
    monkeypatch.setattr(loop, "of_each", lambda *given: seen.extend((given[0], of_each(*given))) or seen[-1])
    path = write_recipe(tmp_path, tiny, plates)
    run(path, "train.llm=full", "parallel.processes=4", "parallel.strategy=fsdp", dry_run=True)
    whole, shown = seen
    assert 0 < whole.layers < whole.weights
    small, large = whole.trainable, (2 << 30) // 4 + 1
    for strategy, stage, layers, bytes_a_weight, trainable in (
        ("ddp", 2, 1.0, 12.0, small),
        ("fsdp", 2, 1 / 4, 12 / 4, small),
        ("deepspeed", 1, 1.0, 4 + 12 / 4, small),
        ("deepspeed", 2, 1.0, 4 + 12 / 4, small),
        ("deepspeed", 2, 1.0, 16 / 4, large),
        ("deepspeed", 1, 1.0, 4 + 12 / 4, large),
        ("deepspeed", 3, 1 / 4, 16 / 4, small),
    ):
        whole = replace(whole, trainable=trainable)
        recipe = load_recipe(path, TrainRecipe, [f"parallel.strategy={strategy}", f"parallel.zero_stage={stage}"])
        part = of_each(whole, recipe, 4)
        assert part.weights == pytest.approx(whole.weights - whole.layers * (1 - layers), abs=1)
        assert part.optimizer == pytest.approx(whole.trainable * bytes_a_weight, abs=1)
        assert (part.kept, part.checkpoint) == (whole.kept, whole.checkpoint)
        assert (part == shown) == (strategy == "fsdp")
        assert of_each(whole, recipe, 1) == whole


@pytest.mark.parametrize("index", ["off", "on"])
def test_a_mix_is_counted_as_its_epochs_show_it(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "cache"))
    path = write_recipe(tmp_path, tiny, plates)
    once: list[str] = []
    run(path, dry_run=True, said=once)
    tokens, targets = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) tokens \(([\d,]+)", once[0])[0])
    said: list[str] = []
    mix = f"[{{path: {plates}/train.jsonl, weight: 2}}, {{path: {plates}/eval.jsonl, weight: 0.5}}]"
    run(path, f"data.train={mix}", f"data.index={index}", dry_run=True, said=said)
    told = next(line for line in said if "an epoch;" in line)
    shown = re.findall(r"([\d,]+) items \(([\d,]+) an epoch\), (?:about )?([\d,]+) tokens \(([\d,]+)", told)[0]
    items, epoch, more, aims = (int(found.replace(",", "")) for found in shown)
    assert (items, epoch) == (12, 18)
    assert 2 * tokens < more < 2 * tokens + tokens / 2
    assert 2 * targets < aims < 2 * targets + targets / 2


def test_a_chinese_reader_gets_the_plan_and_the_progress_in_chinese(tmp_path: Path, tiny: Path, plates: Path) -> None:
    said: list[str] = []
    path = write_recipe(tmp_path, tiny, plates, epochs=1)
    with in_language("zh"):
        run(path, dry_run=True, said=said)
        run(path, said=said)
    text = "\n".join(said)
    for word in ("步数：2", "参数：", "内存（估计）：", "磁盘：", "图像特征：保存在内存：", "未写入任何内容", "第 1/2 步", "剩余"):
        assert word in text
    for word in ("steps", "parameters", "memory", "kept", "features:", "loss ", "tokens"):
        assert word not in text


def test_a_full_disk_during_a_save_keeps_the_earlier_checkpoint(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=2, save_steps=2)
    from intervale.train import state

    real, calls = state.save_file, []

    def full(tensors: object, target: Path, **options: object) -> None:
        calls.append(target)
        if len(calls) == 2:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, target, **options)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        run(path)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert run(path, resume=True).status == "done"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["data.max_length=40"], r"train\.jsonl:1.*tokens long.*max_length is 40|items cannot be trained on"),
        (["data.train=/nowhere.jsonl"], "cannot be read"),
        (["model=/nowhere"], "no such folder"),
        (["lora.targets=llm+haed"], "haed"),
        (["data.min_tiles=3", "data.max_tiles=2"], "tiles"),
        (["train.vision=full", "train.features=cache"], "not frozen"),
        (["train.seed=5000000000"], "train.seed"),
        (["lora.targets=vision"], "names neither llm nor head"),
        (["lora.targets=llm+vision"], "set train.vision to lora"),
        (["data.max_tiles=3000"], "limit of 128"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, tiny: Path, plates: Path, overrides: list[str], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        run(write_recipe(tmp_path, tiny, plates), *overrides)
    assert not (tmp_path / "run").exists()


def test_an_unreadable_picture_stops_or_is_listed_but_never_replaced(tmp_path: Path, tiny: Path) -> None:
    draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    bad = tmp_path / "images" / "train-3.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    path = write_recipe(tmp_path, tiny, tmp_path)
    with pytest.raises(UserError, match=r"train\.jsonl:4.*train-3\.png.*damaged"):
        run(path)
    assert not (tmp_path / "run").exists()  # so that the corrected run starts without --fresh
    assert not list(tmp_path.glob(".*"))
    assert run(path, "data.on_bad_sample=skip", fresh=True).status == "done"
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["p3"]
    assert sum(entry["samples"] for entry in read_metrics(tmp_path / "run") if "samples" in entry) == 14


def test_too_many_unreadable_pictures_stop_even_a_run_that_may_skip_and_it_says_so(tmp_path: Path, tiny: Path) -> None:
    draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    for number in (3, 5):
        (tmp_path / "images" / f"train-{number}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UserError, match=r"2 of 8 items cannot be read, more than the 1% that data\.on_bad_sample: skip leaves out") as told:
        run(write_recipe(tmp_path, tiny, tmp_path), "data.on_bad_sample=skip")
    assert str(tmp_path / "run" / "skipped.jsonl") in told.value.fix


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=400)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "intervale", "train", str(path)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for _ in range(600):
            if len(read_metrics(tmp_path / "run")) > 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in said
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) == read_metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path, tiny: Path, plates: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = write_recipe(tmp_path / "one", tiny, plates, batch_size=4)
    run(one, "lora.dropout=0.0")
    two = write_recipe(tmp_path / "two", tiny, plates, batch_size=2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "intervale",
        "train",
        str(two),
    ]
    subprocess.run(
        [*command, "--set", "parallel.strategy=ddp", "--set", "lora.dropout=0.0"], check=True, env=os.environ | {"INTERVALE_DEVICE": "cpu"}
    )
    assert losses(tmp_path / "two" / "run") == pytest.approx(losses(tmp_path / "one" / "run"), rel=1e-5)


def test_an_indexed_run_is_the_run_that_reads_everything(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "cache"))
    draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    path = write_recipe(tmp_path, tiny, tmp_path, batch_size=4)
    run(path, f"out={tmp_path / 'read'}")
    said: list[str] = []
    run(path, f"out={tmp_path / 'indexed'}", "data.index=on", said=said)
    assert losses(tmp_path / "read") == losses(tmp_path / "indexed")
    assert any("indexed: 8 items" in line for line in said)
    assert any("about" in line and "tokens" in line for line in said)
    assert json.loads((tmp_path / "read/run.json").read_text())["data"] == json.loads((tmp_path / "indexed/run.json").read_text())["data"]


def test_a_run_learns_from_archives_and_mixes(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_corpus import write_tar

    from intervale.core.records import read_records

    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "cache"))
    records = read_records(draw_plates(tmp_path, 8))
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", records[4 * number : 4 * number + 4])
    path = write_recipe(tmp_path, tiny, tmp_path, batch_size=4)
    run(path, f"out={tmp_path / 'file'}")
    run(path, f"out={tmp_path / 'tar'}", f"data.train={tmp_path}/*.tar")
    assert losses(tmp_path / "file") == losses(tmp_path / "tar")
    mix = f"data.train=[{{path: {tmp_path}/train.jsonl, weight: 2}}, {{path: {tmp_path}/1.tar, weight: 0.5}}]"
    assert run(path, f"out={tmp_path / 'mix'}", mix, "train.epochs=1").step == 3  # 16 + 2 items, 8 a step
    assert sum(entry["samples"] for entry in read_metrics(tmp_path / "mix") if "samples" in entry) == 18


def test_an_item_too_long_that_no_sample_showed_stops_the_run_by_name(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "cache"))
    from intervale.train import measured

    monkeypatch.setattr(measured, "measure_all", lambda records, *more: [measured.Size(100, 10, 1)] * len(records))
    with pytest.raises(UserError, match=r"train\.jsonl:\d.*tokens long.*data\.max_length is 40"):
        run(write_recipe(tmp_path, tiny, plates), "data.max_length=40", "data.index=on", "data.eval=null")


def test_a_fault_of_an_archive_is_told_once_and_sent_to_no_command_that_cannot_read_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few items are in the sample and among the longest."""
    from test_corpus import write_tar

    from intervale.core.records import read_records

    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "cache"))
    records = read_records(draw_plates(tmp_path, 4))
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    for record in records[:2]:
        (tmp_path / record.images[0]).write_bytes(b"no picture")
    path = write_recipe(tmp_path, tiny, tmp_path)
    write_tar(tmp_path / "0.tar", records)
    with pytest.raises(UserError, match=r"^2 items cannot be trained on:") as caught:
        run(path, f"data.train={tmp_path}/0.tar")
    assert len(caught.value.what.splitlines()) == 3
    assert "intervale check" not in caught.value.fix
    with pytest.raises(UserError, match=r"^2 items cannot be trained on:") as caught:
        run(path)
    assert caught.value.fix.endswith("`intervale check` lists them all")


def test_layers_that_cannot_be_compiled_are_told_before_a_run_or_walked_as_they_are(
    tmp_path: Path, tiny: Path, plates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    run(path, f"out={tmp_path / 'plain'}")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CXX", raising=False)
        with pytest.raises(UserError, match=r"train\.compile is on, but this machine has no C\+\+ compiler"):
            run(path, "train.compile=on")
    assert not (tmp_path / "run").exists()

    def broken(part: object) -> object:
        def call(*given: object) -> object:
            raise BackendCompilerFailed(broken, RuntimeError("Python.h: No such file or directory"), None)

        return call

    monkeypatch.setattr("intervale.model.decoder._compiled", broken)
    with pytest.raises(UserError, match=r"cannot be compiled here: .*Python\.h"):
        run(path, "train.compile=on")
    monkeypatch.setattr(loop, "worth_compiling", lambda *given: True)
    said: list[str] = []
    run(path, said=said)
    assert sum("cannot be compiled here" in line for line in said) == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")  # the same dropout too


def test_a_held_out_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates, epochs=3, save_steps=1, eval_steps=1, max_norm=0, warmup_ratio=0)
    with pytest.raises(
        UserError, match=r"step 1: the held-out loss is no number on all of its 4 items; the weights of this step are not saved"
    ):
        run(path, "train.learning_rate=1e30")
    assert newest_checkpoint(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    said: list[str] = []
    recipe = load_recipe(path, TrainRecipe)
    done = train(recipe, "r", resume=True, fresh=False, dry_run=False, tell=said.append, accept_changes=True)
    assert done.status == "done"


def test_a_step_of_nothing_but_unreadable_items_has_no_loss_and_the_epoch_is_the_place_in_the_data(tmp_path: Path, tiny: Path) -> None:
    draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    bad = tmp_path / "images" / "train-3.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    run(write_recipe(tmp_path, tiny, tmp_path, batch_size=1, accumulation=1, epochs=1), "data.on_bad_sample=skip")
    entries = [entry for entry in read_metrics(tmp_path / "run") if "samples" in entry]
    (empty,) = (entry for entry in entries if entry["samples"] == 0)
    assert "loss" not in empty
    assert len(losses(tmp_path / "run")) == 7
    assert min(losses(tmp_path / "run")) > 0
    assert [entry["epoch"] for entry in entries] == [number / 8 for number in range(1, 9)]


def test_an_index_may_come_and_go_between_a_run_and_its_resumption(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVALE_CACHE", str(tmp_path / "cache"))
    file = draw_plates(tmp_path, 8)
    draw_plates(tmp_path, 2, "eval.jsonl", seed=1)
    file.write_text("".join(json.dumps(json.loads(line), sort_keys=True) + "\n" for line in file.read_text().splitlines()))
    path = write_recipe(tmp_path, tiny, tmp_path)
    assert run(path).status == "done"
    assert run(path, "data.index=on").status == "done"
    file.write_text(file.read_text().replace('"p7"', '"p77"'))
    with pytest.raises(UserError, match="data: "):
        run(path, "data.index=on")


def test_fresh_sets_aside_a_run_whose_own_file_is_damaged(tmp_path: Path, tiny: Path, plates: Path) -> None:
    path = write_recipe(tmp_path, tiny, plates)
    run(path, "train.max_steps=1")
    (tmp_path / "run" / "run.json").write_text('{"status": ')
    with pytest.raises(UserError, match=r"run\.json: not valid JSON"):
        run(path, resume=True)
    assert run(path, "train.max_steps=1", fresh=True).status == "done"
    assert (tmp_path / "run.old-1" / "run.json").is_file()
