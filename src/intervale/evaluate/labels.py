"""What a reader sees instead of a code: names of tags, of their known values, and of a protocol's settings, in both languages.

Promises: a name that is not known here is data and is shown as it is. Known are FoodieQA's and foodemoji's tags (the values' counts are in
the data's own card). Cost: nothing.
"""

from __future__ import annotations

from typing import Any

from intervale.core.lang import say

_TAGS = {
    "question_type": ("kind of question", "题目类型"),
    "cuisine": ("cuisine or kind of food", "菜系或食物类别"),
    "food_name": ("dish", "菜名"),
    "group": ("group", "分组"),
    "artist": ("artist", "画师"),
    "language": ("language", "语言"),
    "colour": ("colour", "颜色"),
}
_QUESTIONS = {
    "name": ("name of the thing", "名称"),
    "food_name": ("name of the dish", "菜名"),
    "category": ("kind of food", "类别"),
    "cuisine": ("cuisine", "菜系"),
    "cuisine_type": ("cuisine", "菜系"),
    "cuisine-type": ("cuisine", "菜系"),
    "region": ("region", "地区"),
    "region-2": ("region", "地区"),
    "cooking-skills": ("way of cooking", "烹饪方法"),
    "flavor": ("flavour", "味道"),
    "taste": ("taste", "口味"),
    "present": ("presentation", "摆盘"),
    "plating": ("plating", "盛盘"),
    "main-ingredient": ("main ingredient", "主要食材"),
    "ingredients": ("ingredients", "食材"),
    "food-type": ("kind of dish", "菜品种类"),
    "color": ("colour", "颜色"),
    "eating-habit": ("eating habit", "饮食习惯"),
    "allergy": ("allergy", "过敏"),
    "amount": ("amount", "分量"),
    "smell": ("smell", "气味"),
    "expense": ("price", "价格"),
    "history": ("history", "历史"),
    "other": ("other", "其他"),
}
_CUISINES = {
    "川菜": "Sichuan", "粤菜": "Cantonese", "苏菜": "Jiangsu", "新疆菜": "Xinjiang", "西北菜": "Northwestern", "黔菜": "Guizhou", "浙菜": "Zhejiang",
    "闽菜": "Fujian", "湘菜": "Hunan", "东北菜": "Northeastern", "客家菜": "Hakka", "上海菜": "Shanghai", "徽菜": "Anhui", "云南菜": "Yunnan",
    "内蒙菜": "Inner Mongolian", "北京菜": "Beijing", "鲁菜": "Shandong", "其他": "other", "熟食": "prepared food", "亚洲美食": "Asian food",
    "饮料": "drinks", "水果": "fruit", "甜点": "sweets", "蔬菜": "vegetables", "餐具": "tableware", "海鲜": "seafood",
}  # fmt: skip
_GROUPS = {
    "meat": ("meat", "肉类"), "main-noodle": ("noodles", "面条"), "seafood": ("seafood", "海鲜"), "main-soup": ("soup", "汤"), "main-hotpot": ("hotpot", "火锅"),
    "snack": ("snack", "小吃"), "tofu": ("tofu", "豆腐"), "main-bao": ("buns", "包子"), "bbq": ("barbecue", "烧烤"), "川": ("Sichuan", "川"), "粤": ("Cantonese", "粤"),
    "西北": ("Northwestern", "西北"), "苏": ("Jiangsu", "苏"), "浙": ("Zhejiang", "浙"), "其他": ("other", "其他"), "上海": ("Shanghai", "上海"), "闽": ("Fujian", "闽"),
    "黔": ("Guizhou", "黔"), "新疆": ("Xinjiang", "新疆"), "湘": ("Hunan", "湘"), "东北": ("Northeastern", "东北"), "内蒙.赣.徽": ("Inner Mongolia, Jiangxi, Anhui", "内蒙、赣、徽"),
}  # fmt: skip
_VALUES = {"question_type": _QUESTIONS, "group": _GROUPS, "language": {"zh": ("Chinese", "中文"), "en": ("English", "英文")}}


