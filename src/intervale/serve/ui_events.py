"""What the page does when something is pressed: one method an event, from values to values of widgets.

Promises: a conversation comes in with each event from its visitor's own session and goes back there; nothing is kept here. What a browser
claims a conversation to be is never read: only what it adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import shutil
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from intervale.engine.api import Desk
from intervale.serve.app import Serving
from intervale.serve.errors import ApiError
from intervale.serve.metrics import Metrics
from intervale.serve.ui_about import Facts, about_html
from intervale.serve.ui_compare import panels, verdict
from intervale.serve.ui_shelf import Example, shelf_html
from intervale.serve.ui_talk import (
    Exchange,
    Settings,
    Side,
    Talk,
    answers,
    checked_settings,
    numbers,
    refuse_long,
    request_of,
    shown,
    strip_of,
    told,
    typed,
)
from intervale.serve.ui_words import QUESTIONS, error_text, language_of, pick

_Values = tuple[Any, ...]
_CARET = '<span class="iv-caret"></span>'


def language(request: gr.Request) -> str:
    """The visitor's language."""
    return language_of(request.cookies, request.headers.get("accept-language", ""))


def messages(talk: Talk) -> list[dict[str, Any]]:
    """The conversation for the chat window."""
    out: list[dict[str, Any]] = []
    for one in talk:
        parts: list[Any] = [{"path": path} for path in one.shown]
        out.append({"role": "user", "content": [*parts, shown(one.text)]})
        text = shown(one.answer)
        if one.end == "error":
            text = (text + "\n\n" if text else "") + "⚠️ " + shown(one.note)
        elif one.end == "stopped":
            text += (" " if text else "") + "■"
        elif not one.end:
            text += _CARET
        out.append({"role": "assistant", "content": text})
    return out


def question_at(talk: Talk, index: Any) -> int:
    """Which exchange a place in the chat window belongs to; the window counts pictures as places of their own."""
    place = index[0] if isinstance(index, (list, tuple)) else int(index)
    seen = -1
    for number, one in enumerate(talk):
        seen += len(one.shown) + 2
        if place <= seen:
            return number
    return len(talk) - 1


def with_last(talk: Talk, **changes: Any) -> Talk:
    """The conversation with its last exchange changed."""
    return (*talk[:-1], dataclasses.replace(talk[-1], **changes))


def box_of(busy: bool, **more: Any) -> Any:
    """The question's box: its button sends, or stops."""
    return gr.update(submit_btn=not busy, stop_btn=busy, **more)


def trouble(tongue: str, fault: ApiError) -> str:
    """An error for the line under the answer, which is HTML."""
    return "⚠️ " + escape(error_text(tongue, fault.code, fault.message))


