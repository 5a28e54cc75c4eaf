"""What the page says about the server: models, limits, and the command that asks the same question in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from intervale.serve.app import Serving
from intervale.serve.ui_talk import Settings
from intervale.serve.ui_words import pick


@dataclass(frozen=True)
class Facts:
    """What the command line knows. `adapter`: the run behind the first model; `most_tiles`: what a picture may be cut into; `report`: by language."""

    engine: str = "local"
    adapter: str = ""
    serve_line: str = ""
    most_tiles: int = 12
    report: Mapping[str, bytes] | None = None


def chat_line(model: str, url: str, chosen: Settings) -> str:
    """The terminal's command with these settings."""
    words = ["intervale", "chat", model, "-i", "PICTURE", "QUESTION", "--base-url", f"{url}/v1"]
    if chosen.temperature:
        words += ["--temperature", f"{chosen.temperature:g}", "--top-p", f"{chosen.top_p:g}"]
    words += ["--max-new-tokens", str(chosen.most)]
    if chosen.seed is not None:
        words += ["--seed", str(chosen.seed)]
    return shlex.join(words)


def about_html(facts: Facts, serving: Serving, models: tuple[str, ...], url: str, chosen: Settings, language: str) -> str:
    """The About tab."""

    def say(en: str, zh: str) -> str:
        return pick(language, en, zh)

    limits, media = serving.limits, serving.media
    rows = [
        (say("models", "模型"), ", ".join(models)),
        (say("adapter", "适配器"), facts.adapter or say("none: a model as it is", "无：模型本身")),
        (say("engine", "引擎"), facts.engine),
        (say("pictures", "图片"), say(f"at most {media.pictures} in a conversation", f"一次对话最多 {media.pictures} 张")),
        (
            say("a picture", "每张图片"),
            say(
                f"{media.picture_bytes >> 20} MiB, {media.picture_pixels / 1e6:g} megapixels, {facts.most_tiles} tile{'s' * (facts.most_tiles != 1)}",
                f"{media.picture_bytes >> 20} MiB，{media.picture_pixels / 1e6:g} 百万像素，{facts.most_tiles} 块",
            ),
        ),
        (say("answer", "回答"), say(f"at most {limits.new_tokens:,} tokens", f"最多 {limits.new_tokens:,} 个 token")),
        (
            say("your data", "你的数据"),
            say(
                "the conversation is yours alone, and gone within an hour after the tab is closed; pictures are deleted two hours after their last use",
                "对话只属于你，关闭标签页后一小时内消失；图片在最后一次使用两小时后删除",
            ),
        ),
    ]
    table = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    lines = [
        (say("The same in a terminal", "在终端里做同样的事"), chat_line(chosen.model or models[0], url, chosen)),
        (say("This server", "这个服务"), facts.serve_line),
        (say("For programs", "给程序用"), f'OpenAI(base_url="{url}/v1")  # model="{models[0]}"'),
    ]
    button = f'<button type="button" data-copy data-done="{say("copied", "已复制")}">{say("copy", "复制")}</button>'
    code = "".join(f'<h3>{escape(title)}</h3><div class="iv-line"><pre>{escape(line)}</pre>{button}</div>' for title, line in lines if line)
    return f"<table>{table}</table>{code}"
