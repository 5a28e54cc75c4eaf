"""A data set asked of an endpoint leaves the folder that a model in this process leaves, and says what the endpoint said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from serve_fixture import live

from conftest import draw_plates, run_command
from evaluation_fixture import after, timeless
from fake_endpoint import busy
from foodie_fixture import write_foodieqa
from intervale.core.errors import UserError
from intervale.engine.desks import local_desk
from intervale.engine.whole import Server
from intervale.evaluate.compare import compare
from intervale.evaluate.endpoint import EndpointAsker
from intervale.evaluate.endpoint_run import evaluate_endpoint, plan_endpoint
from intervale.evaluate.folder import read_predictions
from intervale.evaluate.run import evaluate, plan
from intervale.evaluate.suite import Settings, run_suite
from intervale.evaluate.suite_data import read_suite
from intervale.evaluate.suite_folder import read_answers
from intervale.evaluate.suite_local import local_asker
from intervale.model.load import load_model


class Plates(httpx.AsyncBaseTransport):
    """Reads the file's name off nothing: it knows plate n by its order of asking, and answers by a rule on the choices it is shown.

    With lettered choices it always says the second letter, else always 绿色; its log-probabilities favour C.
    """

    def __init__(self, faults: dict[int, Any] | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.faults = faults or {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        self.asked.append(body)
        fault = self.faults.get(len(self.asked))
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return fault
        text = "".join(part.get("text", "") for part in body["messages"][-1]["content"])
        said = "Answer: B" if re.search(r"^A\. ", text, re.MULTILINE) else "这是绿色的"
        choice: dict[str, Any] = {"message": {"content": said}, "finish_reason": "stop"}
        if body.get("logprobs"):
            tops = [{"token": letter, "logprob": value} for letter, value in (("C", -0.2), ("A", -3.0), ("B", -2.0))]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 3}})


def go(data: Path, out: Path, other: httpx.AsyncBaseTransport, prompt: str = "mcq", mode: str = "strict", **more: Any) -> dict[str, Any]:
    asker = EndpointAsker(Server("http://there/v1", "big", pause=0.001, transport=other), 16, True, False, (1.0, 2.0))
    return evaluate_endpoint(plan_endpoint(asker, data, out, prompt=prompt, mode=mode), fresh=False, tell=lambda _: None, **more)


@pytest.fixture(scope="module")
def plates_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_plates(tmp_path_factory.mktemp("plates"), 10)


@pytest.mark.parametrize(
    ("prompt", "mode", "place"),
    [("open", "strict", 1), ("mcq", "strict", 1), ("mcq", "official", 0), ("mcq", "likelihood", 2)],
)
def test_every_way_of_asking_scores_what_the_rule_implies_despite_trouble(
    plates_file: Path, tmp_path: Path, prompt: str, mode: str, place: int
) -> None:
    faults = {2: busy(), 4: httpx.ReadTimeout("slow"), 6: httpx.Response(200, content=b"no JSON"), 7: httpx.Response(500)}
    other = Plates(faults)
    summary = go(plates_file, tmp_path / "out", other, prompt, mode)
    lines = read_predictions(tmp_path / "out")
    right = sum(line["answer"] == place for line in lines)
    assert (summary["n"], summary["correct"]) == (10, right)
    assert {line["parsed"] for line in lines} == {place}
    assert len(other.asked) == 14
    assert summary["used"] == {
        "askings": 10, "prompt_tokens": 500, "tokens": 30, "untold": 0, "price": pytest.approx(560 / 1e6), "seconds": summary["used"]["seconds"],
    }  # fmt: skip
    assert summary["model"]["name"] == "big"
    assert summary["scored_on_training_items"] is None
    assert "secret" not in json.dumps(summary)
    assert other.asked[0]["max_tokens"] == (1 if mode == "likelihood" else 16)


def test_killed_at_any_item_and_resumed_the_summary_is_a_straight_ones(plates_file: Path, tmp_path: Path) -> None:
    straight = go(plates_file, tmp_path / "straight", Plates())
    for last in range(1, 11):
        out = tmp_path / f"killed-{last}"
        with pytest.raises(KeyboardInterrupt):
            go(plates_file, out, Plates(), on_answer=after(last))
        assert not (out / "summary.json").exists()
        resumed = go(plates_file, out, other := Plates())
        assert len(other.asked) == 10 - last
        assert timeless(resumed) == timeless(straight)
        assert timeless(read_predictions(out)) == timeless(read_predictions(tmp_path / "straight"))


def test_open_questions_have_no_likelihood_at_an_endpoint(plates_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="open prompt's choices cannot be scored") as caught:
        go(plates_file, tmp_path / "out", Plates(), "open", "likelihood")
    assert "--prompt mcq" in caught.value.fix


def test_a_served_model_answers_as_it_does_in_this_process(tiny: Path, plates_file: Path, tmp_path: Path) -> None:
    """Over a real socket, through our own server: the pictures, the prompt and the greedy answer are the same."""
    here = evaluate(plan(str(tiny), plates_file, tmp_path / "here", max_new_tokens=8, device="cpu"), fresh=False, tell=lambda _: None)
    with live(local_desk(str(tiny), device="cpu")) as url:
        asker = EndpointAsker(Server(f"{url}/v1", "tiny", concurrency=3), 8, True, False)
        job = plan_endpoint(asker, plates_file, tmp_path / "there", prompt="open", mode="strict")
        there = evaluate_endpoint(job, fresh=False, tell=lambda _: None)
    assert [line["raw"] for line in read_predictions(tmp_path / "there")] == [line["raw"] for line in read_predictions(tmp_path / "here")]
    assert [line["prompt_tokens"] for line in read_predictions(tmp_path / "there")] == [
        line["prompt_tokens"] for line in read_predictions(tmp_path / "here")
    ]
    assert (there["correct"], there["tokens"]) == (here["correct"], here["tokens"])
    with pytest.raises(UserError, match=r"protocol\.max_tiles: 4 -> null"):  # how many tiles a server cuts is not known
        compare(tmp_path / "here", tmp_path / "there")


@pytest.mark.parametrize("prefix_as", ["user", "assistant"])
def test_a_served_model_stands_in_the_same_table_as_one_in_this_process(tiny: Path, tmp_path: Path, prefix_as: str) -> None:
    """The suite, the forced prefix told the same way on both sides: the same answers, prompt for prompt."""
    write_foodieqa(tmp_path / "src", traps=False)
    data = read_suite(tmp_path / "src", limit=2)
    settings = Settings(modes=("strict", "official"), prefix_as=prefix_as)
    local = local_asker(str(tiny), max_new_tokens=6, max_tiles=None, device="cpu", precision="auto", text=True, letters=False)
    here = run_suite(data, settings, local, tmp_path / "here", tell=lambda _: None)
    with live(local_desk(str(tiny), device="cpu")) as url:
        asker = EndpointAsker(Server(f"{url}/v1", "tiny", concurrency=3), 6, True, False)
        there = run_suite(data, settings, asker, tmp_path / "there", tell=lambda _: None)
    said = [
        {line["key"]: (line["raw"], line["prompt_tokens"], line["tokens"]) for line in read_answers(tmp_path / name)}
        for name in ("here", "there")
    ]
    assert said[0] == said[1]
    assert here["tables"] == there["tables"]


def test_a_served_models_letters_are_as_likely_as_in_this_process(tiny: Path, tmp_path: Path) -> None:
    """After the forced prefix, of a model that tends to say a letter."""
    model = tmp_path / "lettered"
    shutil.copytree(tiny, model)
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    backend = load_model(tiny, device="cpu").tokenizer
    for letter in "ABCD":
        tensors["language_model.output.weight"][backend.encode(letter)[0]] *= 20
    save_file(tensors, file, {"format": "pt"})
    write_foodieqa(tmp_path / "src", traps=False)
    data = read_suite(tmp_path / "src", limit=2)
    settings = Settings(modes=("likelihood",), prefix_as="assistant")
    local = local_asker(str(model), max_new_tokens=1, max_tiles=None, device="cpu", precision="auto", text=False, letters=True)
    run_suite(data, settings, local, tmp_path / "here", tell=lambda _: None)
    with live(local_desk(str(model), device="cpu")) as url:
        asker = EndpointAsker(Server(f"{url}/v1", "lettered", concurrency=3), 1, False, True)
        run_suite(data, settings, asker, tmp_path / "there", tell=lambda _: None)
    here, there = ({line["key"]: line["scores"] for line in read_answers(tmp_path / name)} for name in ("here", "there"))
    assert here.keys() == there.keys()
    compared = 0
    for key, scores in there.items():
        for mine, its in zip(here[key], scores or [], strict=False):
            if its > min(scores):  # a letter beyond the twenty has a bound, no value
                assert its == pytest.approx(mine, abs=1e-4)
                compared += 1
    assert compared > 20


def test_the_command_asks_an_endpoint_and_keeps_its_key_to_itself(
    tiny: Path, plates_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "very-secret")
    with live(local_desk(str(tiny), device="cpu")) as url:
        words = ["evaluate", plates_file, "--base-url", f"{url}/v1", "--model-name", "tiny", "--max-new-tokens", 4]
        assert run_command(monkeypatch, *words, "--out", tmp_path / "out", "--api-key-env", "MY_KEY", "--prices", "2.5,10") == 0
        told = capsys.readouterr()
        assert "10 askings" in told.out
        assert "price 0.0" in told.out
        assert run_command(monkeypatch, *words, "--out", tmp_path / "out2", "--mode", "likelihood", "--prompt", "mcq") == 0
        capsys.readouterr()
        assert run_command(monkeypatch, *words, "--out", tmp_path / "out3", "--api-key-env", "NOT_SET") == 1
        assert "NOT_SET is not set" in capsys.readouterr().err
    for path in (tmp_path / "out").iterdir():
        assert "very-secret" not in path.read_text(encoding="utf-8")
    for wrong in (["--prices", "2.5"], ["--extra", "[]"], ["--device", "cpu"], ["--prefix-as", "assistant"]):
        assert run_command(monkeypatch, *words, "--out", tmp_path / "x", *wrong) == 1
    capsys.readouterr()