@dataclass(frozen=True)
class Page:
    """What every event may know; none of it belongs to a visitor."""

    desk: Desk
    serving: Serving
    metrics: Metrics
    facts: Facts
    folder: Path
    shelf: tuple[Example, ...]

    # -- Chat: every event gives (talk, chat window, box, status)

    async def send(self, request: gr.Request, box: dict[str, Any] | None, talk: Talk, *chosen: Any) -> AsyncGenerator[_Values, None]:
        """A new question."""
        tongue = language(request)
        text, files = ((box or {}).get("text") or "").strip(), tuple((box or {}).get("files") or ())
        if not text:
            yield gr.skip(), gr.skip(), box_of(False), pick(tongue, "Type a question first.", "请先输入问题。")
            return
        try:
            refuse_long((*talk, Exchange(text)))
            strip = await asyncio.to_thread(strip_of, files, self.folder, self.serving)
        except Exception as error:
            fault = told(error)
            yield gr.skip(), gr.skip(), box_of(False), trouble(tongue, fault)
            return
        talk = (*talk, Exchange(text, files, strip))
        async with contextlib.aclosing(self._answered(request, talk, chosen, box_of(True, value=None))) as growing:
            async for values in growing:
                yield values

    async def retry(self, request: gr.Request, talk: Talk, *chosen: Any) -> AsyncGenerator[_Values, None]:
        """The last question once more."""
        if not talk:
            yield gr.skip(), gr.skip(), box_of(False), ""
            return
        again = with_last(talk, answer="", end="", note="")
        async with contextlib.aclosing(self._answered(request, again, chosen, box_of(True), again=True)) as growing:
            async for values in growing:
                yield values

    async def edit(self, request: gr.Request, data: gr.EditData, talk: Talk, *chosen: Any) -> AsyncGenerator[_Values, None]:
        """A question in other words; what came after it is gone."""
        at, text = question_at(talk, data.index), typed(str(data.value or "")).strip()
        if not talk or not text:
            yield talk, messages(talk), box_of(False), ""
            return
        changed = Exchange(text, talk[at].pictures, talk[at].shown)
        try:
            refuse_long((*talk[:at], changed))
        except ApiError as fault:
            yield talk, messages(talk), box_of(False), trouble(language(request), fault)
            return
        async with contextlib.aclosing(self._answered(request, (*talk[:at], changed), chosen, box_of(True))) as growing:
            async for values in growing:
                yield values

    async def _answered(
        self, request: gr.Request, talk: Talk, chosen: _Values, box: Any, again: bool = False
    ) -> AsyncGenerator[_Values, None]:
        tongue = language(request)
        yield talk, messages(talk), box, ""
        try:
            settings = checked_settings(self.serving.limits, *chosen)
            asked = await request_of(talk, settings, f"page:{request.session_hash}", self.folder, self.serving)
        except Exception as error:
            fault = told(error)
            talk = with_last(talk, end="error", note=error_text(tongue, fault.code, fault.message))
            yield talk, messages(talk), box_of(False), ""
            return
        async with contextlib.aclosing(answers(self.desk, [asked], self.metrics)) as growing:
            async for (side,) in growing:
                if side.over:
                    break
                if side.text == talk[-1].answer:
                    yield gr.skip(), gr.skip(), gr.skip(), self._waiting(side, tongue)
                    continue
                talk = with_last(talk, answer=side.text)
                yield talk, messages(talk), gr.skip(), ""
        note = "" if side.fault is None else error_text(tongue, side.fault.code, side.fault.message)
        talk = with_last(talk, answer=side.text, end="error" if side.fault else side.finish, note=note)
        yield talk, messages(talk), box_of(False), numbers(side, tongue) + (self._hint(settings, tongue) if again else "")

    def _waiting(self, side: Side, tongue: str) -> str:
        waiting = self.desk.load().waiting
        if side.text or not waiting:
            return "" if side.text else pick(tongue, "reading …", "正在读图 …")
        return pick(tongue, f"in the queue ({waiting} waiting) …", f"排队中（{waiting} 个在等）…")

    def _hint(self, settings: Settings, tongue: str) -> str:
        return (
            "" if settings.temperature else pick(tongue, " · temperature 0: asked again, it says the same", " · 温度为 0：再问一次答案相同")
        )

    def stop(self, request: gr.Request, talk: Talk) -> _Values:
        """The running answer ends where it stands."""
        if talk and not talk[-1].end:
            talk = with_last(talk, end="stopped")
        return talk, messages(talk), box_of(False), pick(language(request), "stopped", "已停止")

    def clear(self) -> _Values:
        """A new conversation."""
        return (), [], box_of(False, value=None), ""

    # -- Compare: every event gives (asked before, question, panels, box, status)

    async def compare(self, request: gr.Request, box: dict[str, Any] | None, *chosen: Any) -> AsyncGenerator[_Values, None]:
        """One question to the first two models at once, with one seed."""
        tongue, names = language(request), self.desk.models[:2]
        text, files = ((box or {}).get("text") or "").strip(), tuple((box or {}).get("files") or ())
        try:
            if not text:
                yield gr.skip(), gr.skip(), gr.skip(), box_of(False), pick(tongue, "Type a question first.", "请先输入问题。")
                return
            settings = checked_settings(self.serving.limits, *chosen)
            settings = dataclasses.replace(settings, seed=secrets.randbelow(2**31) if settings.seed is None else settings.seed)
            refuse_long((Exchange(text),), settings)
            strip = await asyncio.to_thread(strip_of, files, self.folder, self.serving)
            talk, visitor = (Exchange(text, files, strip),), f"page:{request.session_hash}"
            both = [dataclasses.replace(settings, model=name) for name in names]
            asked = [await request_of(talk, one, visitor, self.folder, self.serving) for one in both]
        except Exception as error:
            fault = told(error)
            yield gr.skip(), gr.skip(), gr.skip(), box_of(False), trouble(tongue, fault)
            return
        yield (), self._asked(talk[0]), panels(names, [Side(), Side()], tongue), box_of(True, value=None), ""
        last: tuple[str, ...] = ()
        async with contextlib.aclosing(answers(self.desk, asked, self.metrics)) as growing:
            async for sides in growing:
                now = tuple(side.text + side.finish for side in sides)
                if now != last:
                    copies = tuple(dataclasses.replace(side) for side in sides)
                    yield copies, gr.skip(), panels(names, sides, tongue), gr.skip(), ""
                elif not any(now):
                    yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), self._waiting(sides[0], tongue)
                last = now
        status = " · ".join(filter(None, (verdict(sides, tongue), pick(tongue, f"seed {settings.seed}", f"种子 {settings.seed}"))))
        yield tuple(sides), gr.skip(), panels(names, sides, tongue), box_of(False), status

    def stop_compare(self, request: gr.Request, sides: tuple[Side, ...]) -> _Values:
        """Both end where they stand."""
        tongue, names = language(request), self.desk.models[:2]
        return (), gr.skip(), panels(names, sides or None, tongue, stopped=True), box_of(False), pick(tongue, "stopped", "已停止")

    def clear_compare(self, request: gr.Request) -> _Values:
        """As it was at first."""
        return (), "", panels(self.desk.models[:2], None, language(request)), box_of(False, value=None), ""

    def _asked(self, one: Exchange) -> str:
        pictures = "".join(f'<img src="/gradio_api/file={escape(path)}" alt="">' for path in one.shown)
        return f'<div class="iv-asked">{pictures}<p>{escape(one.text)}</p></div>'

    # -- Beside them

    def greet(self, request: gr.Request) -> _Values:
        """What is in the visitor's language from the start: the shelf, and the empty panels."""
        tongue = language(request)
        return shelf_html(self.shelf, tongue), panels(self.desk.models[:2], None, tongue)

    def take(self, data: gr.EventData, tab: str, chat_box: dict[str, Any] | None, compare_box: dict[str, Any] | None) -> _Values:
        """A picture off the shelf, into the box that is seen."""
        try:
            one = self.shelf[int(data._data["at"])]
        except (KeyError, TypeError, ValueError, IndexError):
            return gr.skip(), gr.skip()
        copy = self.folder / f"{secrets.token_hex(8)}-{one.path.name}"
        shutil.copyfile(one.path, copy)
        return self._added(str(copy), tab, chat_box, compare_box)

    def snap(self, picture: str | None, tab: str, chat_box: dict[str, Any] | None, compare_box: dict[str, Any] | None) -> _Values:
        """A picture of the camera, likewise; the camera is free for the next."""
        if picture is None:
            return gr.skip(), gr.skip(), gr.skip()
        return (*self._added(picture, tab, chat_box, compare_box), None)

    def _added(self, path: str, tab: str, chat_box: dict[str, Any] | None, compare_box: dict[str, Any] | None) -> _Values:
        box = (compare_box if tab == "compare" else chat_box) or {}
        value = gr.update(value={"text": box.get("text") or "", "files": [*(box.get("files") or ()), path]})
        return (gr.skip(), value) if tab == "compare" else (value, gr.skip())

    def suggest(self, request: gr.Request, number: int, box: dict[str, Any] | None) -> Any:
        """A question to try, beside the pictures that are there."""
        return gr.update(value={"text": pick(language(request), *QUESTIONS[number]), "files": list((box or {}).get("files") or ())})

    def about(self, request: gr.Request, *chosen: Any) -> str:
        """The About tab, with the settings as they are now."""
        try:
            settings = checked_settings(self.serving.limits, *chosen)
        except Exception:
            settings = Settings()
        parts = urlsplit(str(request.url))
        return about_html(self.facts, self.serving, self.desk.models, f"{parts.scheme}://{parts.netloc}", settings, language(request))
