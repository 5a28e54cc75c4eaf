"""A suite at an endpoint gives exactly what the endpoint's rule implies, whatever goes wrong in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from evaluation_fixture import after, contents, timeless
from fake_endpoint import FakeEndpoint, busy, number_of, options, place_said, right_place
from foodie_fixture import write_foodieqa
from intervale.cli.evaluate_suite import EndpointOptions, endpoint_asker
from intervale.core.errors import UserError
from intervale.data.images import load_picture
from intervale.engine.api import EngineError, UpstreamRefusedError
from intervale.engine.whole import Server
from intervale.evaluate.endpoint import EndpointAsker, letter_scores, parse_extra, photo_of
from intervale.evaluate.suite import Settings, run_suite
from intervale.evaluate.suite_data import read_suite
from intervale.evaluate.suite_score import MODES


@pytest.fixture(scope="module")
def foodie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foodie") / "src"
    write_foodieqa(folder, traps=False)
    return folder


def trouble() -> dict[int, Any]:
    """429s with and without words, timeouts, server errors and one malformed reply, in between."""
    faults: dict[int, Any] = {number: busy() for number in range(3, 400, 17)}
    faults |= {number: httpx.ReadTimeout("slow") for number in range(7, 400, 41)}
    faults |= {number: httpx.ConnectError("away") for number in range(11, 400, 83)}
    faults |= {number: httpx.Response(503) for number in range(13, 400, 89)}
    faults |= {29: httpx.Response(200, content=b"<html>Bad gateway</html>"), 31: httpx.Response(500, json={"error": "oops"})}
    faults |= {37: httpx.Response(200, json={"choices": []})}
    return faults


def asker(transport: httpx.AsyncBaseTransport, settings: Settings, **more: Any) -> EndpointAsker:
    own = {key: more.pop(key) for key in list(more) if key == "prices"}
    server = Server("http://there/v1", "big", "secret", pause=0.001, transport=transport, **more)
    return EndpointAsker(server, 32, settings.text, settings.letters, **own)


def go(folder: Path, out: Path, settings: Settings, transport: httpx.AsyncBaseTransport, **more: Any) -> dict[str, Any]:
    data_options = {key: more.pop(key) for key in list(more) if key in ("tasks", "limit")}
    run_options = {key: more.pop(key) for key in list(more) if key in ("on_answer", "tell")}
    data = read_suite(folder, data_options.pop("tasks", ()), settings.languages, **data_options)
    return run_suite(data, settings, asker(transport, settings, **more), out, **({"tell": lambda _: None} | run_options))


def items_of(folder: Path, task: str, language: str) -> list[dict[str, Any]]:
    found = json.loads((folder / f"{task}_tidy.json").read_text(encoding="utf-8"))
    return [item for item in found if language == "zh" or "question_en" in item]


def implied(item: dict[str, Any], mode: str, turn: int, fallback: str) -> bool:
    """Is the rule's answer right in this mode?"""
    place = right_place(item, turn)
    said = place_said(item, place, mode)
    return place == (0 if fallback == "a" and mode == "official" else None) if said is None else said == place


@pytest.mark.parametrize("fallback", ["wrong", "a"])
def test_every_mode_language_and_task_scores_what_the_rule_implies_despite_trouble(foodie: Path, tmp_path: Path, fallback: str) -> None:
    fake = FakeEndpoint(foodie, trouble())
    settings = Settings(modes=MODES, fallback=fallback)
    suite = go(foodie, tmp_path / "out", settings, fake, prices=(2.0, 10.0))
    assert len(suite["combinations"]) == (5 + 4 + 4 + 4 + 4) * 3
    for row in suite["combinations"]:
        items = items_of(foodie, row["task"], row["language"])
        right = sum(implied(item, row["mode"], 0, fallback) for item in items)
        assert (row["n"], row["correct"]) == (len(items), right), row["folder"]
        assert row["accuracy"] == right / len(items)
        silent = sum(number_of(str(item.get("question_id", item.get("qid")))) % 4 == 3 for item in items)
        if row["mode"] == "official":
            assert row["fallback"]["used"] == silent
        assert row["unseen" if row["mode"] == "likelihood" else "unparsed"] == silent
    askings = 24 * 5 + 23 * 4 + 12 * 4 + 11 * 4 + 12 * 4
    assert suite["askings"] == askings == suite["used"]["askings"]
    assert len(fake.asked) == askings + sum(number <= len(fake.asked) for number in fake.faults)
    assert (suite["used"]["prompt_tokens"], suite["used"]["tokens"]) == (100 * askings, 7 * askings)
    assert suite["used"]["price"] == pytest.approx((200 * askings + 70 * askings) / 1e6)


