"""The page's texts, Chinese beside English, and whose turn it is.

Promises: what a visitor reads is in the language of his browser, or of the switch on the page (a cookie); what the server says later,
errors in words among them, is in the same one. Texts stand in pairs, so that a translation is never far from its original.
"""

from __future__ import annotations

from collections.abc import Mapping

COOKIE = "intervale_lang"

WORDS: dict[str, tuple[str, str]] = {
    "chat": ("Chat", "对话"),
    "compare": ("Compare", "对比"),
    "report": ("Report", "报告"),
    "about": ("About", "关于"),
    "ask": (
        "Ask; drop or paste pictures here. Enter sends",
        "提问；可拖入或粘贴图片，回车发送",
    ),
    "ask_compare": ("One question to both models. Enter sends", "向两个模型问同一个问题，回车发送"),
    "new": ("New chat", "新对话"),
    "again": ("Clear", "清空"),
    "settings": ("Settings", "设置"),
    "model": ("Model", "模型"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0: always the most likely word", "0：总选最可能的词"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_info": ("choose among the most likely words of this total probability", "只在累计概率达到此值的词中选"),
    "most": ("Longest answer (tokens)", "回答最长（token）"),
    "tiles": ("Tiles a picture", "每张图切块数"),
    "tiles_info": ("more: finer details, slower", "越多越清晰，也越慢"),
    "seed": ("Seed (empty: another each time)", "随机种子（留空则每次不同）"),
    "system": ("System text", "系统提示"),
    "system_info": ("empty: the model's own", "留空：用模型自带的"),
    "shelf": ("Example pictures", "示例图片"),
    "camera": ("Camera", "拍照"),
    "camera_label": ("A picture from the camera", "用摄像头拍一张"),
    "questions": ("Questions to try", "试试这些问题"),
    "left": ("first", "第一个"),
    "empty": (
        "Choose an example picture, or drop your own below, and ask.",
        "选一张示例图片，或在下面放入自己的图片，然后提问。",
    ),
}

# The first two are questions of the embedded data set, the last is the tutorial's.
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What is in the picture?", "图片里是什么?"),
    ("Which group does it belong to?", "图片里的东西属于哪一类?"),
    ("Which cuisine does this food usually belong to?", "图片中的食物通常属于哪个菜系?"),
)


def language_of(cookies: Mapping[str, str], accepted: str) -> str:
    """'zh' or 'en': the switch's cookie, else the first language of Accept-Language."""
    chosen = cookies.get(COOKIE, "")
    if chosen in ("zh", "en"):
        return chosen
    return "zh" if accepted.strip().lower().startswith("zh") else "en"


def pick(language: str, en: str, zh: str) -> str:
    """The text in the visitor's language."""
    return zh if language == "zh" else en


# Errors a visitor is likely to meet, in Chinese; the English ones are the API's own messages.
_ZH = {
    "busy": "现在排队的人太多，请过几秒再试。",
    "engine_unavailable": "模型暂时不可用，请稍后再试。",
    "out_of_memory": "内存不足：请用更少、更小的图片，或减少切块数。",
    "engine_failed": "模型在回答时出错，请再试一次。",
    "engine_interrupted": "回答中断了，请再试一次。",
    "upstream_failed": "后端服务没有回答，请再试一次。",
    "upstream_refused": "后端服务拒绝了这个请求。",
    "invalid_image": "这张图片无法读取：请用 JPEG、PNG、WebP、BMP 或 GIF。",
    "internal_error": "服务器处理时出错，原因已记入日志。",
    "expired": "这段对话的图片已过期删除，请重新上传。",
}


def error_text(language: str, code: str, message: str) -> str:
    """An error in words; where there is no translation, the numbers of the English message are kept."""
    text = message[:1].upper() + message[1:]
    if language != "zh":
        return text if text.endswith((".", "!", "。")) else text + "."
    known = {
        "context_length_exceeded": "内容太长，超过了模型的上下文：请清空对话，或少放图片、减少切块数",
        "image_too_large": "图片太大",
        "too_many_images": "图片太多",
        "invalid_value": "设置超出范围",
    }
    return _ZH.get(code) or f"{known.get(code, '无法回答')}（{text}）"
