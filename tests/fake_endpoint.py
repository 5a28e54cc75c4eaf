"""An OpenAI-compatible server that answers FoodieQA's fixture by a fixed rule, and fails now and then on the way.

It finds the item in what it is sent, by words and by pixels, knows nothing of how the client made the request, and answers by the
item's number: 0 (mod 4) the right letter, 1 the right letter in words ("Answer: B", which a first-letter rule reads as A), 2 the next
letter, 3 no letter at all. A question without its picture gets the last letter.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from intervale.data.images import load_picture

LINE = re.compile(r"（([A-D])\) (.*?)\n")
PHRASE = "图片中的食物"


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture's pixels, upright and in one size."""
    return np.asarray(picture.resize((96, 64)), np.float32)


def number_of(name: str) -> int:
    """An item's number by its id."""
    return int(re.split(r"[-_]", name)[-1])


def right_place(item: dict[str, Any], turn: int) -> int:
    """Where the right option stands when all are turned by `turn`."""
    count = len(item["images"]) if "images" in item else len(item["choices"])
    return (int(item["answer"]) - turn) % count


def options(item: dict[str, Any]) -> int:
    return len(item["images"]) if "images" in item else len(item["choices"])


def place_said(item: dict[str, Any], place: int, mode: str) -> int | None:
    """The place that the rule's answer names in a mode, the right one standing at `place`; None: no letter."""
    kind = number_of(str(item.get("question_id", item.get("qid")))) % 4
    if kind == 3:
        return None
    if kind == 2:
        return (place + 1) % options(item)
    return 0 if kind == 1 and mode == "official" else place


class FakeEndpoint(httpx.AsyncBaseTransport):
    """The server. `faults`: what goes wrong at which request; `logprobs`: does it give them?"""

    def __init__(self, folder: Path, faults: dict[int, Any] | None = None, logprobs: bool = True) -> None:
        self.items = {task: json.loads((folder / f"{task}_tidy.json").read_text(encoding="utf-8")) for task in ("sivqa", "mivqa", "textqa")}
        self.folder, self.faults, self.logprobs = folder, faults or {}, logprobs
        names = {item["food_meta"]["food_file"] for item in self.items["sivqa"]} | {n for i in self.items["mivqa"] for n in i["images"]}
        self.looks = {name: pixels(load_picture(folder / name)) for name in names}
        self.asked: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        self.asked.append(body)
        fault = self.faults.get(len(self.asked))
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return fault() if callable(fault) else fault
        return httpx.Response(200, json=self.reply(body))

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        item, place = self.find(body["messages"])
        kind = None if item is None else number_of(str(item.get("question_id", item.get("qid")))) % 4
        place = 3 if item is None else place
        said = "ABCD"[(place + 1) % options(item) if item is not None and kind == 2 else place]
        text = {None: f"{said})", 0: f"{said}) ...", 1: f"Answer: {said}", 2: said, 3: "不知道"}[kind]
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if body.get("logprobs") and self.logprobs:
            tops = [("我", -0.5), ("的", -1.5)] if kind == 3 else [(said, -0.3), (f" {said}", -3.0), ("BCDA"["ABCD".index(said)], -2.0)]
            entries = [{"token": token, "logprob": value} for token, value in tops]
            choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
        return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}

    def find(self, messages: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, int]:
        """The item that is asked and the place of its right option; (None, 0) without a picture."""
        parts: list[dict[str, Any]] = []
        for message in messages:
            content = message["content"]
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        shown = [self.name_of(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        lines = dict(LINE.findall(text))
        if len(shown) > 1:
            for item in self.items["mivqa"]:
                if sorted(item["images"]) == sorted(shown):
                    return item, shown.index(item["images"][int(item["answer"])])
        for item in self.items["sivqa"] if shown else self.items["textqa"]:
            if shown and item["food_meta"]["food_file"] != shown[0]:
                continue
            for language in ("", "_en"):
                question = item.get(f"question{language}", "\0").replace(PHRASE, "").strip()
                if question in text:
                    right = item[f"choices{language}"][int(item["answer"])].strip()
                    return item, "ABCD".index(next(letter for letter, choice in lines.items() if choice == right))
        return None, 0

    def name_of(self, url: str) -> str:
        """The picture that looks like the one that was sent, which may have been through a JPEG."""
        sent = pixels(load_picture(base64.b64decode(url.partition("base64,")[2])))
        away = {name: float(np.abs(own - sent).mean()) for name, own in self.looks.items()}
        best = min(away, key=lambda name: away[name])
        assert away[best] < 1, "every picture of the fixture is at least 1.4 away from every other"
        return best


def busy(after: str = "0.01") -> httpx.Response:
    return httpx.Response(429, headers={"retry-after": after}, json={"error": {"message": "slow down"}})
