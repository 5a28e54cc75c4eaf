"""Draw a little data set in FoodieQA's schema: plates of food whose colour tells the cuisine and whose shape tells the ingredient.

    python demo/draw.py FOLDER [COUNT]

Every picture is another one (background, size, place, tint), every dish has its own name, so a held-out plate was never seen.
Deterministic. Nothing here is FoodieQA's: the cuisines are real, which colour belongs to which is made up.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

CUISINES = {"川菜": (200, 45, 40), "粤菜": (225, 190, 60), "苏菜": (60, 150, 80), "新疆菜": (70, 80, 190)}
INGREDIENTS = ("豆腐", "鱼", "面条", "羊肉")
SIZE = 112


def draw_food(canvas: ImageDraw.ImageDraw, box: tuple[int, int, int, int], ingredient: str, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    middle = (left + right) // 2
    if ingredient == "豆腐":
        canvas.rectangle(box, fill=colour)
    elif ingredient == "鱼":
        canvas.polygon([(left, bottom), (middle, top), (right, bottom)], fill=colour)
    elif ingredient == "面条":
        for x in range(left, right, 8):
            canvas.line([(x, top), (x, bottom)], fill=colour, width=4)
    else:
        canvas.ellipse(box, fill=colour)


def draw_plate(rng: random.Random, cuisine: str, ingredient: str) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(170, 250) for _ in range(3)))
    canvas = ImageDraw.Draw(picture)
    shift = (rng.randint(-6, 6), rng.randint(-6, 6))
    plate = (10 + shift[0], 10 + shift[1], 102 + shift[0], 102 + shift[1])
    canvas.ellipse(plate, fill=(245, 245, 240), outline=(150, 150, 150), width=2)
    inset = rng.randint(20, 26)
    colour = tuple(max(0, min(255, value + rng.randint(-18, 18))) for value in CUISINES[cuisine])
    draw_food(canvas, (plate[0] + inset, plate[1] + inset, plate[2] - inset, plate[3] - inset), ingredient, colour)
    return picture


def questions(number: int, file: str, cuisine: str, ingredient: str, rng: random.Random) -> list[dict[str, object]]:
    asked = []
    for kind, question, choices, right in (
        ("cuisine_type", "图片中的食物通常属于哪个菜系?", list(CUISINES), cuisine),
        ("main-ingredient", "图片中的食物的主要食材是什么?", list(INGREDIENTS), ingredient),
    ):
        rng.shuffle(choices)
        name = f"彩盘{number}号"
        meta = {
            "main_ingredient": [ingredient],
            "id": number,
            "food_name": name,
            "food_type": cuisine,
            "food_location": "",
            "food_file": file,
        }
        entry = {"question": question, "choices": choices, "answer": str(choices.index(right)), "question_type": kind, "food_name": name}
        asked.append(entry | {"question_id": f"plate-{number}-{kind}", "food_meta": meta})
    return asked


def main(folder: Path, count: int) -> None:
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    items = []
    pairs = [(cuisine, ingredient) for cuisine in CUISINES for ingredient in INGREDIENTS]
    for number in range(count):
        cuisine, ingredient = pairs[number % len(pairs)]
        file = f"images/plate-{number:03d}.png"
        draw_plate(rng, cuisine, ingredient).save(folder / file)
        items += questions(number, file, cuisine, ingredient, rng)
    (folder / "sivqa_tidy.json").write_text(json.dumps(items, ensure_ascii=False, indent=1))
    print(f"drew {count} plates with {len(items)} questions in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 240)
