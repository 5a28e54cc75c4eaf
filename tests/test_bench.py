"""The training benchmark compares the same mathematics: both sides start from the same loss, on the same items in the same order."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import intervale

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
def test_the_benchmark_trains_stock_and_ours_on_the_same_mathematics(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    words = ["--preset", "tiny", "--device", "cpu", "--steps", "3", "--tiles", "1", "--dropout", "0", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(intervale.__file__).parents[1])}
    command = [sys.executable, str(BENCH / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {row["variant"]: row for row in told["variants"]}
    ours, stock = rows["ours"], rows["stock"]
    assert ours["order"] is not None, "the trainer takes its items in an order the benchmark does not know"
    assert all(math.isfinite(loss) for loss in ours["losses"] + stock["losses"])
    assert len(ours["losses"]) == len(stock["losses"]) == 4
    assert abs(ours["losses"][0] - stock["losses"][0]) < 1e-4
    # The gradients of LoRA's B at the first step depend on its A: the fresh matrices are the same too.
    assert ours["first_gradient_norm"] == pytest.approx(stock["first_gradient_norm"], rel=1e-4)
    assert json.loads(out.read_text())["ratios"] == told["ratios"]


@pytest.mark.slow
def test_the_benchmark_of_evaluate_asks_the_same_every_way(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    words = ["--preset", "tiny", "--device", "cpu", "--tiles", "5", "--pictures", "2", "--new", "6", "--rounds", "1", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(intervale.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(BENCH / "evaluate.py"), *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told == json.loads(out.read_text())
    assert told["tiles"] == 5
    assert told["score"]["difference"] < 1e-5
    assert (told["answer"]["differ"], told["evaluate"]["differ"], told["evaluate"]["of"]) == (0, 0, 8)
    assert set(told["score"]["shared_faster_than"]) == {"separate", "batched"}
    assert {"device", "versions", "precision", "threads"} <= set(told)


def _job(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(intervale.__file__).parents[1])}
    sizes = ["--preset", "tiny", "--device", "cpu", "--items", "8", "--size", "400x300", "--workers", "0", "--epochs", "2"]
    command = [sys.executable, str(BENCH / "job.py"), *sizes, "--work", str(tmp_path), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_benchmark_of_the_job_accounts_for_every_second_of_the_training(tmp_path: Path) -> None:
    done = _job(tmp_path, "--out", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told == json.loads((tmp_path / "results.json").read_text())
    assert set(told["seconds"]) == {"prepare", "train", "export"}
    assert list(told["training_seconds"]) == ["start", "load", "ready to step 1", "steps", "between", "save"]
    assert min(told["training_seconds"].values()) > -0.1, "a stage ends before it begins"
    assert sum(told["training_seconds"].values()) == pytest.approx(told["seconds"]["train"], abs=0.05)  # of six rounded numbers
    assert (told["training"]["steps"], told["training"]["samples"]) == (2, 16)
    assert told["training"]["peak_gib"] > 0
    assert {"device", "threads", "versions"} <= set(told)
    assert not list(tmp_path.glob("job-*")), "the job's files are left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--set", "data.train=/nowhere.jsonl"], "exit code 1\nerror: /nowhere.jsonl: cannot be read"),
        (["--epochs", "100000", "--budget", "5"], "not done after"),
    ],
    ids=["a fault", "its time is over"],
)
def test_a_training_that_does_not_end_well_ends_the_benchmark_of_the_job(tmp_path: Path, words: list[str], why: str) -> None:
    done = _job(tmp_path, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"training failed: {why}" in done.stderr
    assert "export " not in done.stdout
    assert str(tmp_path) not in _commands(), "the training goes on"


@pytest.mark.slow
def test_a_device_that_is_not_there_ends_the_benchmark_of_the_job_before_it_begins(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = _job(tmp_path, "--device", "cuda")
    assert done.returncode == 1
    assert "torch.cuda.get_device_name" in done.stderr
    assert "[prepare" not in done.stdout


def _parallel(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(intervale.__file__).parents[1])}
    sizes = ["--preset", "tiny", "--device", "cpu", "--tiles", "1", "--items", "8", "--warmup", "1"]
    command = [sys.executable, str(BENCH / "train_parallel.py"), *sizes, "--work", str(tmp_path), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_benchmark_of_several_processes_counts_steps_from_line_to_line(tmp_path: Path) -> None:
    done = _parallel(tmp_path, "--ways", "single", "ddp", "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    single, two = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert (single["samples_a_step"], two["samples_a_step"]) == (8, 16)
    for row in (single, two):
        assert len(row["losses"]) == 4
        assert row["inside_s"] < row["step_s"] + 0.01 <= row["step_s_most"] + 0.01
        assert row["samples_s"] == pytest.approx(row["samples_a_step"] / row["step_s"], rel=0.01)


@pytest.mark.slow
def test_a_way_that_takes_too_long_shows_where_every_thread_stands(tmp_path: Path) -> None:
    done = _parallel(tmp_path, "--ways", "ddp", "--steps", "100000", "--limit", "15")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert row["error"] == "not done after 15 s"
    assert "Fatal Python error: Aborted" in "\n".join(row["log"])
    assert str(tmp_path) not in _commands(), "the way goes on"


def test_steps_are_told_from_one_line_to_the_next_behind_the_warmup() -> None:
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); from train_parallel import between; print(between([1, 5, 6, 8, 11], 2))"
    environment = os.environ | {"PYTHONPATH": str(Path(intervale.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[1, 2, 3]"


def _commands() -> str:
    """The command lines of all processes (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)
