"""Tokenizers of the InternVL families, from their files alone, with the `tokenizers` library and no remote code.

Promises: the ids of the official (slow) tokenizers; text typed by a user never becomes a control token. transformers' own
classes get InternLM2 wrong (its specials move by 6, 73% of strings differ), so `tokenizer.model` is read here.
Cost: about a second to build from tokenizer.model, milliseconds from tokenizer.json.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from intervale.core.errors import UserError
from intervale.core.files import read_json
from intervale.data.prompt import IMG_CONTEXT
from intervale.model.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_pieces

VISION_SPECIALS = ("<img>", "</img>", IMG_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
# InternLM2 chat renames six reserved pieces (source: the official tokenizer_config.json).
INTERNLM2_SPECIALS = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
_INTERNLM2_BASE = 92544
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Headers, system text and stock questions come again in every item: they are encoded once.
_SHORT, _MOST_KNOWN = 200, 20_000  # characters; texts
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# Byte-level vocabularies write a byte as the Latin-1 letter of its number where that is visible; the others follow from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {chr(at): at for at in _VISIBLE} | {chr(256 + n): at for n, at in enumerate(sorted({*range(256)} - {*_VISIBLE}))}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as `data.prompt` wants it. `backend` is the `tokenizers` object that tokenizer.json holds."""

    backend: Backend
    add_bos: bool
    source: str
    eos: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, no `<s>`; `<|im_end|>` and its kind in `text` stay text."""
        known = self._known.get(text)
        if known is not None:
            return list(known)
        try:
            ids = self._plain.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # half of a surrogate pair: bytes that were not UTF-8
            raise UserError(f"the text is not valid Unicode: {text[:60]!r}", "write it as UTF-8") from error
        if len(text) <= _SHORT and len(self._known) < _MOST_KNOWN:
            self._known[text] = tuple(ids)
        return ids

    def control(self, token: str) -> int:
        """The id of a control token. Raises: UserError when the vocabulary lacks it."""
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(
                f"{self.source}: the vocabulary has no {token}",
                "this is not an InternVL chat tokenizer; use the model's own tokenizer files",
            )
        return number

    def eats_space(self, token: str) -> bool:
        """Does this control token swallow the white space after it (Phi-3's do)?"""
        return token in self._eaters

    def decode(self, ids: list[int]) -> str:
        """Ids to text without control tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def decode_on(self, ids: list[int]) -> str:
        """Ids to what they add to a text: `decode` of some tokenizers drops the space that a text begins with."""
        return self.decode([*self.encode("a"), *ids])[1:]

    def bytes_of(self, token: int) -> bytes:
        """A token's part of a text in UTF-8, also where it is half of a character; of a control token, its name."""
        piece = self.backend.id_to_token(token)
        if piece is None:  # an embedding has rows beyond the vocabulary
            return b""
        if token in self._added:
            return piece.encode()
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return bytes(_BYTE_LEVEL[letter] for letter in piece if letter in _BYTE_LEVEL)
        return bytes.fromhex(piece[3:5]) if _BYTE.fullmatch(piece) else piece.replace("▁", " ").encode()

    @property
    def size(self) -> int:
        """Pieces and added tokens together."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def _known(self) -> dict[str, tuple[int, ...]]:
        return {}

    @cached_property
    def _plain(self) -> Backend:
        plain = Backend.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _eaters(self) -> frozenset[str]:
        return frozenset(token.content for token in self.backend.get_added_tokens_decoder().values() if token.rstrip)


def _special(text: str, **flags: Any) -> AddedToken:
    return AddedToken(text, normalized=False, special=True, **flags)


def from_sentencepiece(path: Path, specials: dict[int, str] | None = None, extra: tuple[str, ...] = VISION_SPECIALS) -> Backend:
    """The official slow tokenizer of a SentencePiece BPE model, as a fast one that adds `<s>`.

    `specials` renames pieces by id (default: InternLM2's six when the vocabulary is its own); `extra` follow the vocabulary.
    Rule: merges come from the normal pieces only, best score first; no prefix space. Raises: UserError for a foreign file.
    """
    pieces = read_pieces(path)
    if specials is None:
        specials = INTERNLM2_SPECIALS if len(pieces) == _INTERNLM2_BASE else {}
    vocabulary = {specials.get(i, piece.text): i for i, piece in enumerate(pieces)}
    merges = []
    for right_id, piece in enumerate(pieces):
        if piece.kind != NORMAL or right_id in specials:
            continue
        for cut in range(1, len(piece.text)):
            left, right = vocabulary.get(piece.text[:cut]), vocabulary.get(piece.text[cut:])
            if left is not None and right is not None and pieces[left].kind == NORMAL and pieces[right].kind == NORMAL:
                merges.append((-piece.score, left, right))
    merges.sort()
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    named = [specials.get(i, piece.text) for i, piece in enumerate(pieces)]
    model = models.BPE(vocabulary, [(named[a], named[b]) for _, a, b in merges], byte_fallback=True, fuse_unk=True, unk_token=unknown)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(p.text, normalized=False) for i, p in enumerate(pieces) if p.kind == USER_DEFINED and i not in specials])
    backend.add_special_tokens([_special(p.text) for p in pieces if p.kind in (CONTROL, UNKNOWN)])
    backend.add_special_tokens([_special(specials[i]) for i in sorted(specials)])
    backend.add_special_tokens([_special(text) for text in extra])
    return with_bos(backend)


def with_bos(backend: Backend, bos: str = "<s>") -> Backend:
    """Make the backend start every text with `<s>`, as the family's own tokenizer does."""
    number = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)])
    return backend


