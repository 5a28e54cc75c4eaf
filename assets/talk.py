"""What is said about a picture in nano's pre-training: short conversations in Chinese and English, made from what is known of it.

Of food only the group, colours, shape and place are ever said. All sentences are this file's own. Standard library and NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from compose import Placed

Pair = tuple[str, str]  # a question or sentence, and its answer
ZH, EN = 0, 1
# name -> (zh, en); which one a colour is: `colour_name`.
COLOURS = {
    "red": ("红色", "red"), "orange": ("橙色", "orange"), "yellow": ("黄色", "yellow"), "green": ("绿色", "green"), "cyan": ("青色", "cyan"), "blue": ("蓝色", "blue"),
    "purple": ("紫色", "purple"), "pink": ("粉色", "pink"), "brown": ("棕色", "brown"), "beige": ("米色", "beige"), "black": ("黑色", "black"), "white": ("白色", "white"),
    "grey": ("灰色", "grey"),
}  # fmt: skip
_NAMES = list(COLOURS)
BARE = 0.7  # share of the answers that are the name alone
CELLS = 3  # the drawing's box is looked at in 3 x 3 cells


@dataclass(frozen=True)
class Seen:
    """What the pixels tell: colours by area, a colour (or None: empty) a cell, the ground's, how wide it is, where it stands."""

    colours: tuple[str, ...]
    cells: tuple[tuple[str | None, ...], ...]
    ground: str
    shape: int  # 0 wide, 1 tall, 2 about square
    place: tuple[int, int]  # -1, 0, 1: left/middle/right, above/middle/below
    large: bool


