"""The food items, their names and the questions: all words from CLDR, all groups from Unicode's own emoji list.

An item's name is CLDR's short name, or, where that is clumsy (装有食物的浅底锅), another word CLDR lists for it: NAMES says which,
and `items` refuses a word that CLDR does not have. What an item is made with, and where it is from, is asked only where CLDR's
keywords say so (EVIDENCE is checked the same way).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from artists import MODULES, TRAIN, code_of, icon_name

FOOD_GROUP = 4  # "food-drink" in emojibase's groups
# Unicode 17 moved what lives in the sea to the animals; as food these five are still seafood.
MARINE = ("1f980", "1f99e", "1f990", "1f991", "1f9aa")
GROUPS = {  # Unicode subgroup -> (key, zh, en)
    "food-fruit": ("fruit", "水果", "fruit"),
    "food-vegetable": ("vegetable", "蔬菜", "vegetable"),
    "food-prepared": ("prepared", "熟食", "prepared food"),
    "food-asian": ("asian", "亚洲美食", "Asian food"),
    "food-marine": ("marine", "海鲜", "seafood"),
    "food-sweet": ("sweet", "甜点", "dessert"),
    "drink": ("drink", "饮料", "drink"),
    "dishware": ("tableware", "餐具", "tableware"),
}
NAMES = {  # code -> (zh or "", en or ""): another of CLDR's words for it
    "1f34a": ("", "orange"), "1f951": ("牛油果", ""), "1f33d": ("", "corn"), "1f9c4": ("大蒜", ""), "1fad8": ("豆子", ""), "1f96c": ("生菜", "lettuce"),
    "1f956": ("", "baguette"), "1f36b": ("", "chocolate"), "1f9c0": ("奶酪", "cheese"), "1f357": ("鸡腿", "drumstick"), "1f969": ("牛排", "steak"),
    "1f958": ("西班牙海鲜饭", "paella"), "1f372": ("炖菜", "stew"), "1f371": ("便当", "bento"), "1f35c": ("拉面", "ramen"),
    "1f35d": ("意大利面", ""), "1f366": ("圆筒冰淇淋", ""), "1f36c": ("糖果", ""), "1f36e": ("蛋奶冻", ""), "1f36f": ("", "honey"), "1f95b": ("牛奶", "milk"),
    "2615": ("咖啡", "coffee"), "1f375": ("", "teacup"), "1f37e": ("香槟", ""), "1f377": ("", "wine"), "1f378": ("", "cocktail"), "1f379": ("热带饮料", ""),
    "1f37a": ("", "beer"), "1f943": ("威士忌", "whiskey"), "1f964": ("汽水", "soda"), "1f9c3": ("果汁", "juice"), "1f37d": ("刀叉与盘", ""), "1f944": ("勺子", ""),
    "1f961": ("外卖", "takeout"), "1f336": ("辣椒", ""), "1fad1": ("青椒", ""), "1f95e": ("煎饼", ""),
}  # fmt: skip
# What it is made with: (zh, en, codes, CLDR words one of which must stand in the keywords: zh, en).
MADE_WITH = (
    ("米", "rice", ("1f358", "1f359", "1f35a"), ("米",), ("rice",)),
    ("面包", "bread", ("1f950", "1f956", "1fad3", "1f96f", "1f96a"), ("面包",), ("bread",)),
    ("肉", "meat", ("1f356", "1f969", "1f953"), ("肉",), ("meat",)),
    ("奶酪", "cheese", ("1f355", "1fad5"), ("奶酪", "起司"), ("cheese",)),
    ("蛋", "egg", ("1f373",), ("蛋",), ("egg",)),
    ("巧克力", "chocolate", ("1f36a",), ("巧克力片",), ("chocolate",)),
    ("牛奶", "milk", ("1f9cb",), ("牛奶",), ("milk",)),
    ("鱼", "fish", ("1f365",), ("鱼",), ("fish",)),
    ("鹰嘴豆", "chickpea", ("1f9c6",), ("鹰嘴豆",), ("chickpea",)),
    ("香肠", "sausage", ("1f32d",), ("香肠",), ("sausage",)),
    ("海鲜", "seafood", ("1f362",), ("海鲜",), ("seafood",)),
    ("茶", "tea", ("1fad6", "1f375"), ("茶",), ("tea",)),
    ("酒", "alcohol", ("1f377", "1f378", "1f379", "1f37a", "1f37b"), ("酒",), ("alcohol",)),
)
# Where it is from: (zh, en, codes, words as above; one language is enough, the answer is the same).
FROM = (
    ("墨西哥", "Mexico", ("1f32e", "1f32f", "1fad4"), ("墨西哥",), ("mexican",)),
    ("日本", "Japan", ("1f359", "1f361"), ("日本",), ("Japanese",)),
    ("法国", "France", ("1f950", "1f956"), ("法式",), ("french",)),
    ("瑞士", "Switzerland", ("1fad5",), ("瑞士",), ()),
    ("中国", "China", ("1f961", "1f96e"), ("中式外卖", "中秋节"), ()),
)


@dataclass(frozen=True)
class Food:
    """One item: its code points, group key, and what is asked about it, each as (zh, en) or None."""

    code: str
    group: str
    name: tuple[str, str]
    category: tuple[str, str]
    made_with: tuple[str, str] | None
    origin: tuple[str, str] | None


@cache
def emoji_list() -> list[dict[str, Any]]:
    """emojibase's list: hexcode, emoji, group, subgroup, order."""
    return json.loads((MODULES / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))


