"""Render what nano is pre-trained on: every emoji of the training artists, with what may be said of it. First of two steps.

    python assets/build_sprites.py build/nano

writes sprites.zip (one WebP with transparency a drawing) and sprites.jsonl (a line each: file, food, names, groups, keywords).
Of food only the group is written down, never a name or a keyword: the base model must not know the dishes.
Left out: flags (one artist drew them), skin tones (one of six each), hair components.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from artists import TRAIN, code_of, icon_name, render
from foods import GROUPS, emoji_list, is_food, subgroup, words

SIZE, QUALITY = 128, 78
_LEFT_OUT = (2, 9)  # components, flags
# Unicode's subgroups (by their beginning) in plain words: (zh, en).
PLAIN = (
    ("face-", "表情", "face"), ("cat-face", "表情", "face"), ("monkey-face", "表情", "face"), ("heart", "心形", "heart"), ("emotion", "情绪符号", "emotion sign"),
    ("hand", "手势", "hand gesture"), ("body-parts", "身体部位", "part of the body"), ("person", "人物", "person"), ("family", "人物", "person"),
    ("animal-bird", "鸟类", "bird"), ("animal-bug", "虫类", "small creature"), ("animal-marine", "水生动物", "sea animal"), ("animal", "动物", "animal"),
    ("plant", "植物", "plant"), ("place-building", "建筑", "building"), ("place-religious", "建筑", "building"), ("place", "地点", "place"),
    ("transport-sign", "标志", "sign"), ("transport-air", "飞行器", "aircraft"), ("transport-water", "船", "boat"), ("transport", "车辆", "vehicle"), ("hotel", "物品", "object"),
    ("time", "时间", "time"), ("sky", "天气", "weather"), ("event", "节日用品", "party thing"), ("award", "奖牌", "award"), ("sport", "运动", "sport"),
    ("game", "游戏", "game"), ("arts", "艺术", "art"), ("clothing", "衣物", "clothing"), ("sound", "声音", "sound"), ("musical", "乐器", "musical instrument"),
    ("music", "音乐", "music"), ("phone", "电子产品", "electronic device"), ("computer", "电子产品", "electronic device"), ("light", "影像用品", "light or film thing"),
    ("book", "书本", "book or paper"), ("money", "钱", "money"), ("mail", "邮件", "mail"), ("writing", "文具", "stationery"), ("office", "文具", "stationery"),
    ("lock", "锁", "lock"), ("tool", "工具", "tool"), ("science", "科学器材", "science thing"), ("medical", "医疗用品", "medical thing"), ("household", "家居用品", "household thing"),
    ("zodiac", "星座符号", "zodiac sign"), ("arrow", "箭头", "arrow"), ("geometric", "图形", "shape"), ("", "符号", "sign"),
)  # fmt: skip


def _plain(name: str) -> list[str]:
    return next([zh, en] for start, zh, en in PLAIN if name.startswith(start))


def about(entry: dict[str, Any]) -> dict[str, Any] | None:
    """What may be said of an emoji; None when CLDR names it in one language only."""
    if is_food(entry):
        group = GROUPS.get(subgroup(entry))
        return {"food": True, "group": list(group[1:])} if group else None
    (zh, zh_words), (en, en_words) = (words(entry["emoji"], language) for language in ("zh", "en"))
    if not zh or not en:
        return None
    keywords = [[word for word in found if word != name][:6] for name, found in ((zh, zh_words), (en, en_words))]
    return {"food": False, "group": _plain(subgroup(entry)), "name": [zh, en], "keywords": keywords}


def main(out: Path) -> None:
    """Write OUT/sprites.zip and OUT/sprites.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with zipfile.ZipFile(out / "sprites.zip", "w") as archive:
        for entry in emoji_list():
            code = code_of(entry["hexcode"])
            said = None if entry.get("group") in (None, *_LEFT_OUT) else about(entry)
            if said is None:
                continue
            for artist in TRAIN:
                if icon_name(artist, code) is None:
                    continue
                file = f"{artist}-{code}.webp"
                data = io.BytesIO()
                render(artist, code, SIZE).save(data, "WEBP", quality=QUALITY, alpha_quality=70, method=4)
                archive.writestr(file, data.getvalue())
                lines.append(json.dumps({"file": file, "artist": artist, "code": code, **said}, ensure_ascii=False))
    (out / "sprites.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} drawings, {(out / 'sprites.zip').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
