"""An engine of another environment: started, watched, started again; its command and prompt are the official ones."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from intervale.core.errors import OutsideError, UserError
from intervale.engine.api import ChatTurn, EngineError, Request
from intervale.engine.launch import LAUNCHER, Launched, Options, Plan, find_python, lmdeploy_plan, lmdeploy_prompt, vllm_plan
from intervale.model.load import text_side

FAKE = Path(__file__).with_name("fake_engine.py")


def fake(*more: str) -> Launched:
    def plan(port: int, key: str, room: Path) -> Plan:
        return Plan((sys.executable, str(FAKE), str(port), *more), {"FAKE_KEY": key}, "a fake")

    return Launched(plan, "fake", pause=0.05, look=0.2)


@pytest.fixture
def desk() -> Iterator[Launched]:
    desk = fake()
    desk.wait_ready(30)
    yield desk
    desk.close()


def ask(desk: Launched, text: str) -> str:
    async def run() -> str:
        return "".join([piece.text async for piece in desk.answer(Request((ChatTurn("user", (text,)),)))])

    return asyncio.run(run())


def until_ready_again(desk: Launched, old: str) -> str:
    for _ in range(200):
        try:
            if (now := ask(desk, "hi")) != old:
                return now
        except EngineError:
            pass
        time.sleep(0.05)
    raise AssertionError("it was not started again")


def test_it_answers_and_is_gone_when_it_is_closed(desk: Launched) -> None:
    pid = int(ask(desk, "hi"))
    assert desk.fault() == ""
    folder = desk.log.parent
    desk.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert desk.fault() == "the engine has stopped"
    assert not folder.exists()
    with pytest.raises(EngineError, match="stopped"):
        ask(desk, "hi")


def test_killed_in_the_middle_of_an_answer_it_says_so_and_the_next_request_works_after_the_restart(desk: Launched) -> None:
    old = ask(desk, "hi")
    with pytest.raises(EngineError) as broken:
        ask(desk, "die")
    assert broken.value.code == "engine_interrupted"
    assert until_ready_again(desk, old) != old


def test_a_gateway_in_front_gives_an_error_event_then_503_then_answers(desk: Launched) -> None:
    import httpx
    from serve_fixture import asking, running

    from intervale.serve.app import create_app

    with running(create_app(desk)) as url:

        def post(text: str, stream: bool) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat/completions", json={"model": "fake", "messages": asking(text), "stream": stream}, timeout=30)

        old = post("hi", False).json()["choices"][0]["message"]["content"]
        lines = [line for line in post("die", True).text.split("\n\n") if line]
        assert '"engine_interrupted"' in lines[-1]
        assert old in lines[1]
        seen = set()
        for _ in range(200):
            got = post("hi", False)
            seen.add(got.status_code)
            if got.status_code == 200:
                break
            assert got.json()["error"]["code"] in ("engine_unavailable", "engine_interrupted")
            time.sleep(0.05)
        assert 200 in seen
        assert httpx.get(f"{url}/health").status_code == 200


def test_one_that_never_starts_is_told_with_the_end_of_its_log() -> None:
    desk = fake("broken")
    with pytest.raises(OutsideError, match="no graphics card here"):
        desk.wait_ready(30)


def test_the_command_names_its_backend_and_reason_and_hides_the_key(tiny: Path, tmp_path: Path) -> None:
    plan = lmdeploy_plan("py", tiny, "mine", 1234, "secret", Options(tensor_parallel=2), tmp_path)
    words = dict(zip(plan.command[5::2], plan.command[6::2], strict=True))
    assert plan.command[:5] == ("py", str(LAUNCHER), "serve", "api_server", str(tiny))
    assert (words["--backend"], words["--server-name"], words["--tp"], words["--session-len"]) == ("turbomind", "127.0.0.1", "2", "2048")
    assert "TurboMind has InternLM2ForCausalLM" in plan.why
    assert "secret" not in " ".join(plan.command) + repr(plan)
    assert (plan.environment["OMP_NUM_THREADS"], plan.environment["INTERVALE_ENGINE_KEY"]) == ("1", "secret")
    with pytest.raises(UserError, match="only with remote code"):
        vllm_plan("py", tiny, "mine", 1, "k", Options(), tmp_path)
    raw = json.loads((tiny / "config.json").read_text())
    raw["llm_config"]["architectures"] = ["Phi3ForCausalLM"]
    phi = tmp_path / "phi"
    phi.mkdir()
    for path in tiny.iterdir():
        (phi / path.name).symlink_to(path)
    (phi / "config.json").unlink()
    (phi / "config.json").write_text(json.dumps(raw))
    told = lmdeploy_plan("py", phi, "mine", 1, "k", Options(), tmp_path)
    assert "pytorch" in told.command
    assert "TurboMind lacks Phi3ForCausalLM" in told.why


def test_lmdeploys_prompt_is_the_official_one(tiny: Path) -> None:
    from intervale.data.prompt import Turn, pieces_of

    side = text_side(tiny)
    form = lmdeploy_prompt(side.template, side)
    rendered = form["system"] + form["meta_instruction"] + form["eosys"] + form["user"] + "hi" + form["eoh"] + form["assistant"]
    official = "".join(piece.text for piece in pieces_of([Turn("user", ("hi",))], side.template, bos=False, answer_next=True))
    assert rendered == official
    assert form["stop_words"] == list(side.template.stop)


def test_an_environment_without_the_engine_gets_the_commands_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no lmdeploy") as missing:
        find_python("lmdeploy", None)
    assert "pip install lmdeploy" in missing.value.fix
    with pytest.raises(UserError, match="vllm is not installed there"):
        find_python("vllm", sys.executable)
    assert find_python("pip", sys.executable) == sys.executable


def test_the_launcher_registers_official_folders_also_in_spawned_processes_and_ends_with_its_parent(tiny: Path, tmp_path: Path) -> None:
    package = tmp_path / "lmdeploy"
    for folder in ("", "cli", "vl"):
        (package / folder).mkdir(exist_ok=True)
        (package / folder / "__init__.py").write_text("")
    (package / "vl" / "engine.py").write_text(
        "from concurrent.futures import ThreadPoolExecutor\nclass ImageEncoder:\n"
        "    def __init__(self, path):\n        self.path, self.executor = path, ThreadPoolExecutor(max_workers=1)\n"
    )
    (package / "tokenizer.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass DetokenizeState:\n    ids_offset: int = 0\n    prev_tokens: list = None\n"
        "class HuggingFaceTokenizer:\n    def detokenize_incrementally(self, all_input_ids, state):\n        return ''\n"
    )
    (package / "cli" / "utils.py").write_text("class ArgumentHelper:\n    def disable_metrics(parser): ...\n")
    (package / "cli" / "__init__.py").write_text(
        "import multiprocessing, os, sys, time\nfrom transformers import AutoConfig\nfrom lmdeploy.vl.engine import ImageEncoder\n"
        "def look(folder):\n"
        "    c = AutoConfig.from_pretrained(folder)\n"
        "    print(type(c).__name__, c.llm_config.hidden_size, c.vision_config.num_hidden_layers, c.max_dynamic_patch, flush=True)\n"
        "def run():\n"
        "    look(sys.argv[3])\n"
        "    print(ImageEncoder('x').executor._max_workers, sys.argv[-3:], 'INTERVALE_ENGINE_KEY' in os.environ, flush=True)\n"
        "    process = multiprocessing.get_context('spawn').Process(target=look, args=[sys.argv[3]])\n"
        "    process.start()\n"
        "    process.join()\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PYTHONSAFEPATH": "1",  # a script's folder is not where modules come from
        "INTERVALE_ENGINE": "1",
        "INTERVALE_ENGINE_KEY": "k",
        "INTERVALE_TILING_THREADS": "3",
    }
    command = [sys.executable, str(LAUNCHER), "serve", "api_server", str(tiny), "--backend", "turbomind"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdin is not None
    said = [process.stdout.readline().strip() for _ in range(7)]
    assert [line.split("'")[1] for line in said[:3]] == ["gate", "fingerprints", "pace"]  # this stand-in has nothing of TurboMind
    assert all("built otherwise" in line for line in said[:3])
    assert said[3:] == [
        "intervale: changes to LMDeploy: detokenizer, metrics",
        "Chat 64 2 4",
        "3 ['--disable-metrics', '--api-keys', 'k'] False",
        "Chat 64 2 4",
    ]
    process.stdin.close()
    assert process.wait(10) == 0
