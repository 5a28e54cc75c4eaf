"""The page: a chat, two models side by side, a run's report, and what this server is. Gradio, on the app's own port.

Promises: what a visitor says and shows lives in his session alone and nowhere else; nothing is loaded from, or sent to, another host; of
Gradio's server only what the page needs is open (`ui_guard`). Cost: importing Gradio takes about three seconds, so this module is
imported only where a page is served.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, HTMLResponse, Response

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it also looks for newer versions of itself
os.environ["GRADIO_RUN_HISTORY"] = "False"  # it would keep questions and answers
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # a table of all events, summed up anew after each with pandas, for a page that is shut
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(1 << 60)

import gradio as gr

from intervale.serve.errors import ApiError
from intervale.serve.ui_about import Facts
from intervale.serve.ui_events import Page
from intervale.serve.ui_guard import REPORT_POLICY, UPLOADS_SECONDS, Guard, uploads
from intervale.serve.ui_shelf import load_shelf
from intervale.serve.ui_words import QUESTIONS, WORDS, language_of

Words = Callable[[str], Any]  # a key of WORDS -> what the browser replaces by the text in its language
_HERE = Path(__file__).parent
_VISITORS = 256  # tabs whose conversations are kept; each costs up to 0.4 MiB; the oldest makes room
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
_PICTURES = ["image"]


def mount_page(app: FastAPI, facts: Facts) -> FastAPI:
    """Put the page onto the app at '/'; for `create_app(..., page=...)`."""
    folder = uploads()
    state = app.state
    page = Page(state.desk, state.serving, state.metrics, facts, folder, load_shelf())
    _add_routes(app, page)
    words = gr.I18n(
        en={key: en for key, (en, _) in WORDS.items()} | {f"q{at}": en for at, (en, _) in enumerate(QUESTIONS)},
        zh={key: zh for key, (_, zh) in WORDS.items()} | {f"q{at}": zh for at, (_, zh) in enumerate(QUESTIONS)},
        **{"zh-CN": {key: zh for key, (_, zh) in WORDS.items()} | {f"q{at}": zh for at, (_, zh) in enumerate(QUESTIONS)}},
    )
    blocks = build(page, words)
    blocks.queue(max_size=None, api_open=False, default_concurrency_limit=None)  # the desk has a queue of its own
    app = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[],
        max_file_size=state.serving.media.picture_bytes,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        i18n=words,
        favicon_path=str(_HERE / "ui_icon.svg"),
        theme=gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=_MONO),
        css=(_HERE / "ui.css").read_text(encoding="utf-8"),
    )
    mounted: Any = app.router.routes[-1]
    mounted.app.state_holder.capacity = _VISITORS
    guard = Guard(mounted.app, folder, (_HERE / "ui_head.html").read_text(encoding="utf-8"))
    mounted.app = guard
    state.at_end.append(guard.close)
    return app


def _add_routes(app: FastAPI, page: Page) -> None:
    @app.get("/shelf/{number:int}")
    def shelf(number: int) -> Response:
        if not 0 <= number < len(page.shelf):
            raise ApiError(404, "not_found", "there is nothing at this address")
        return FileResponse(page.shelf[number].path, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})

    @app.get("/report")
    def report(http: HttpRequest) -> Response:
        if page.facts.report is None:
            raise ApiError(404, "not_found", "there is nothing at this address")
        told = page.facts.report[language_of(http.cookies, http.headers.get("accept-language", ""))]
        return HTMLResponse(told, headers={"Content-Security-Policy": REPORT_POLICY, "Vary": "Cookie, Accept-Language"})


def build(page: Page, words: Words) -> gr.Blocks:
    """The widgets and what they do."""
    two = len(page.desk.models) > 1
    with gr.Blocks(title="intervale", analytics_enabled=False, delete_cache=(600, UPLOADS_SECONDS), fill_width=True) as blocks:
        gr.HTML(_head(page.desk.models), js_on_load=_HEAD_JS, elem_id="iv-header")
        tab = gr.State("chat")
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=320, elem_id="iv-main"), gr.Tabs():
                with gr.Tab(words("chat")) as chat_tab:
                    chat = _chat_widgets(words)
                with gr.Tab(words("compare"), visible=two) as compare_tab:
                    compare = _compare_widgets(words)
                with gr.Tab(words("report"), visible=page.facts.report is not None) as report_tab:
                    gr.HTML('<iframe src="/report" sandbox="" loading="lazy" title="report"></iframe>', elem_id="iv-report")
                with gr.Tab(words("about")) as about_tab:
                    about = gr.HTML(elem_id="iv-about", js_on_load=_ABOUT_JS)
            with gr.Column(scale=3, min_width=300) as side:
                shelf, camera = _picture_widgets(page, words)
                chosen = _setting_widgets(page, words)
        _wire_chat(page, chat, chosen)
        _wire_compare(page, compare, chosen)
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        boxes = [chat["box"], compare["box"]]
        blocks.load(page.greet, None, [shelf, compare["panels"]], **quiet)
        shelf.click(page.take, [tab, *boxes], boxes, **quiet)
        camera.change(page.snap, [camera, tab, *boxes], [*boxes, camera], **quiet)
        for one, name in ((chat_tab, "chat"), (compare_tab, "compare"), (report_tab, "report"), (about_tab, "about")):
            shown = name in ("chat", "compare")
            one.select(lambda name=name, shown=shown: (name, gr.update(visible=shown)), None, [tab, side], **quiet)
        about_tab.select(page.about, chosen, about, **quiet)
    return blocks


def _ask_widgets(
    placeholder: Any, box_id: str, button: Any, button_id: str, words: Words, focus: bool
) -> tuple[gr.MultimodalTextbox, list[gr.Button], gr.Button]:
    """Where a question is written, with the example questions and one more button below."""
    box = gr.MultimodalTextbox(
        placeholder=placeholder,
        show_label=False,
        file_types=_PICTURES,
        file_count="multiple",
        sources=["upload"],
        autofocus=focus,
        max_lines=6,
        max_plain_text_length=100_000,
        elem_id=box_id,
    )
    with gr.Row(elem_classes="iv-quick"):
        questions = [gr.Button(words(f"q{at}"), size="sm", variant="secondary") for at in range(len(QUESTIONS))]
        new = gr.Button(button, size="sm", variant="secondary", elem_id=button_id)
    return box, questions, new


def _chat_widgets(words: Words) -> dict[str, Any]:
    window = gr.Chatbot(
        show_label=False,
        elem_id="iv-chat",
        editable="user",
        buttons=["copy"],
        layout="bubble",
        placeholder=words("empty"),
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=None,
        group_consecutive_messages=False,
    )
    status = gr.HTML("", elem_id="iv-status")
    box, questions, new = _ask_widgets(words("ask"), "iv-box", words("new"), "iv-new", words, focus=True)
    return {"talk": gr.State(()), "window": window, "status": status, "box": box, "questions": questions, "new": new}


def _compare_widgets(words: Words) -> dict[str, Any]:
    asked = gr.HTML("")
    panels = gr.HTML("", elem_id="iv-panels")
    status = gr.HTML("", elem_id="iv-status2")
    box, questions, new = _ask_widgets(words("ask_compare"), "iv-box2", words("again"), "iv-again", words, focus=False)
    return {"sides": gr.State(()), "asked": asked, "panels": panels, "status": status, "box": box, "questions": questions, "new": new}


def _picture_widgets(page: Page, words: Words) -> tuple[gr.HTML, gr.Image]:
    with gr.Accordion(words("shelf"), open=True, visible=bool(page.shelf)):
        shelf = gr.HTML("", elem_id="iv-shelf", js_on_load=_SHELF_JS)
    with gr.Accordion(words("camera"), open=False):
        camera = gr.Image(label=words("camera_label"), sources=["webcam"], type="filepath", show_label=False, height=220, buttons=[])
    return shelf, camera


def _setting_widgets(page: Page, words: Words) -> list[Any]:
    """The settings, in the order of `checked_settings`."""
    models, limits, tiles = page.desk.models, page.serving.limits, page.facts.most_tiles
    with gr.Accordion(words("settings"), open=False, elem_id="iv-settings"):
        model = gr.Radio(list(models), value=models[0], label=words("model"), visible=len(models) > 1)
        temperature = gr.Slider(0, 2, 0, step=0.05, label=words("temperature"), info=words("temperature_info"))
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label=words("top_p"), info=words("top_p_info"))
        most = gr.Slider(1, limits.new_tokens, limits.default_new_tokens, step=1, label=words("most"))
        cut = gr.Slider(1, max(tiles, 2), tiles, step=1, label=words("tiles"), info=words("tiles_info"), visible=tiles > 1)
        seed = gr.Textbox("", label=words("seed"), max_length=10)  # a Number shows 0 where it is empty
        system = gr.Textbox("", label=words("system"), info=words("system_info"), lines=2, max_length=8000)
    return [model, temperature, top_p, most, cut, seed, system]


def _wire_chat(page: Page, chat: dict[str, Any], chosen: list[Any]) -> None:
    talk, window, box = chat["talk"], chat["window"], chat["box"]
    out = [talk, window, box, chat["status"]]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    # One answer at a time: asking again, or otherwise, leaves the one that runs.
    running = [box.submit(page.send, [box, talk, *chosen], out, **quiet)]
    leave = window.retry(None, cancels=list(running), **quiet)
    running.append(leave.then(page.retry, [talk, *chosen], out, **quiet))
    running.append(window.edit(page.edit, [talk, *chosen], out, cancels=list(running), **quiet))
    # Leaving first, and the rest after: in one event, the page would not see the rest.
    box.stop(None, cancels=running, **quiet).then(page.stop, talk, out, **quiet)
    chat["new"].click(None, cancels=running, **quiet).then(page.clear, None, out, **quiet)
    window.clear(None, cancels=running, **quiet).then(page.clear, None, out, **quiet)
    _wire_questions(page, chat)


def _wire_compare(page: Page, compare: dict[str, Any], chosen: list[Any]) -> None:
    sides, box = compare["sides"], compare["box"]
    out = [sides, compare["asked"], compare["panels"], box, compare["status"]]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    running = box.submit(page.compare, [box, *chosen], out, **quiet)
    box.stop(None, cancels=[running], **quiet).then(page.stop_compare, sides, out, **quiet)
    compare["new"].click(None, cancels=[running], **quiet).then(page.clear_compare, None, out, **quiet)
    _wire_questions(page, compare)


def _wire_questions(page: Page, widgets: dict[str, Any]) -> None:
    for at, button in enumerate(widgets["questions"]):

        def suggest(request: gr.Request, box: Any, at: int = at) -> Any:
            return page.suggest(request, at, box)

        button.click(suggest, widgets["box"], widgets["box"], api_visibility="private", show_progress="hidden")


def _head(models: tuple[str, ...]) -> str:
    names = escape(" · ".join(models))
    return (
        f'<div id="iv-head"><strong>intervale</strong><span class="iv-models">{names}</span><nav>'
        '<button type="button" data-lang="" aria-label="中文 / English">中文</button>'
        '<button type="button" data-theme="" aria-label="dark / light">◐</button></nav></div>'
    )


_HEAD_JS = """
const chinese = navigator.language.toLowerCase().startsWith("zh");
const tongue = element.querySelector("[data-lang]"), theme = element.querySelector("[data-theme]");
tongue.textContent = chinese ? "English" : "中文";
document.documentElement.lang = chinese ? "zh-CN" : "en";
tongue.addEventListener("click", () => {
  document.cookie = "intervale_lang=" + (chinese ? "en" : "zh") + "; path=/; max-age=31536000; samesite=strict";
  location.reload();
});
theme.addEventListener("click", () => {
  const dark = document.body.classList.toggle("dark");
  try { localStorage.setItem("intervale_theme", dark ? "dark" : "light"); } catch {}
  history.replaceState(null, "", location.pathname);
  document.documentElement.style.background = dark ? "#0f1115" : "";
});
// On a phone the shelf is below the box: who asks from there would not see the answer.
const see = (event) => {
  const sent = event.type === "click" ? ".submit-button" : event.key === "Enter" && !event.shiftKey && !event.isComposing && "#iv-box, #iv-box2";
  if (sent && innerWidth <= 720 && event.target.closest(sent)) document.querySelector("#iv-main").scrollIntoView();
};
document.addEventListener("click", see);
document.addEventListener("keydown", see);
"""
_ABOUT_JS = """
element.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const line = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(line.textContent);
    const word = button.textContent;
    if (word === button.dataset.done) return;
    button.textContent = button.dataset.done;
    setTimeout(() => { button.textContent = word; }, 1500);
  } catch {
    getSelection().selectAllChildren(line);  // no clipboard without https: marked, to be copied by hand
  }
});
"""
_SHELF_JS = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-at]");
  if (button) trigger("click", { at: Number(button.dataset.at) });
});
"""