def byte_level(size: int, specials: dict[int, str]) -> Backend:
    """A tokenizer for models that have none: one token a byte, any language, `specials` at their ids, `size` in all."""
    vocabulary: dict[str, int] = {}
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for number in range(size):
        if number not in specials:
            vocabulary[next(letters, f"[UNUSED_{number}]")] = number
    vocabulary |= {text: number for number, text in specials.items()}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_special(text) for _, text in sorted(specials.items())])
    return with_bos(backend) if "<s>" in specials.values() else backend


def _from_vocab_and_merges(folder: Path) -> Backend:
    """Qwen2's byte-level BPE from vocab.json and merges.txt (InternVL2-1B ships no tokenizer.json)."""
    backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _side_file(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _add_listed_tokens(backend: Backend, folder: Path, settings: dict[str, Any]) -> None:
    """Added tokens of tokenizer_config.json / added_tokens.json, at exactly the ids they are listed with."""
    listed: dict[int, dict[str, Any]] = {int(k): v for k, v in (settings.get("added_tokens_decoder") or {}).items()}
    for text, number in _side_file(folder, "added_tokens.json").items():
        listed.setdefault(int(number), {"content": text, "special": True})
    for number in sorted(listed):
        entry = listed[number]
        flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        token = AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(entry["content"]) != number:
            raise UserError(
                f"{folder}: the added token {entry['content']!r} is listed with id {number}, but its place is {backend.token_to_id(entry['content'])}",
                "the tokenizer files do not belong together; take them all from one model folder",
            )


def _without_prefix(backend: Backend) -> Backend:
    """Switch off a SentencePiece prefix space: every text of a chat prompt follows a control token, where there is none."""
    data = json.loads(backend.to_str())
    steps = (data.get("normalizer") or {}).get("normalizers")
    if steps:
        data["normalizer"]["normalizers"] = [step for step in steps if step.get("type") != "Prepend"]
    before = data.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace":
        before["prepend_scheme"] = "never"
    return Backend.from_str(json.dumps(data))


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, or None when it has no tokenizer file.

    Looks for tokenizer.json, then tokenizer.model, then vocab.json with merges.txt; never imports code from the folder.
    Raises: UserError for files that are damaged or contradict each other.
    """
    settings = _side_file(folder, "tokenizer_config.json")
    try:
        if (folder / "tokenizer.json").exists():
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        elif (folder / "tokenizer.model").exists():
            base = len(read_pieces(folder / "tokenizer.model")) == _INTERNLM2_BASE
            backend = from_sentencepiece(folder / "tokenizer.model", extra=VISION_SPECIALS if base else ())
            _add_listed_tokens(backend, folder, settings)
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            backend = _from_vocab_and_merges(folder)
            _add_listed_tokens(backend, folder, settings)
        else:
            return None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer files cannot be read: {error}", "copy them again from the model's source") from error
    adds_bos = _adds_bos(backend, settings)
    eos = tuple(n for text in ("</s>", "<|endoftext|>") if (n := backend.token_to_id(text)) is not None)
    return Tokenizer(_without_prefix(backend), adds_bos, str(folder), eos)


def _adds_bos(backend: Backend, settings: dict[str, Any]) -> bool:
    if backend.token_to_id("<s>") is None:
        return False
    said = settings.get("add_bos_token")
    if said is not None:
        return bool(said)
    return backend.encode("", add_special_tokens=True).ids == [backend.token_to_id("<s>")]
