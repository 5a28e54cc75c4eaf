"""`intervale serve` and `chat --base-url` as a user runs them: an address, an answer, a clean end."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from serve_fixture import asking, data_url, encoded, picture
from test_commands import intervale


@contextmanager
def serving(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it has printed it."""
    command = [sys.executable, "-m", "intervale", "serve", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job hands it on ignored
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
        yield process, found[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_serve_prints_its_address_answers_and_ends_on_ctrl_c(tiny: Path, plates: Path) -> None:
    with serving(tiny, "--port", 0, "--device", "cpu") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert [one.id for one in client.models.list()] == ["tiny"]
        chunks = client.chat.completions.create(
            model="tiny",
            messages=asking("什么?", data_url(encoded(picture()))),
            max_tokens=5,
            stream=True,  # type: ignore[arg-type]
        )
        assert sum(1 for _ in chunks) > 1
        image = next((plates / "images").iterdir())
        talk = intervale("chat", "tiny", "-i", image, "what?", "--base-url", f"{url}/v1", "--max-new-tokens", 5)
        alone = intervale("chat", tiny, "-i", image, "what?", "--max-new-tokens", 5, "--device", "cpu")
        assert (talk.returncode, talk.stdout) == (0, alone.stdout)
        assert "Task was destroyed" not in talk.stderr
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in errors


def test_the_page_names_the_run_and_shows_its_report(tiny: Path, run_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text('<html lang="en"><h1>the report</h1>')
    (tmp_path / "report.zh.html").write_text("<h1>报告</h1>", encoding="utf-8")
    with serving(run_folder, "--base", tiny, "--port", 0, "--device", "cpu", "--report", report) as (process, url):
        page = httpx.get(url)
        assert "intervale" in page.text
        assert str(tmp_path) not in page.text
        assert "the report" in httpx.get(f"{url}/report").text
        assert "报告" in httpx.get(f"{url}/report", headers={"accept-language": "zh-CN"}).text
        with httpx.stream("GET", f"{url}/gradio_api/heartbeat/abc") as tab:  # an open tab does not hold the server up
            assert next(tab.iter_lines()) == "data: ALIVE"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in errors
    with serving(tiny, "--port", 0, "--device", "cpu", "--no-page") as (_, url):
        assert "/v1/chat/completions" in httpx.get(url).text
        assert httpx.get(f"{url}/config").status_code == 404


def test_a_gateway_in_front_of_another_server_passes_everything_on(tiny: Path) -> None:
    with (
        serving(tiny, "--port", 0, "--device", "cpu") as (_, inner),
        serving("tiny", "--engine", "remote", "--base-url", f"{inner}/v1", "--port", 0, INTERVALE_API_KEYS="a-long-enough-key") as (
            _,
            outer,
        ),
    ):
        direct = openai.OpenAI(base_url=f"{inner}/v1", api_key="none")
        through = openai.OpenAI(base_url=f"{outer}/v1", api_key="a-long-enough-key")
        ask = {"model": "tiny", "messages": asking("什么?", data_url(encoded(picture()))), "max_tokens": 12, "temperature": 0}
        one, two = (client.chat.completions.create(**ask) for client in (direct, through))  # type: ignore[call-overload]
        assert one.choices[0].message.content == two.choices[0].message.content
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (two.usage.prompt_tokens, two.usage.completion_tokens)
        with pytest.raises(openai.BadRequestError) as long:
            through.chat.completions.create(**ask | {"messages": asking("x" * 3000)})  # type: ignore[call-overload]
        assert long.value.code == "context_length_exceeded"
        assert httpx.get(f"{outer}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--engine", "remote"], "needs --base-url"),
        (["--base-url", "http://x/v1"], "without --engine remote"),
        (["--report", "/nowhere.html"], "report cannot be read"),
        (["--report", "x.html", "--no-page"], "--report with --no-page"),
        (["--adapter", "MODEL"], "not a training run"),
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--engine", "vllm", "--device", "cpu"], "--device without --engine local"),
        (["--engine", "lmdeploy", "--engine-python", "/nowhere/python"], "not a Python that runs"),
    ],
)
def test_what_does_not_fit_together_is_two_lines(tiny: Path, words: list[str], why: str) -> None:
    done = intervale("serve", tiny, "--port", 0, *(tiny if word == "MODEL" else word for word in words))
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = intervale("serve", "/nowhere", "--port", taken.getsockname()[1])
    assert done.returncode == 1
    assert "in use" in done.stderr


def test_quickstart_can_end_in_serving_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from intervale.cli import quickstart, serve

    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr(quickstart, "_open", lambda *words: {"status": "done"})
    monkeypatch.setattr(quickstart, "_told", lambda *words: [])
    monkeypatch.setattr(serve, "serve", lambda model, report: asked.append((model, report)))
    quickstart.quickstart(tmp_path)
    assert asked == []
    quickstart.quickstart(tmp_path, then_serve=True)
    assert asked == [(str(tmp_path / "run"), tmp_path / "report.html")]
