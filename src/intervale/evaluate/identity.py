"""The pictures of an evaluation by their bytes: a part of what it is, so that one that changed between two evaluations is noticed.

Cost: one read of every distinct picture file before the first question, and one after the last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.records import Record
from intervale.data.pictures import hash_pictures, pictures_of

DIGITS = 16  # hex digits of sha256 kept a picture: enough to tell files apart, short enough for a line each
Keys = tuple[str, ...]


def picture_keys(records: Sequence[Record], tell: Callable[[str], None] = lambda _: None) -> tuple[Keys, ...]:
    """The first 16 hex digits of the sha256 of each record's picture files. Raises: UserError for one that cannot be read."""
    found = hash_pictures(pictures_of(records), tell)
    for digest in found.values():
        if isinstance(digest, UserError):
            raise digest
    short = {path: str(digest)[:DIGITS] for path, digest in found.items()}
    return tuple(tuple(short[inside(record.root, image, record.where)] for image in record.images) for record in records)


def pictures_digest(keys: Sequence[Keys]) -> str:
    """One name for all pictures of all items, in order."""
    return hashlib.sha256("\n".join(" ".join(own) for own in keys).encode()).hexdigest()[:DIGITS]


def refuse_changed(records: Sequence[Record], keys: Sequence[Keys]) -> None:
    """Raise a UserError naming items whose pictures are no longer those that were hashed when the evaluation began."""
    changed = [record for record, old, new in zip(records, keys, picture_keys(records), strict=True) if old != new]
    if changed:
        named = ", ".join(repr(record.id) for record in changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise UserError(
            f"{changed[0].where.rpartition(':')[0]}: pictures of {len(changed)} items changed while they were evaluated: {named}",
            "let whatever writes them finish, then evaluate again with --fresh",
        )