@cache
def _subgroups() -> dict[str, str]:
    return json.loads((MODULES / "emojibase-data" / "meta" / "groups.json").read_text(encoding="utf-8"))["subgroups"]


@cache
def annotations(language: str) -> dict[str, dict[str, list[str]]]:
    """CLDR's words: {emoji: {default: keywords, tts: [short name]}}."""
    path = MODULES / "cldr-annotations-full" / "annotations" / language / "annotations.json"
    return json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]


def words(emoji: str, language: str) -> tuple[str, list[str]]:
    """(short name, keywords) of an emoji; empty when CLDR has none."""
    entry = annotations(language).get(emoji.replace("\ufe0f", ""), {})
    return (entry.get("tts") or [""])[0], entry.get("default", [])


def subgroup(entry: dict[str, Any]) -> str:
    """Unicode's subgroup of an emoji, the five of the sea as food."""
    if code_of(entry["hexcode"]) in MARINE:
        return "food-marine"
    return _subgroups().get(str(entry.get("subgroup")), "")


def is_food(entry: dict[str, Any]) -> bool:
    """Does foodemoji ask about it, or show something that is nearly an item (the other mushroom)?"""
    return entry.get("group") == FOOD_GROUP or code_of(entry["hexcode"]) in (*MARINE, "1f344")


def _name(entry: dict[str, Any]) -> tuple[str, str]:
    chosen = []
    for language, other in zip(("zh", "en"), NAMES.get(code_of(entry["hexcode"]), ("", "")), strict=True):
        short, keywords = words(entry["emoji"], language)
        assert not other or other in keywords, f"{entry['emoji']}: CLDR ({language}) has no word {other!r}: {keywords}"
        chosen.append(other or short)
    return chosen[0], chosen[1]


def _claim(entry: dict[str, Any], table: tuple[Any, ...], both: bool) -> tuple[str, str] | None:
    """The table's answer for an item, after CLDR's keywords were seen to say so (in both languages, or in one)."""
    code = code_of(entry["hexcode"])
    for zh, en, codes, *evidence in table:
        if code in codes:
            said = [
                any(word in words(entry["emoji"], lang)[1] for word in wanted) for lang, wanted in zip(("zh", "en"), evidence, strict=True)
            ]
            assert all(said) if both else any(said), f"{entry['emoji']}: CLDR does not say {zh}/{en}: {words(entry['emoji'], 'zh')}"
            return zh, en
    return None


@cache
def items() -> tuple[Food, ...]:
    """Every item drawn by two or more of the training artists, in Unicode's order."""
    found = []
    for entry in sorted(emoji_list(), key=lambda e: e.get("order") or 0):
        code, group = code_of(entry["hexcode"]), subgroup(entry)
        if group not in GROUPS or not is_food(entry) or sum(icon_name(artist, code) is not None for artist in TRAIN) < 2:
            continue
        key, zh, en = GROUPS[group]
        found.append(Food(code, key, _name(entry), (zh, en), _claim(entry, MADE_WITH, True), _claim(entry, FROM, False)))
    for at in (0, 1):
        names = [food.name[at] for food in found]
        assert len(set(names)) == len(names), f"two items have one name: {sorted(n for n in names if names.count(n) > 1)}"
    return tuple(found)