def test_every_order_of_the_options_scores_what_the_rule_implies(foodie: Path, tmp_path: Path) -> None:
    settings = Settings(modes=MODES, prompts=("2",), rotate="all", fallback="a")
    suite = go(foodie, tmp_path / "out", settings, FakeEndpoint(foodie))
    turns = {"as-is": 0, "turn1": 1, "turn2": 2, "turn3": 3}
    for row in suite["combinations"]:
        items = [item for item in items_of(foodie, row["task"], row["language"]) if options(item) > turns[row["turn"]]]
        right = sum(implied(item, row["mode"], turns[row["turn"]], "a") for item in items)
        assert (row["n"], row["correct"]) == (len(items), right), row["folder"]
    for row in suite["rotations"]:
        items = items_of(foodie, row["task"], row["language"])
        right = sum(all(implied(item, row["mode"], turn, "a") for turn in range(options(item))) for item in items)
        assert (row["n"], row["all_right"]) == (len(items), right)
        assert sum(row["predicted_positions"].values()) == sum(map(options, items))


def test_baselines_ask_without_the_picture_or_with_the_dishs_name(foodie: Path, tmp_path: Path) -> None:
    fake = FakeEndpoint(foodie)
    settings = Settings(languages=("zh",), modes=("strict",), prompts=("3",), views=("picture", "blind", "food-name", "name-only"))
    suite = go(foodie, tmp_path / "out", settings, fake)
    rows = {(row["task"], row["view"]): row for row in suite["combinations"]}
    assert set(rows) == {("sivqa", view) for view in settings.views} | {("mivqa", "picture"), ("mivqa", "blind"), ("textqa", "picture")}
    named = [item for item in items_of(foodie, "sivqa", "zh") if "图片中的食物" in item["question"]]
    assert rows["sivqa", "food-name"]["n"] == rows["sivqa", "name-only"]["n"] == len(named) == 20
    assert rows["sivqa", "food-name"]["correct"] == sum(implied(item, "strict", 0, "wrong") for item in named)
    for task in ("sivqa", "mivqa"):  # the rule without a picture: the fourth letter
        assert rows[task, "blind"]["correct"] == sum(int(item["answer"]) == 3 for item in items_of(foodie, task, "zh"))
    texts = [json.dumps(body, ensure_ascii=False) for body in fake.asked]
    assert sum("image_url" not in text for text in texts) == 24 + 12 + 12 + len(named)
    assert sum("红烧鱼通常属于哪个菜系" in text for text in texts) == 2


def test_a_forced_prefix_ends_the_question_or_begins_the_answer(foodie: Path, tmp_path: Path) -> None:
    settings = Settings(languages=("zh",), modes=("strict",), prompts=("3",), prefix_as="user")
    fake = FakeEndpoint(foodie)
    go(foodie, tmp_path / "user", settings, fake, tasks=("sivqa",), limit=1)
    (body,) = fake.asked
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert body["messages"][0]["content"][1]["text"].endswith("从所提供的选项中选择一个正确答案。\n我选择（")
    assert "continue_final_message" not in body
    fake = FakeEndpoint(foodie)
    settings = replace(settings, prefix_as="assistant")
    go(foodie, tmp_path / "assistant", settings, fake, tasks=("sivqa",), limit=1)
    (body,) = fake.asked
    assert body["messages"][-1] == {"role": "assistant", "content": "我选择（"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_an_endpoint_without_log_probabilities_is_refused_for_likelihood_and_nothing_is_left(foodie: Path, tmp_path: Path) -> None:
    settings = Settings(modes=("likelihood",), prompts=("0",))
    with pytest.raises(EngineError, match="no log-probabilities") as caught:
        go(foodie, tmp_path / "out", settings, FakeEndpoint(foodie, logprobs=False))
    assert "strict" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_refused_request_is_a_counted_wrong_answer_but_nothing_but_refusals_is_an_error(foodie: Path, tmp_path: Path) -> None:
    def filtered() -> httpx.Response:
        return httpx.Response(400, json={"error": {"message": "content policy", "code": "content_filter"}})

    settings = Settings(languages=("zh",), modes=("strict", "official"), prompts=("0",))
    suite = go(foodie, tmp_path / "out", settings, FakeEndpoint(foodie, {1: filtered(), 5: filtered()}), tasks=("textqa",), concurrency=1)
    rows = {row["mode"]: row for row in suite["combinations"]}
    assert rows["strict"]["refused"] == rows["official"]["refused"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "textqa-zh" / "0-strict" / "predictions.jsonl").read_text().splitlines()]
    refused = [line for line in lines if "refused" in line]
    assert [(line["id"], line["correct"], line["parsed"]) for line in refused] == [("textqa-0", False, None), ("textqa-4", False, None)]
    assert "content policy" in refused[0]["refused"]
    with pytest.raises(UpstreamRefusedError, match="refused the request") as caught:
        go(foodie, tmp_path / "none", settings, FakeEndpoint(foodie, dict.fromkeys(range(1, 99), filtered)), tasks=("textqa",))
    assert not (tmp_path / "none").exists()
    assert "log-prob" not in caught.value.fix
    with pytest.raises(UpstreamRefusedError, match="refused the request") as caught:  # the likely reason is told where likelihood is asked
        go(foodie, tmp_path / "none", replace(settings, modes=("likelihood",)), FakeEndpoint(foodie, dict.fromkeys(range(1, 99), filtered)))
    assert "log-probabilities" in caught.value.fix
    assert "strict" in caught.value.fix


