"""The report's table of more models on the same items."""

from __future__ import annotations

from html import escape
from typing import Any

from intervale.core.lang import say
from intervale.evaluate.report_facts import kept_back
from intervale.evaluate.report_published import single_row


def others_html(found: dict[str, Any]) -> str:
    """The section; nothing where only two models were compared."""
    if not found.get("others"):
        return ""
    rows = [(own["accuracy"], str(own["model"]["name"]), own, "", own) for own in found["others"]]
    for side, name in (("before", say("before", "之前")), ("after", say("after", "之后"))):
        rows.append((found[side]["accuracy"], f"{found[side]['model']['name']} ({name})", found[side], side, None))
    body = "".join(single_row(name, score, style, _told(own)) for _, name, score, style, own in sorted(rows, key=lambda row: -row[0]))
    note = say(
        f"All answered the same {found['n']:,} items with the same pictures. Small: the tuned model minus this one, in points, with its 95% interval; * p < 0.05 by McNemar's exact test "
        f"after Holm's correction for {len(found['others'])} models.",
        f"所有模型回答了相同的 {found['n']:,} 道题和相同的图片。小字：训练后的模型减去该模型的百分点差及 95% 区间；* 表示经 Holm 校正（{len(found['others'])} 个模型）后 McNemar 精确检验 p < 0.05。",
    )
    return f'<section class="long"><h2>{say("Beside other models", "与其他模型对照")}</h2>{_seen(found)}<div>{body}</div>{_kept_back(found)}<p class="soft">{note}</p></section>'


def _kept_back(found: dict[str, Any]) -> str:
    """Below the table: what a server did not give, because that makes a model look worse than it is."""
    told = [f"{own['model']['name']}: {say(', ', '，').join(words)}" for own in found["others"] if (words := kept_back(own))]
    wrong = say("Counted as wrong: ", "计为错误：")
    return f"<p>{wrong}{escape('; '.join(told))}</p>" if told else ""


def _told(own: dict[str, Any] | None) -> str:
    if own is None:
        return ""
    against = own["against"]
    low, high = (f"{100 * end:+.1f}" for end in against["interval"])
    star = " *" if against["p_holm"] < 0.05 else ""
    return f"{100 * against['difference']:+.1f} [{low}, {high}]{star}".replace("-", "−")


def _seen(found: dict[str, Any]) -> str:
    names = [str(own["model"]["name"]) for own in found["others"] if own.get("scored_on_training_items")]
    if not names:
        return ""
    told = say("Scored on training items: ", "在训练数据上评分：") + escape(", ".join(names))
    return f'<div class="banner"><strong>{told}</strong></div>'