def tag_name(tag: str) -> str:
    """A tag as a heading."""
    return say(*_TAGS[tag]) if tag in _TAGS else tag


def value_name(tag: str, value: str) -> str:
    """A tag's value as a row's name. A cuisine's provinces in brackets are kept in Chinese."""
    if tag == "cuisine":
        return say(_CUISINES.get(value.partition("（")[0], value), value)
    known = _VALUES.get(tag, {})
    return say(*known[value]) if value in known else value


def prompt_name(prompt: str) -> str:
    """How the questions were put."""
    names = {
        "open": ("bare questions", "直接提问"),
        "mcq": ("options shown", "列出选项"),
        "foodieqa": ("FoodieQA's prompts", "FoodieQA 的提问"),
    }
    return say(*names[prompt]) if prompt in names else prompt


def is_open(protocol: dict[str, Any]) -> bool:
    """Are these open answers, compared with a reference (and not choices)?"""
    return protocol.get("headline") == "contained"


def mode_name(protocol: dict[str, Any]) -> str:
    """What counted as right."""
    if is_open(protocol):
        return say("open answers", "开放作答")
    names = {
        "strict": ("strict answers", "严格作答"),
        "likelihood": ("likelihood", "似然"),
        "official": ("the benchmark's own rule", "基准官方规则"),
    }
    return say(*names[protocol["mode"]]) if protocol["mode"] in names else str(protocol["mode"])


def _value(value: Any) -> str:
    return say("yes", "是") if value is True else say("no", "否") if value is False else str(value)


def _told(key: str, value: Any) -> str:
    """One setting of a protocol in words; '' for what another setting has said already."""
    known = {
        "max_new_tokens": (f"at most {value} new tokens", f"最多生成 {value} 个 token"),
        "max_tiles": (f"at most {value} tile{'' if value == 1 else 's'} a picture", f"每张图最多 {value} 个切片"),
        "task": (f"task {value}", f"任务 {value}"),
        "language": {"zh": ("in Chinese", "中文"), "en": ("in English", "英文")}.get(value, (str(value), str(value))),
        "wording": (f"wording {value}", f"提问措辞 {value}"),
        "seed": (f"seed {value}", f"随机种子 {value}"),
        "headline": {
            "sum": ("a choice's log-probabilities added up", "选项各 token 对数概率之和"),
            "contained": ("right: the reference is contained", "包含参考答案即为正确"),
        }.get(value, (str(value), str(value))),
        "view": {
            "picture": ("", ""),
            "blind": ("without the pictures", "不给图片"),
            "food-name": ("the dish is named", "给出菜名"),
            "name-only": ("the dish's name instead of the picture", "只给菜名，不给图片"),
        }.get(value, (str(value), str(value))),
        "turn": {"as-is": ("options in the data's order", "选项保持原顺序"), "seeded": ("options in a drawn order", "选项随机排序")}.get(
            value, (f"options turned ({value})", f"选项轮换（{value}）")
        ),
        "fallback": {"wrong": ("no letter is wrong", "无字母即判错"), "a": ("no letter is A", "无字母按 A 计"), "random": ("no letter: one is drawn", "无字母则随机取")}.get(
            value, (str(value), str(value))
        ),
        "prefix_as": {
            "user": ("the forced beginning ends the question", "强制前缀附在问题末尾"),
            "assistant": ("the forced beginning opens the answer", "强制前缀作为回答开头"),
        }.get(value, (str(value), str(value))),
        "suite": ("", ""),
    }  # fmt: skip
    return say(*known[key]) if key in known else f"{key} {_value(value)}"


def protocol_words(protocol: dict[str, Any]) -> str:
    """All of a protocol as one line; settings not known here as `key value`."""
    settings = [_told(key, value) for key, value in protocol.items() if key not in ("prompt", "mode") and value is not None]
    return say("; ", "；").join([prompt_name(protocol["prompt"]), mode_name(protocol), *filter(None, settings)])
