"""Two replicas behind LMDeploy's own proxy, and us in front: both answer, and the loss of one is survived.

The proxy is the real one, so the test needs a Python that has LMDeploy (no GPU): INTERVALE_LMDEPLOY_PYTHON=~/.lmdeploy/bin/python pytest
tests/engine/test_proxy.py. The replicas are stand-ins.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from serve_fixture import asking, running

from intervale.engine.launch import free_port
from intervale.engine.remote import RemoteEngine
from intervale.serve.app import create_app

FAKE = Path(__file__).with_name("fake_engine.py")
PYTHON = os.environ.get("INTERVALE_LMDEPLOY_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="INTERVALE_LMDEPLOY_PYTHON names no Python with LMDeploy")


def until(url: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


@pytest.fixture(params=["engines", "gateways"])
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Our address. The replicas are engines with a key, the one we were given for the proxy; or such engines behind gateways of ours."""
    port, replicas = free_port(), [free_port(), free_port()]
    with ExitStack() as stack:
        for replica in replicas:
            started = subprocess.Popen([sys.executable, str(FAKE), str(replica)], env=os.environ | {"FAKE_KEY": "replicas-key"})
            stack.callback(started.kill)
        words = ["serve", "proxy", "--server-name", "127.0.0.1", "--server-port", str(port), "--disable-cache-status"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION"] = "1"  # seconds until it looks for the lost; 90 by default
        with (tmp_path / "proxy.log").open("w") as log:
            proxy = subprocess.Popen([PYTHON, "-m", "lmdeploy", *words], cwd=tmp_path, env=environment, stdout=log, stderr=log)
        stack.callback(proxy.kill)
        until(f"http://127.0.0.1:{port}/nodes/status")
        for replica in replicas:
            until(f"http://127.0.0.1:{replica}/health")
            # As `lmdeploy serve api_server --proxy-url` does it for itself.
            node: dict[str, object] = {"url": f"http://127.0.0.1:{replica}", "status": {"models": ["fake"]}}
            if request.param == "gateways":
                ours = create_app(RemoteEngine(f"http://127.0.0.1:{replica}/v1", ("fake",), "replicas-key", retries=0))
                node = {"url": stack.enter_context(running(ours))}
            assert httpx.post(f"http://127.0.0.1:{port}/nodes/add", json=node, timeout=10, trust_env=False).status_code == 200
        engine = RemoteEngine(f"http://127.0.0.1:{port}/v1", ("fake",), "replicas-key", pause=0.05)
        yield stack.enter_context(running(create_app(engine)))


def ask(url: str, text: str, stream: bool = False) -> httpx.Response:
    body = {"model": "fake", "messages": asking(text), "stream": stream}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def said(url: str) -> str:
    got = ask(url, "hi")
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["message"]["content"])


def test_both_replicas_answer_and_the_loss_of_one_is_survived(gateway: str) -> None:
    first = {said(gateway) for _ in range(20)}
    assert len(first) == 2
    broken = ask(gateway, "die", stream=True).text.strip().split("\n\n")
    assert '"engine_interrupted"' in broken[-1]
    for _ in range(100):  # until the proxy has taken it out, a question may meet it four times in a row
        if {ask(gateway, "hi").status_code for _ in range(4)} == {200}:
            break
        time.sleep(0.2)
    time.sleep(3)
    assert {said(gateway) for _ in range(20)} < first
