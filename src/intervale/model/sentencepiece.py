"""Read the pieces of a SentencePiece `tokenizer.model` without its library.

The file is a protocol buffer; only field 1 (repeated piece: 1 text, 2 score, 3 type) is needed, which is forty lines against
a compiled dependency and a protobuf version to agree on. Damaged input is an error, never a partial vocabulary.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from intervale.core.errors import UserError

# sentencepiece_model.proto, ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class PieceEntry:
    """One vocabulary entry; its id is its place."""

    text: str
    score: float
    kind: int


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> list[tuple[int, bytes | int]]:
    """(field number, value) of one message; 32-bit values stay bytes."""
    found: list[tuple[int, bytes | int]] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            found.append((number, value))
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("the file ends inside a field")
        found.append((number, data[at : at + length]))
        at += length
    return found


def read_pieces(path: Path) -> list[PieceEntry]:
    """Every piece in id order. Raises: UserError when the file is not a SentencePiece model."""
    try:
        pieces = []
        for number, value in _fields(path.read_bytes()):
            if number != 1 or not isinstance(value, bytes):
                continue
            entry = dict(_fields(value))
            text, score = entry.get(1, b""), entry.get(2, b"\0\0\0\0")
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            pieces.append(PieceEntry(text.decode(), struct.unpack("<f", score)[0], int(entry.get(3, NORMAL))))
        if not any(piece.kind == UNKNOWN for piece in pieces):
            raise ValueError("no vocabulary in it")
        return pieces
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (ValueError, IndexError, AssertionError, struct.error) as error:
        raise UserError(f"{path}: not a SentencePiece model: {error}", "use the tokenizer.model of the model's own folder") from error
