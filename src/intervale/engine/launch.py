"""LMDeploy or vLLM, started by us from their own environment, on a loopback port, and watched.

Promises: answers only when it said it was ready; when it ends or hangs it is started again with growing pauses, and whoever asks
meanwhile gets 'engine_unavailable' (503) at once; closing ends it and everything it started. Which of LMDeploy's engines runs, and why, is told, never
chosen silently. Their environment is theirs: their pins conflict with ours, so nothing of theirs is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from intervale.core.errors import OutsideError, UserError
from intervale.core.files import read_json
from intervale.data.prompt import Template, has_bos, jinja
from intervale.engine.api import Delta, EngineError, Load, Request
from intervale.engine.remote import RemoteEngine
from intervale.model.families import backbone_of, native_backbone
from intervale.model.load import TextSide, text_side
from intervale.model.source import folder_kind

ENGINES = ("lmdeploy", "vllm")
LAUNCHER = Path(__file__).with_name("lmdeploy_launcher.py")
_TURBOMIND = ("InternLM2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Options:
    """How to run it: graphics cards that share the model, the share of their memory, answers at once, and tokens of a conversation."""

    tensor_parallel: int = 1
    memory_share: float = 0.5
    batch: int = 64
    context: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be started, and what to tell about the choice. `environment` is added to ours."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    why: str


def find_python(engine: str, given: str | None) -> str:
    """The Python of an environment that has the engine. Raises: UserError with the commands that make one."""
    make = f"python3 -m venv ~/.{engine} && ~/.{engine}/bin/pip install {engine}"
    again = f"then: --engine-python ~/.{engine}/bin/python"
    if given is None:
        script = shutil.which(engine)
        given = str(Path(script).resolve().with_name("python")) if script else None
        if given is None or not Path(given).exists():
            raise UserError(f"no {engine} on this machine's PATH", f"make an environment of its own: {make}; {again}")
    try:
        code = f"import importlib.metadata as m; print(m.version({engine!r}))"
        asked = subprocess.run([given, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{given}: not a Python that runs", f"make one: {make}; {again}") from error
    if asked.returncode:
        raise UserError(f"{given}: {engine} is not installed there", f"make an environment of its own: {make}; {again}")
    return given


def lmdeploy_plan(python: str, folder: Path, name: str, port: int, key: str, options: Options, room: Path) -> Plan:
    """LMDeploy through our launcher: TurboMind where it has the backbone, else its PyTorch engine. `room`: a folder for the prompt's file."""
    raw = read_json(folder / "config.json")
    official = folder_kind(folder) == "official"
    arch = backbone_of(raw, str(folder))[0] if official else native_backbone(raw, str(folder))
    backend = "turbomind" if arch in _TURBOMIND else "pytorch"
    why = f"LMDeploy's {'TurboMind' if backend == 'turbomind' else 'PyTorch'} engine: TurboMind {'has' if backend == 'turbomind' else 'lacks'} {arch}"
    side = text_side(folder)
    prompt = room / "prompt.json"
    prompt.write_text(json.dumps(lmdeploy_prompt(side.template, side), ensure_ascii=False), encoding="utf-8")
    words = {
        "--model-name": name,
        "--server-name": "127.0.0.1",
        "--server-port": port,
        "--backend": backend,
        "--chat-template": prompt,
        "--tp": options.tensor_parallel,
        "--cache-max-entry-count": options.memory_share,
        "--max-batch-size": options.batch,
        "--session-len": options.context or _context(raw),
    }
    command = (python, str(LAUNCHER), "serve", "api_server", str(folder), *(str(word) for pair in words.items() for word in pair))
    environment = {"INTERVALE_ENGINE": "1", "INTERVALE_ENGINE_KEY": key, "INTERVALE_TILING_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    return Plan(command, environment | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, why)


def vllm_plan(python: str, folder: Path, name: str, port: int, key: str, options: Options, room: Path) -> Plan:
    """vLLM on an hf folder, with the official prompt. Raises: UserError for an official one, which it would load by remote code."""
    if folder_kind(folder) != "hf":
        raise UserError(f"{folder}: vLLM loads the official format only with remote code", f"intervale convert {folder} DST --to hf")
    side = text_side(folder)
    prompt = room / "prompt.jinja"
    prompt.write_text(jinja(side.template, has_bos(side.template, side.tokenizer) and not side.tokenizer.add_bos), encoding="utf-8")
    words = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": name,
        "--chat-template": prompt,
        "--tensor-parallel-size": options.tensor_parallel,
        "--gpu-memory-utilization": options.memory_share,
        "--max-num-seqs": options.batch,
        "--max-model-len": options.context or _context(read_json(folder / "config.json")),
        "--generation-config": folder,
    }
    command = (python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *(str(word) for pair in words.items() for word in pair))
    return Plan(command, {"VLLM_API_KEY": key, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, "vLLM: the hf format, no remote code")


def _context(raw: dict[str, Any]) -> int:
    inner = raw.get("llm_config") or raw.get("text_config") or {}
    return int(inner.get("max_position_embeddings", 8192))


def lmdeploy_prompt(template: Template, side: TextSide) -> dict[str, Any]:
    """Our template in LMDeploy's words: the official prompt, character by character, and its stop tokens."""
    bos = (template.bos or "<s>") if has_bos(template, side.tokenizer) and not side.tokenizer.add_bos else ""
    heads = {role: "".join(template.headers[role]) for role in template.headers}
    close = template.end + template.after
    return {
        "model_name": "base",
        "system": bos + heads["system"],
        "meta_instruction": template.system,
        "eosys": close,
        "user": heads["user"],
        "eoh": close,
        "assistant": heads["assistant"],
        "eoa": close,
        "separator": "",
        "stop_words": list(template.stop),
    }


def free_port() -> int:
    """A loopback port that was free just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Launched:
    """A Desk in front of a process of ours."""

    def __init__(
        self,
        plan: Callable[[int, str, Path], Plan],
        name: str,
        *,
        room: int = 256,
        pause: float = 1.0,
        tries: int = 3,
        look: float = 10.0,
    ) -> None:
        self.models = (name,)
        self._folder = Path(tempfile.mkdtemp(prefix="intervale-engine-"))
        self.log = self._folder / "engine.log"
        port, key = free_port(), secrets.token_hex(24)
        self._url = f"http://127.0.0.1:{port}"
        self.plan = plan(port, key, self._folder)
        self._remote = RemoteEngine(f"{self._url}/v1", self.models, key, room=room, retries=0)
        self._pause, self._tries, self._look = pause, tries, look
        self._stop, self._ready, self._over = threading.Event(), threading.Event(), threading.Event()
        self._state = "the engine is starting"
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="intervale-watch", daemon=True)
        self._thread.start()

    def wait_ready(self, seconds: float = 900.0) -> None:
        """Return when it answers. Raises: OutsideError, with the end of its log, when it does not start."""
        for _ in range(int(seconds * 10)):
            if self._ready.wait(0.1):
                return
            if self._over.is_set():
                break
        said = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-12:]) if self.log.exists() else ""
        self.close()
        raise OutsideError(
            f"the engine did not start:\n{said}", "see its messages above; `intervale serve --engine local` needs no engine of its own"
        )

    def load(self) -> Load:
        """How busy it is."""
        return self._remote.load()

    def fault(self) -> str:
        """'' when it answers, else what it is doing."""
        return "" if self._ready.is_set() else self._state

    async def answer(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer. Raises: EngineError 'engine_unavailable' while it is not ready."""
        if not self._ready.is_set():
            raise EngineError(self._state, "try again in a few seconds", "engine_unavailable", 5)
        async with aclosing(self._remote.answer(request)) as pieces:
            async for piece in pieces:
                yield piece

    def close(self) -> None:
        """End it and everything it started."""
        self._stop.set()
        self._ready.clear()
        self._state = "the engine has stopped"
        self._remote.close()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self) -> None:
        """Start it, look after it, start it again."""
        failures, was_ready = 0, False
        with self.log.open("ab") as log:
            while not self._stop.is_set():
                try:
                    self.process = self._start(log)
                    ready = self._attend(self.process)
                finally:
                    self._ready.clear()
                    if self.process is not None:
                        _end(self.process)
                was_ready = was_ready or ready
                failures = 1 if ready else failures + 1
                if self._stop.is_set() or (not was_ready and failures >= self._tries):
                    break
                self._state = "the engine has failed and is being started again"
                self._stop.wait(min(self._pause * 2 ** (failures - 1), _LONGEST_PAUSE))
        self._state = "the engine has stopped"
        self._over.set()

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = os.environ | dict(self.plan.environment)
        environment.pop("PYTHONPATH", None)  # ours; its environment is its own
        # A session of its own: Ctrl-C is ours to handle, and the whole of it can be ended at once.
        return subprocess.Popen(self.plan.command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _attend(self, process: subprocess.Popen[bytes]) -> bool:
        """Until it ends, hangs or is to stop; whether it was ever ready."""
        misses, ready = 0, False
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while process.poll() is None and not self._stop.is_set():
                if _healthy(client, self._url):
                    misses, ready = 0, True
                    self._ready.set()
                elif ready:
                    misses += 1
                    if misses >= 3:
                        return ready
                if self._wait(process, self._look if ready and not misses else 0.3):
                    break
        return ready

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Wait, but notice an end within a tenth of a second; True when there is nothing more to attend."""
        for _ in range(max(1, int(seconds * 10))):
            if self._stop.wait(0.1) or process.poll() is not None:
                self._ready.clear()
                return True
        return False


def _healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def _end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """End a process and its group: asked first, then made to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
