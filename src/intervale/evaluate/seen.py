"""What is known about items and training, in words: the sentences of terminal, report and model card, in the reader's language.

Promises: a summary keeps codes and counts, so a report speaks the language it is written in whatever language the evaluation ran in.
"""

from __future__ import annotations

from typing import Any

from intervale.core.lang import say


def _items_found(file: dict[str, Any], n: int) -> str:
    exact, near, name = file["exact"], file["near"], file["file"]
    parts_en = ([f"{exact} with the very same pictures"] if exact else []) + ([f"{near} with pictures that look the same"] if near else [])
    parts_zh = ([f"{exact} 条图片完全相同"] if exact else []) + ([f"{near} 条图片看起来相同"] if near else [])
    return say(f"{exact + near} of {n} items are training items ({' and '.join(parts_en)}; {name})",
               f"{n} 条中有 {exact + near} 条是训练数据（{'，'.join(parts_zh)}；{name}）")  # fmt: skip


def _none_found(files: list[dict[str, Any]], n: int) -> str:
    looks = all(file.get("looks", True) for file in files)
    told = say(
        "no item is one of the model's training items (questions, and pictures by bytes",
        "没有一条是该模型的训练数据（比较了问题和图片：逐字节",
    )
    told += (
        say(" and look, compared)", "和外观）")
        if looks
        else say(" compared; too many pictures to compare their look)", "；图片太多，未比较外观）")
    )
    pictures = max((file.get("picture", 0) for file in files), default=0)
    if pictures:
        told += say(
            f"; {pictures} of {n} ask something else about a picture it was trained on",
            f"；{n} 条中有 {pictures} 条问的是训练图片的其他问题",
        )
    lost = sum(file.get("unreadable", 0) for file in files)
    if lost:
        told += say(f"; {lost} pictures could not be read to compare them", f"；有 {lost} 张图片无法读取，未能比较")
    return told


# What a model's own training.json says (`maker`), of a training whose files are not kept.
_BY_MAKER = {
    "apart": ("all pictures are by artists that the model was never shown in its training (training.json in its folder)",
              "所有图片的画家都没有出现在该模型的训练中（见模型目录的 training.json）"),
    "drawings": ("the model was trained on drawings by the same artists, placed and coloured anew, so not on these very pictures; "
                 "its training items are not kept to compare (training.json in its folder)",
                 "该模型在同一批画家的图画上训练过（重新摆放和着色，不是这些图片本身）；训练数据没有保留，无法逐条比较（见模型目录的 training.json）"),
    "not kept": ("the model's training items are not kept to compare; what they were stands in its folder (training.json, README.md)",
                 "该模型的训练数据没有保留，无法逐条比较；其内容见模型目录（training.json、README.md）"),
}  # fmt: skip


def in_words(seen: dict[str, Any], n: int) -> str:
    """Why `provenance.seen_in_training` says what it says, of `n` items; no verdict word, one sentence."""
    code, files = seen["code"], seen.get("files", [])
    if code == "card":
        return say("nothing was held out of this data set (dataset.json: prepared with --all)",
                   "该数据集没有留出评测集（dataset.json：用 --all 准备）")  # fmt: skip
    if code == "digest":
        return say("these are the items the model was trained on (same digest)", "这些就是该模型的训练数据（摘要相同）")
    if code == "items":
        return _items_found(max(files, key=lambda file: file.get("exact", 0) + file.get("near", 0)), n)
    if code == "none":
        beneath = seen.get("base", "apart")  # summaries of before did not ask
        more = say("; what the base model was trained on before is not compared", "；未比较基座模型此前的训练数据")
        return _none_found(files, n) + (more if beneath != "apart" else "")
    if code == "gone":
        return say("other data than the model's training file, which is not there (or changed) to compare item by item",
                   "与模型的训练文件不同，但该文件已不在（或已改变），无法逐条比较")  # fmt: skip
    if code == "endpoint":
        return say("a model behind an address does not say what it was trained on", "通过网络地址访问的模型没有说明它用什么数据训练过")
    if code in _BY_MAKER:
        return say(*_BY_MAKER[code])
    return say("the model's folder does not say what it was trained on", "模型目录没有说明它用什么数据训练过")


def reason_of(summary: dict[str, Any]) -> str:
    """The reason for a summary's (or a report side's) `scored_on_training_items`, in the language of now."""
    seen = summary.get("seen")
    return in_words(seen, summary["n"]) if isinstance(seen, dict) else str(summary["scored_on_training_items_reason"])
