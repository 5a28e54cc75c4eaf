"""A drawn stand-in for the FoodieQA benchmark: its file names, its schema and every trap its real files hold.

Promises: the answer of an item follows from the colour, shape or number of things on the plate, so that a small model can learn
it; no two dishes have the same picture; the same bytes every time. Cost: about 60 small pictures, a tenth of a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"川菜（四川，重庆）": "#c8281e", "黔菜 (贵州）": "#3c8c32", "上海本帮菜": "#6e3c1e", "徽菜 （安徽） ": "#e6be32"}
REGIONS = ["四川", "贵州", "上海", "安徽"]
SHAPES = ["炒", "蒸", "烤"]  # circle, square, triangle
FLAVOURS = ["麻辣", "清淡", "咸鲜"]
COUNTS = ["一块", "两块", "三块", "四块"]
DISHES = ["红烧鱼", "青椒肉", "酱鸭", "蛋饼", "红油饺", "菜团子", "熏肉", "南瓜糕", "辣子鸡", "豌豆尖", "腊味", "玉米烙"]
NAMES = {
    0: "images/a dish with spaces.png",
    1: "images/菜 二.png",
    2: "images/UPPER.JPEG",
    3: "images/turned.jpg",
    4: "images/alpha.png",
}
SIDEWAYS = 3  # the dish whose JPEG is stored on its side (EXIF orientation 6)
TYPES = ["cuisine_type", "cooking-skills", "flavor", "region-2", "present", "main-ingredient"]


def draw(colour: str, shape: int, count: int, shift: int = 0, mode: str = "RGB") -> Image.Image:
    """A plate of 96x64 pixels with `count` things on it."""
    picture = Image.new("RGB", (96, 64), (235, 235 - shift, 225))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((4, 4, 92, 60), fill="white", outline="gray")
    for number in range(count):
        x, y = 14 + 18 * number, 22 + shift % 9
        if shape == 0:
            pen.ellipse((x, y, x + 15, y + 15), fill=colour)
        elif shape == 1:
            pen.rectangle((x, y, x + 15, y + 15), fill=colour)
        else:
            pen.polygon([(x, y + 15), (x + 15, y + 15), (x + 7, y)], fill=colour)
    return picture.convert(mode)


def _name(dish: int) -> str:
    return NAMES.get(dish, f"images/dish_{dish}.png")


def _draw_dishes(folder: Path) -> None:
    for dish in range(len(DISHES)):
        colour = list(COLOURS.values())[dish % 4]
        picture = draw(colour, dish // 4, (dish * 3) % 4 + 1, mode="RGBA" if _name(dish).endswith("alpha.png") else "RGB")
        if dish == SIDEWAYS:
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.transpose(Image.Transpose.ROTATE_90).save(folder / _name(dish), quality=95, exif=exif)
        else:
            picture.save(folder / _name(dish))


def _single(number: int) -> dict[str, Any]:
    kind, dish = TYPES[number // 4], number % 12
    colour, shape, count = dish % 4, dish // 4, (dish * 3) % 4
    question, choices, answer = {
        "cuisine_type": ("图片中的食物通常属于哪个菜系?", list(COLOURS), colour),
        "cooking-skills": ("图片中的食物是怎么做的?", SHAPES, shape),  # three choices, not four
        "flavor": ("图片中的食物是什么味道?", [*FLAVOURS, "甜"], shape),
        "region-2": ("图片中的食物来自哪里?", REGIONS, colour),
        "present": ("图片中有几块?", COUNTS, count),
        "main-ingredient": ("图片中的食物叫什么名字? ", [f"{DISHES[(dish + step) % 12]}  " for step in range(4)], 0),
    }[kind]
    item: dict[str, Any] = {
        "question": question,
        "choices": choices,
        "answer": str(answer),
        "question_type": kind,
        "food_name": DISHES[dish],
        "question_id": f"vqa-{number}",
        "food_meta": {
            "main_ingredient": [],
            "id": dish,
            "food_name": DISHES[dish],
            "food_type": list(COLOURS)[colour],
            "food_location": "",
            "food_file": _name(dish),
        },
        "question_en": f"Question of type {kind}?",
        "choices_en": [f"{kind} {index}" for index in range(len(choices))],
    }
    if number == 5:
        item["food_meta"]["web_file"] = "images/from_the_web.jpg"  # it is not there, and nothing may ask for it
    if number == 6:
        del item["question_en"], item["choices_en"]
    if number == 7:
        item["qid"] = item.pop("question_id")
    return item


def _multi(folder: Path, number: int) -> dict[str, Any]:
    names = []
    for option in range(4):
        name = f"images/mi_{number}_{option}.png"
        draw(list(COLOURS.values())[option], number % 3, number % 4 + 1, shift=number + 1).save(folder / name)
        names.append(name)
    item: dict[str, Any] = {
        "question": "以下哪道菜是红色的？",
        "choices": "",
        "answer": "0",
        "question_type": "color",
        "question_id": f"{number:032x}_{number}",
        "ann_group": "meat",
        "images": names,
        "question_en": "Which of the following is red?",
    }
    if number == 1:
        item["choices"] = ["红", "绿", "褐", "黄"]
    if number == 2:
        del item["question_en"]
    return item


def _words(number: int) -> dict[str, Any]:
    return {
        "question": f"{DISHES[number]}属于哪个菜系?",
        "choices": [f" {cuisine}" for cuisine in COLOURS],
        "answer": str(number % 4),
        "question_type": "cuisine_type",
        "food_name": DISHES[number],
        "cuisine_type": list(COLOURS)[number % 4],
        "question_id": f"textqa-{number}",
    }


def write_foodieqa(folder: Path, *, traps: bool) -> None:
    """Write sivqa_tidy.json (24 items), mivqa_tidy.json (12), textqa_tidy.json (12) and images/ below `folder`.

    The oddities that are no faults are always there (spaces and 中文 in names, .JPEG, EXIF, RGBA, mixed brackets, trailing
    blanks, `qid`, three choices, `choices: ""`, no English, web_file). With `traps` three sivqa items are faulty: the picture
    of item 9 is missing, item 10 has the id of item 8, the answer of item 11 is "4".
    """
    (folder / "images").mkdir(parents=True)
    _draw_dishes(folder)
    single = [_single(number) for number in range(24)]
    if traps:
        single[9]["food_meta"]["food_file"] = "images/not_there.jpg"
        single[10]["question_id"] = "vqa-8"
        single[11]["answer"] = "4"
    parts = {"sivqa": single, "mivqa": [_multi(folder, n) for n in range(12)], "textqa": [_words(n) for n in range(12)]}
    for task, items in parts.items():
        (folder / f"{task}_tidy.json").write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")


FOODS = {"苹果": ("red apple", "水果"), "梨": ("pear", "水果"), "面包": ("bread", "主食"), "茄子": ("eggplant", "蔬菜")}
ARTISTS = {"noto": "train", "openmoji": "train", "twemoji": "test"}


def write_emoji(folder: Path) -> None:
    """Write sivqa_tidy.json (24 items) and images/ in the shape of the embedded data set: four foods, each drawn by three artists.

    Two questions a picture. The items carry `artist` and the source's own `split`: two artists to train on, one to test on.
    """
    (folder / "images").mkdir(parents=True)
    names, english = list(FOODS), [word for word, _ in FOODS.values()]
    items = []
    for artist, side in ARTISTS.items():
        for number, (food, (_, kind)) in enumerate(FOODS.items()):
            file = f"images/{artist}-{number}.png"
            draw(list(COLOURS.values())[number], number % 3, number + 1, shift=list(ARTISTS).index(artist) + 20).save(folder / file)
            meta = {"main_ingredient": [], "id": number, "food_name": food, "food_type": kind, "food_location": "", "food_file": file}
            shared = {"food_name": food, "food_meta": meta, "split": side, "artist": artist}
            name = {"question": "图片中的食物是什么?", "choices": names, "question_en": "What is the food?", "choices_en": english}
            kinds = {
                "question": "这是哪类食物?",
                "choices": ["水果", "主食", "蔬菜"],
                "question_en": "What kind is it?",
                "choices_en": list("FSV"),
            }
            items.append({**name, "answer": str(number), "question_type": "name", "question_id": f"name-{artist}-{number}", **shared})
            answer = str(kinds["choices"].index(kind))
            items.append({**kinds, "answer": answer, "question_type": "kind", "question_id": f"kind-{artist}-{number}", **shared})
    (folder / "sivqa_tidy.json").write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")