@pytest.mark.parametrize(
    ("answer", "told"), [(httpx.Response(401), "answered 401"), (httpx.Response(200, content=b"{}"), "not a chat comp")]
)
def test_what_no_retry_helps_stops_the_run_and_keeps_what_there_is(foodie: Path, tmp_path: Path, answer: httpx.Response, told: str) -> None:
    settings = Settings(languages=("zh",), modes=("strict",), prompts=("0",))
    faults = dict.fromkeys(range(4, 99), answer)
    with pytest.raises(EngineError, match=told):
        go(foodie, tmp_path / "out", settings, FakeEndpoint(foodie, faults), tasks=("textqa",), concurrency=1, retries=2)
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 3
    suite = go(foodie, tmp_path / "out", settings, fake := FakeEndpoint(foodie), tasks=("textqa",))
    assert len(fake.asked) == 9
    assert suite["combinations"][0]["n"] == 12


def test_killed_at_any_item_and_resumed_the_endpoints_summary_is_a_straight_ones(foodie: Path, tmp_path: Path) -> None:
    settings = Settings(modes=MODES, prompts=("2",), rotate="seeded", fallback="random")
    straight = go(foodie, tmp_path / "straight", settings, FakeEndpoint(foodie), limit=3)
    count = straight["askings"]
    for last in range(1, count + 1):
        out = tmp_path / f"killed-{last}"
        with pytest.raises(KeyboardInterrupt):
            go(foodie, out, settings, FakeEndpoint(foodie), limit=3, on_answer=after(last))
        assert not (out / "suite.json").exists()
        with open(out / "answers.jsonl", "a") as file:
            file.write('{"key": "sivqa/zh')  # in the middle of a line
        fake = FakeEndpoint(foodie)
        resumed = go(foodie, out, settings, fake, limit=3)
        assert len(fake.asked) == count - last
        assert timeless(resumed) == timeless(straight)
        assert contents(out) == contents(tmp_path / "straight")


def test_a_letter_counts_with_what_surrounds_it_and_a_missing_one_is_less_likely_than_all() -> None:
    first = [("B", -1.0), (" B", -1.0), ("（B", -1.0), ("A", -0.9), ("Answer", -0.5), ("AB", -0.1)]
    scores = letter_scores(first, 3)
    assert scores is not None
    assert scores[1] == pytest.approx(-1.0 + 1.0986, abs=1e-4)
    assert scores[0] == -0.9
    assert scores[2] < -1.0
    assert scores[2] == pytest.approx(-1.0)
    assert letter_scores([("▁A", -0.2), ("ĠB", -0.3)], 2) == [-0.2, -0.3]
    assert letter_scores([("我", -0.1)], 4) is None
    assert letter_scores([("B", -0.1), ("A", -9999.0)], 2) == [-9999.0, -0.1]  # how servers write next to nothing


def test_pictures_are_sent_upright_and_as_they_are_where_they_are_plain(foodie: Path) -> None:
    plain = foodie / "images" / "a dish with spaces.png"
    assert photo_of(plain, "x").data == plain.read_bytes()
    for name in ("images/turned.jpg", "images/alpha.png"):
        sent = photo_of(foodie / name, "x")
        assert sent.data != (foodie / name).read_bytes()
        mine, theirs = load_picture(foodie / name), load_picture(sent.data)
        assert (theirs.size, theirs.mode) == (mine.size, "RGB")
        assert sent.size == mine.size
    assert load_picture(photo_of(foodie / "images/alpha.png", "x").data).tobytes() == load_picture(foodie / "images/alpha.png").tobytes()


def test_an_address_with_a_password_is_refused_before_it_is_on_file() -> None:
    for address in ("http://me:secret@there/v1", "http://there/v1?key=secret"):
        with pytest.raises(UserError) as caught:
            endpoint_asker(address, EndpointOptions("m"), 8, text=True, letters=False)
        assert "secret" not in caught.value.what + caught.value.fix
        assert "--api-key-env" in caught.value.fix


def test_extras_may_not_touch_what_the_evaluation_decides() -> None:
    assert parse_extra('{"max_tokens": null, "max_completion_tokens": 9}') == {"max_tokens": None, "max_completion_tokens": 9}
    for text in ("[1]", '{"messages": []}', "{"):
        with pytest.raises(UserError):
            parse_extra(text)
