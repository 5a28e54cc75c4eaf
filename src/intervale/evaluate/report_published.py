"""The report's table of published FoodieQA results beside ours, with what makes the two comparable or not.

Promises: the table is shown for FoodieQA's own items only, and for other data of its form a sentence that says why not; every way in
which our score was obtained otherwise stands above the table.
"""

from __future__ import annotations

from html import escape
from typing import Any

from intervale.core.lang import say


def _why(code: str, told: dict[str, Any], n: int) -> str:
    items = told["items"]
    return {
        "languages": say("our items are Chinese and English mixed, theirs Chinese alone", "我们的题目中英混合，对方只有中文"),
        "items": say(
            f"we scored {n} items, they {items}",
            f"我们评测了 {n} 题，对方 {items} 题",
        ),
        "options": say("our model did not see the options, theirs did", "我们的模型没有看到选项，对方看到了"),
        "view": say("our model did not see the pictures as they are, or was told the dish", "我们的模型没有按原样看图，或被告知了菜名"),
        "likelihood": say("ours is the most likely choice, theirs a written answer", "我们取似然最高的选项，对方是写出的回答"),
        "trained": say("ours is a score on training items", "我们的成绩是在训练数据上得到的"),
        "unknown": say("whether our model was trained on these items is not known", "不清楚我们的模型是否在这些题目上训练过"),
    }.get(code, code)


def _other_items(told: dict[str, Any]) -> str:
    """What stands in the table's place where the items are not the benchmark's."""
    why = {
        "ids": say("their ids are not of the benchmark's form", "题目编号与该基准不同"),
        "types": say("their types of question are not the benchmark's", "题型与该基准不同"),
        "number": say(
            f"they come from a file that does not hold the benchmark's {told['items']} items", f"来源文件不是该基准的 {told['items']} 题"
        ),
    }
    reasons = say(", ", "，").join(why[code] for code in told["foreign"])
    return say(
        f"This data has FoodieQA's form, but these are other items ({reasons}). Results published for FoodieQA say nothing about them and are not shown.",
        f"该数据采用 FoodieQA 的格式，但不是它的题目（{reasons}）。FoodieQA 的已发表结果与这些题目无关，因此不列出。",
    )


def single_row(name: str, score: dict[str, Any], style: str = "", more: str = "") -> str:
    """One model: its name, a bar with its interval, the number and something small under it."""
    share = score["accuracy"]
    whisker = ""
    if score["interval"]:
        low, high = (100 * end for end in score["interval"])
        whisker = f'<path d="M{low:.2f} 6H{high:.2f}M{low:.2f} 4v4M{high:.2f} 4v4" stroke="#1b2430" stroke-opacity=".75" fill="none" vector-effect="non-scaling-stroke"/>'
    colour = {"before": "#b4bfcd", "after": "#4aa899"}.get(style, "#d9c9a3")
    bar = f'<svg class="single" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true"><rect width="100" height="12" fill="#f4f6f9"/><rect width="{100 * share:.2f}" height="12" fill="{colour}"/>{whisker}</svg>'
    bold = "b" if style else "span"
    small = f"<small>{escape(more)}</small>" if more else ""
    return (
        f'<div class="row"><div class="label"><{bold}>{escape(name)}</{bold}></div>{bar}<div class="value">{share:.1%}{small}</div></div>'
    )


def published_html(found: dict[str, Any]) -> str:
    """The section; nothing for other data than FoodieQA's."""
    told = found.get("published")
    if not told:
        return ""
    title = f"<h2>{say('Beside published results', '与已发表结果对照')}</h2>"
    if told["foreign"]:
        return f'<section class="long">{title}<p class="soft">{escape(_other_items(told))}</p></section>'
    people = say("people (mean of annotators)", "人类（标注者平均）")
    rows = [
        (row["percent"] / 100, people if row["who"].startswith("human") else row["who"], {"accuracy": row["percent"] / 100, **row}, "")
        for row in told["rows"]
    ]
    for side, name in (("before", say("ours, before", "我们的模型，之前")), ("after", say("ours, after", "我们的模型，之后"))):
        rows.append((found[side]["accuracy"], name, found[side], side))
    body = "".join(single_row(name, score, style) for _, name, score, style in sorted(rows, key=lambda row: -row[0]))
    faults = "".join(f"<li>{_why(code, told, found['n'])}</li>" for code in told["differs"])
    verdict = say("Not comparable with ours:", "与我们的结果不可直接比较：")
    note = f'<div class="note"><strong>{verdict}</strong><ul>{faults}</ul></div>' if faults else ""
    same = found["protocol"]["prompt"] == "foodieqa"
    wording = (
        ("ours is asked with one of these prompts", "我们使用其中一种提问")
        if same
        else ("ours is asked in other words", "我们的提问措辞不同")
    )
    about = say(
        f"Column “{told['column']}” of the tables of results ({told['source']}); {told['paper']}. The authors report the best of four prompts on these very items and read the first letter of an "
        f"answer, so their numbers lean upwards; {wording[0]}. Intervals: Wilson, 95%, from the counts that the percentages round to; the models answered "
        "the same items, but which ones is not published, so no paired test is possible.",
        f"数据来自 {told['source']} 的结果表，“{told['column']}” 一列；论文：{told['paper']}。作者报告的是在同一批题目上四种提问方式中的最高分，并取回答的首个字母，因此偏高；"
        f"{wording[1]}。区间：Wilson 95%，由百分比反推的题数得出；各模型答对了哪些题没有公布，因此无法作配对检验。",
    )
    return f'<section class="long">{title}{note}<div>{body}</div><p class="soft">{about}</p></section>'
