"""The commands as a user runs them: exit codes, clean JSON on stdout, errors in two lines and no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def intervale(*words: object, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intervale", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, input=given, env=os.environ | environment, check=False)


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["info", "/nowhere"], 1, "no such folder"),
        (["check", "/nowhere.jsonl"], 1, "cannot be read|no such"),
        (["train", "/nowhere.yaml"], 1, "cannot be read"),
        (["convert", "a", "b", "--to", "onnx"], 2, "onnx"),
        (["init", "/tmp/x", "--preset", "smal"], 1, "unknown preset"),
        (["frobnicate"], 2, "No such command"),
        (["chat", "OpenGVLab/InternVL2-2B", "hello"], 3, "hub"),
    ],
)
def test_a_failure_is_two_lines_and_an_exit_code(words: list[str], code: int, why: str) -> None:
    import re

    done = intervale(*words, HF_HUB_OFFLINE="1", HF_HOME="/tmp/intervale-empty-hub")
    assert done.returncode == code
    assert re.search(why, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_messages_come_in_chinese_when_asked(tmp_path: Path) -> None:
    assert "办法" in intervale("train", "/nowhere.yaml", INTERVALE_LANG="zh").stderr
    assert "办法" in intervale("--lang", "zh", "train", "/nowhere.yaml").stderr
    assert intervale("--lang", "de", "train", "/nowhere.yaml").returncode == 2


def test_info_and_doctor_print_one_json_document(tiny: Path) -> None:
    known = json.loads(intervale("info", tiny, "--json").stdout)
    assert (known["format"], known["backbone"], known["template"]) == ("official", "InternLM2ForCausalLM", "internlm2-chat")
    assert (known["tokens_per_tile"], known["parameters"]) == (4, 269312)
    found = json.loads(intervale("doctor", "--json").stdout)
    assert {"python", "torch", "gpu", "disk", "engine lmdeploy"} <= found["facts"].keys()


def test_chat_answers_once_or_goes_on_after_a_bad_picture(tiny: Path, plates: Path, tmp_path: Path) -> None:
    picture = next((plates / "images").iterdir())
    (tmp_path / "bad.png").write_bytes(picture.read_bytes()[:100])
    once = intervale("chat", tiny, "-i", picture, "what?", "--max-new-tokens", 3, "--device", "cpu")
    assert once.returncode == 0
    talk = f"/image {tmp_path / 'bad.png'}\n/image {picture}\nwhat?\nand now?\n/clear\n/exit\n"
    longer = intervale("chat", tiny, "--max-new-tokens", 3, "--device", "cpu", given=talk)
    assert longer.returncode == 0
    assert "bad.png" in longer.stderr
    assert "Traceback" not in longer.stderr
    broken = intervale("chat", tiny, "-i", tmp_path / "bad.png", "what?")
    assert broken.returncode == 1
    assert "damaged" in broken.stderr