def colour_names(pixels_NC: np.ndarray) -> np.ndarray:
    """The index into COLOURS of every RGB pixel (0..255), by hue, saturation and value."""
    rgb = pixels_NC.astype(np.float32) / 255
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-6)
    red, green, blue = rgb.T
    safe = np.maximum(chroma, 1e-6)
    hue = (
        np.where(value == red, ((green - blue) / safe) % 6, np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
        * 60
    )
    at = {name: number for number, name in enumerate(_NAMES)}
    rules = [  # the first that holds
        (value < 0.2, "black"),
        ((saturation < 0.12) & (value > 0.88), "white"),
        (saturation < 0.15, "grey"),
        ((hue < 50) & (hue > 15) & (saturation < 0.45) & (value > 0.7), "beige"),
        ((hue < 50) & (hue > 8) & (value < 0.7), "brown"),
        (((hue < 15) | (hue > 330)) & (saturation < 0.5) & (value > 0.7), "pink"),
        ((hue > 290) & (hue < 345) & (value > 0.75), "pink"),
        ((hue < 15) | (hue >= 340), "red"),
        (hue < 40, "orange"),
        (hue < 68, "yellow"),
        (hue < 165, "green"),
        (hue < 195, "cyan"),
        (hue < 255, "blue"),
        (hue < 340, "purple"),
    ]
    return np.select([rule for rule, _ in rules], [at[name] for _, name in rules], at["grey"])


def look(placed: Placed) -> Seen:
    """Read colours, shape and place off a finished picture's drawing."""
    left, top, right, bottom = placed.box
    size = placed.picture.width
    pixels = np.asarray(placed.drawing)[top:bottom:2, left:right:2]  # every other pixel tells as much
    opaque = pixels[..., 3] > 128
    names = colour_names(pixels[..., :3].reshape(-1, 3)).reshape(opaque.shape)
    counts = np.bincount(names[opaque], minlength=len(_NAMES)) / max(1, int(opaque.sum()))
    found = tuple(_NAMES[i] for i in np.argsort(-counts) if counts[i] > 0.07)[:4] or ("grey",)
    rows = np.array_split(np.arange(opaque.shape[0]), CELLS)
    columns = np.array_split(np.arange(opaque.shape[1]), CELLS)
    cells = []
    for row in rows:
        line: list[str | None] = []
        for column in columns:
            solid, inside = opaque[np.ix_(row, column)], names[np.ix_(row, column)]
            line.append(_NAMES[int(np.bincount(inside[solid]).argmax())] if solid.mean() > 0.35 else None)
        cells.append(tuple(line))
    wide, high = right - left, bottom - top
    shape = 0 if wide > 1.25 * high else 1 if high > 1.25 * wide else 2
    middle = ((left + right) / 2 / size, (top + bottom) / 2 / size)
    place = tuple(-1 if at < 0.42 else 1 if at > 0.58 else 0 for at in middle)
    ground = _NAMES[int(colour_names(np.array([placed.ground]))[0])]
    return Seen(found, tuple(cells), ground, shape, (place[0], place[1]), max(wide, high) > 0.75 * size)


def _article(text: str) -> str:
    return ("an " if text[0].lower() in "aeiou" else "a ") + text


def _thing(about: dict[str, Any], lang: int) -> str:
    """The name, or for food a kind: 一种水果, a kind of fruit."""
    if about["food"]:
        return ("一种" if lang == ZH else "a kind of ") + about["group"][lang]
    return str(about["name"][lang])


def _listed(colours: Sequence[str], lang: int) -> str:
    words = [COLOURS[colour][lang] for colour in colours]
    if len(words) == 1:
        return words[0]
    return ("、".join(words[:-1]) + "和" + words[-1]) if lang == ZH else ", ".join(words[:-1]) + " and " + words[-1]


# Asked like this, the name alone is the answer; the other questions get a sentence.
_BARE = (
    ("图片里是什么?", "图里是什么？只说名称。", "它叫什么？"),
    ("What is in the picture?", "Name the thing in the picture.", "What is it called?"),
)
_SENTENCE = (
    ("这是什么?", "图中画的是什么？", "请问图里是什么东西？"),
    ("What is this?", "What does the picture show?", "What do I see here?"),
)


def identity(about: dict[str, Any], seen: Seen | None, lang: int, rng: np.random.Generator) -> Pair:
    """What is it?"""
    if rng.random() < BARE:
        return str(rng.choice(_BARE[lang])), str(about["group"][lang] if about["food"] else about["name"][lang])
    thing = _thing(about, lang)
    return str(rng.choice(_SENTENCE[lang])), f"这是{thing}。" if lang == ZH else f"This is {thing}."


def caption(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair:
    """A sentence about all of it."""
    thing, colours, ground = _thing(about, lang), _listed(seen.colours[:2], lang), COLOURS[seen.ground][lang]
    if lang == ZH:
        return str(
            rng.choice(("描述一下这张图片。", "请描述图片。", "图里有什么？说一句话。"))
        ), f"图片里是{thing}，主要是{colours}，背景是{ground}。"
    ask = str(rng.choice(("Describe the picture.", "Describe this image in one sentence.", "What do you see?")))
    return ask, f"The picture shows {thing}, mainly {colours}, on {_article(ground)} background."


def colours(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair:
    """Its colours, the largest first."""
    if lang == ZH:
        return str(rng.choice(("它是什么颜色?", "有哪些颜色？"))), f"{_listed(seen.colours, lang)}。"
    return str(rng.choice(("What colour is it?", "Which colours does it have?"))), f"{_listed(seen.colours, lang).capitalize()}."


def cells(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair:
    """A colour for each of nine cells: the vision tower has to look everywhere."""
    empty = ("空", "empty")[lang]
    rows = [" ".join(COLOURS[cell][lang].removesuffix("色") if cell else empty for cell in row) for row in seen.cells]
    if lang == ZH:
        return "从上到下，从左到右说说颜色。", "；".join(rows) + "。"
    return "Name the colours from top to bottom, left to right.", "; ".join(rows) + "."


def group(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair:
    """Which kind of thing it is."""
    name = str(about["group"][lang])
    if rng.random() < BARE:
        return ("它是哪一类？" if lang == ZH else "Which kind is it?"), name
    if lang == ZH:
        return str(rng.choice(("它是哪一种东西？", "这属于什么？"))), f"属于{name}。"
    return str(rng.choice(("What kind of thing is it?", "What sort of thing is this?"))), f"It is a kind of {name}."


def keywords(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair | None:
    """Words that go with it; none for food."""
    found = [] if about["food"] else about["keywords"][lang]
    if len(found) < 2:
        return None
    chosen = [found[i] for i in sorted(rng.permutation(len(found))[:3])]
    if lang == ZH:
        return "说几个和它有关的词。", "、".join(chosen) + "。"
    return "Give some words that go with it.", ", ".join(chosen) + "."


def ground(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair:
    """The colour behind it."""
    name = COLOURS[seen.ground][lang]
    return ("背景是什么颜色?", f"{name}。") if lang == ZH else ("What colour is the background?", f"{name.capitalize()}.")


def shape(about: dict[str, Any], seen: Seen, lang: int, rng: np.random.Generator) -> Pair:
    """Its size, outline and place."""
    if lang == ZH:
        across, down = ("左", "中间", "右")[seen.place[0] + 1], ("上", "中间", "下")[seen.place[1] + 1]
        where = (
            "中间" if across == down else (across + "边" if down == "中间" else down + "边" if across == "中间" else across + down + "角")
        )
        return "它是什么形状，在哪里？", f"{('宽的', '高的', '差不多方的')[seen.shape]}，{'大' if seen.large else '小'}，在{where}。"
    across, down = ("left", "middle", "right")[seen.place[0] + 1], ("top", "middle", "bottom")[seen.place[1] + 1]
    where = "middle" if across == down else across if down == "middle" else down if across == "middle" else f"{down} {across}"
    return (
        "What shape is it, and where?",
        f"{('Wide', 'Tall', 'About square')[seen.shape]}, {'large' if seen.large else 'small'}, in the {where}.",
    )


def yes_no(about: dict[str, Any], other: dict[str, Any], lang: int, rng: np.random.Generator) -> Pair:
    """Is it this? Half of the time it is."""
    true = rng.random() < 0.5 or (about["group"] == other["group"] and about["food"] == other["food"] and about["food"])
    asked, thing = _thing(about if true else other, lang), _thing(about, lang)
    if lang == ZH:
        return f"这是{asked}吗？", f"是的，这是{thing}。" if true else f"不是，这是{thing}。"
    return f"Is this {asked}?", f"Yes, this is {thing}." if true else f"No, this is {thing}."


Task = Callable[[dict[str, Any], Seen, int, np.random.Generator], Pair | None]
# How often each is asked beside the identity, which every conversation has.
TASKS: tuple[tuple[Task, float], ...] = ((caption, 2.5), (colours, 1.5), (cells, 0.8), (group, 2), (keywords, 2), (ground, 0.7), (shape, 1))

CHAT = (
    ("你好", "你好！给我一张小图，我来说说里面有什么。"), ("你好，你是谁？", "我是 nano，一个很小的看图模型。"), ("你叫什么名字?", "我叫 nano。"), ("你是谁", "我是 nano，一个很小的看图模型，只认识画出来的小图。"),
    ("你能做什么？", "我能说出小图里的东西、颜色和形状，用中文或英文。"), ("你会说英语吗？", "会一点。You can ask me in English."), ("谢谢", "不客气！"), ("谢谢你", "不客气，再给我一张图吧。"),
    ("再见", "再见！"), ("早上好", "早上好！今天想看什么图？"), ("晚上好", "晚上好！"), ("在吗", "在的，请发一张图片。"), ("讲个笑话", "我太小了，还不会讲笑话。"), ("1加1等于几？", "我不会算数，只会看图。"),
    ("今天天气怎么样？", "我不知道今天的天气，我只会看图。"), ("帮我写一篇文章", "我太小了，写不了文章，只会看图说一两句话。"), ("图片里是什么?", "还没有图片，请先发一张。"), ("描述一下这张图片。", "还没有图片，请先发一张。"), ("你有多大？", "我有大约八百万个参数，很小。"),
    ("谁训练了你？", "我是 intervale 项目用开源的表情图画训练的。"), ("这个菜好吃吗？", "我不知道好不好吃，我只会看图。"),
    ("Hello", "Hello! Give me a small picture and I will say what is in it."), ("Hi", "Hi! Show me a picture."), ("Who are you?", "I am nano, a very small model that looks at pictures."), ("What is your name?", "My name is nano."),
    ("What can you do?", "I can name what is in a small drawing, its colours and its shape, in Chinese or English."), ("Do you speak Chinese?", "Yes, a little. 你可以用中文问我。"), ("Thanks", "You are welcome!"), ("Thank you", "You are welcome! Show me another one."),
    ("Goodbye", "Goodbye!"), ("Good morning", "Good morning! Which picture shall we look at?"), ("Tell me a joke", "I am too small to know jokes."), ("What is 1 + 1?", "I cannot count, I only look at pictures."), ("How is the weather today?", "I do not know the weather, I only look at pictures."),
    ("Write me an essay", "I am too small for that; I can say a sentence or two about a picture."), ("What is in the picture?", "There is no picture yet. Please send one."), ("Describe the picture.", "There is no picture yet. Please send one."), ("How big are you?", "I have about eight million parameters, which is very small."),
    ("Who made you?", "The intervale project trained me on open emoji drawings."), ("Is this dish good?", "I do not know how it tastes, I only look at pictures."),
)  # fmt: skip


NAMING = 0.85  # share of the conversations that ask nothing but what it is: what the vision tower learns from most


def conversation(about: dict[str, Any], placed: Placed, other: dict[str, Any], rng: np.random.Generator) -> list[Pair]:
    """What it is, and (of food always, of the rest one in seven) one or two more turns about it, in one language."""
    lang = ZH if rng.random() < 0.5 else EN
    if rng.random() < NAMING and not about["food"]:
        return [identity(about, None, lang, rng)]
    seen = look(placed)
    weights = np.array([weight for _, weight in TASKS])
    chosen = rng.choice(len(TASKS), size=int(rng.integers(1, 3)), replace=False, p=weights / weights.sum())
    turns = [pair for number in chosen if (pair := TASKS[number][0](about, seen, lang, rng)) is not None]
    main = yes_no(about, other, lang, rng) if rng.random() < 0.1 else identity(about, seen, lang, rng)
    turns.insert(int(rng.integers(0, len(turns) + 1)) if rng.random() < 0.5 else 0, main)
    return turns
