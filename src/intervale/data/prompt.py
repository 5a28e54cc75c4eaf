"""Messages to token ids and loss mask: the only home of special tokens and chat templates.

Promises: the ids are those of the official code; control tokens come from the template alone (typed by a user they stay
text); exactly the assistant's answers and their end tokens are trained; nothing is ever cut. A template that is not in
TEMPLATES does not exist: an unknown name is an error, never an empty prompt.
Legend: S sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from intervale.core.errors import UserError, nearest
from intervale.core.records import IMAGE, Message

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"

# The model's own system texts (OpenGVLab/InternVL, conversation.py). Training and serving use the same one.
_SYSTEM_V2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_SYSTEM_V25 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


class Tokenizer(Protocol):
    """What a prompt needs of a tokenizer."""

    @property
    def add_bos(self) -> bool:
        """Does the family's tokenizer start a text with `<s>`?"""
        ...

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; control tokens in it stay text."""
        ...

    def control(self, token: str) -> int:
        """The id of a control token. Raises: UserError when the vocabulary lacks it."""
        ...

    def eats_space(self, token: str) -> bool:
        """Does this control token swallow the white space after it (Phi-3's do)?"""
        ...


@dataclass(frozen=True)
class Template:
    """One conversation format. `headers` maps a role to (control token, text after it); `end` closes a turn, `after` follows."""

    name: str
    system: str
    headers: dict[str, tuple[str, str]]
    end: str
    after: str = ""
    bos: str | None = None  # None: only when the tokenizer itself adds one
    stop: tuple[str, ...] = ()


def _chatml(name: str, system: str, after: str = "", bos: str | None = "") -> Template:
    headers = {role: ("<|im_start|>", f"{role}\n") for role in ("system", "user", "assistant")}
    return Template(name, system, headers, "<|im_end|>", after, bos, stop=("<|im_end|>", "<|im_start|>"))


_PHI3 = {role: (f"<|{role}|>", "\n") for role in ("system", "user", "assistant")}

TEMPLATES = {
    "internlm2-chat": _chatml("internlm2-chat", _SYSTEM_V2, bos="<s>"),
    "Hermes-2": _chatml("Hermes-2", _SYSTEM_V2),
    "internvl2_5": _chatml("internvl2_5", _SYSTEM_V25, after="\n", bos=None),
    "phi3-chat": Template("phi3-chat", _SYSTEM_V2, _PHI3, "<|end|>", bos=None, stop=("<|end|>", "<|user|>")),
}


def template_named(name: str, where: str) -> Template:
    """The template `name` of `where` (a config file). Raises: UserError when it is unknown."""
    if not isinstance(name, str) or name not in TEMPLATES:
        raise UserError(f"{where}: unknown template {name!r}{nearest(str(name), TEMPLATES)}", f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Picture:
    """A picture's place in a turn: how many `<IMG_CONTEXT>` tokens it takes."""

    tokens: int


@dataclass(frozen=True)
class Turn:
    """One turn as parts: texts, and pictures where they stand."""

    role: str
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Prompt:
    """`ids_S` int64 and `trained_S` bool: True where the token is a target of the loss."""

    ids_S: np.ndarray
    trained_S: np.ndarray


def turns_of(messages: Sequence[Message], picture_tokens: Sequence[int]) -> list[Turn]:
    """Records' messages, their `<image>` marks replaced in order by pictures of that many tokens."""
    left = list(picture_tokens)
    turns = []
    for message in messages:
        parts: list[str | Picture] = []
        for number, text in enumerate(message.content.split(IMAGE)):
            if number:
                parts.append(Picture(left.pop(0)))
            if text:
                parts.append(text)
        turns.append(Turn(message.role, tuple(parts)))
    assert not left, "check_record guarantees one mark a picture"
    return turns


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt: a control token (`repeat` times) or plain text, and whether it is trained."""

    text: str
    control: bool = False
    train: bool = False
    repeat: int = 1


def pieces_of(turns: Sequence[Turn], template: Template, *, bos: bool, answer_next: bool = False) -> list[Piece]:
    """The conversation in the template's form; with `answer_next` it ends in the assistant's header, ready to generate.

    A leading system turn replaces the template's own system text. Header and told text are one piece, as in the official
    string; an answer is a piece of its own, because that is how it will be generated.
    """
    pieces = [Piece(template.bos or "<s>", control=True)] if bos else []
    system = Turn("system", (template.system,))
    if turns and turns[0].role == "system":
        system, turns = turns[0], turns[1:]
    for turn in [system, *turns]:
        token, text = template.headers[turn.role]
        train = turn.role == "assistant"
        pieces.append(Piece(token, control=True))
        if train:
            pieces.append(Piece(text))
            text = ""
        for part in turn.parts:
            if isinstance(part, str):
                text += part
            else:
                pieces += [Piece(text), Piece(IMG_START, True), Piece(IMG_CONTEXT, True, repeat=part.tokens), Piece(IMG_END, True)]
                text = ""
        pieces += [Piece(text, train=train), Piece(template.end, control=True, train=train), Piece(template.after)]
    if answer_next:
        token, text = template.headers["assistant"]
        pieces += [Piece(token, control=True), Piece(text)]
    return [piece for piece in pieces if piece.text]


def encode_turns(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, *, answer_next: bool = False) -> Prompt:
    """`pieces_of` the conversation as ids and loss mask."""
    ids: list[int] = []
    trained: list[bool] = []
    strip = False
    for piece in pieces_of(turns, template, bos=has_bos(template, tokenizer), answer_next=answer_next):
        if piece.control:
            tokens = [tokenizer.control(piece.text)] * piece.repeat
            strip = tokenizer.eats_space(piece.text)
        else:
            tokens = tokenizer.encode(piece.text.lstrip() if strip else piece.text)
            strip = False
        ids += tokens
        trained += [piece.train] * len(tokens)
    return Prompt(np.array(ids, np.int64), np.array(trained, bool))


def has_bos(template: Template, tokenizer: Tokenizer) -> bool:
    """Whether the prompt starts with `<s>`: the template says so, or leaves it to the tokenizer."""
    return bool(template.bos) or (template.bos is None and tokenizer.add_bos)


def stop_ids(template: Template, tokenizer: Tokenizer, eos: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids that end an answer: the template's stop tokens and the tokenizer's own end of text."""
    return tuple(dict.fromkeys([*(tokenizer.control(token) for token in template.stop), *eos]))


_JINJA = """{{%- if messages[0]['role'] == 'system' -%}}{{%- set rest = messages[1:] -%}}{{%- set first = messages[0]['content'] -%}}
{{%- else -%}}{{%- set rest = messages -%}}{{%- set first = {system} -%}}{{%- endif -%}}
{{%- macro body(content) -%}}{{%- if content is string -%}}{{{{- content -}}}}{{%- else -%}}
{{%- for part in content -%}}{{%- if part['type'] in ('image', 'image_url') -%}}{{{{- '<IMG_CONTEXT>\\n' -}}}}
{{%- elif part['type'] == 'text' -%}}{{{{- part['text'] -}}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}
{{{{- {bos} + {system_header} + body(first) + {close} -}}}}
{{%- for message in rest -%}}{{%- if message['role'] == 'assistant' -%}}{{{{- {assistant_header} -}}}}
{{%- else -%}}{{{{- {user_header} -}}}}{{%- endif -%}}{{{{- body(message['content']) + {close} -}}}}{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- {assistant_header} -}}}}{{%- endif -%}}"""


def jinja(template: Template, bos: bool) -> str:
    """The template in transformers' chat-template language: the official prompt, character by character.

    A picture becomes `<IMG_CONTEXT>` and a line break, which transformers', LMDeploy's and vLLM's processors expand.
    """

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    fields = {f"{role}_header": quoted("".join(template.headers[role])) for role in template.headers}
    return _JINJA.format(
        system=quoted(template.system),
        bos=quoted((template.bos or "<s>") if bos else ""),
        close=quoted(template.end + template.after),
        **fields,
    )
