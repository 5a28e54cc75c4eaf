"""What the maker of a model says of its training where the training files are not kept: `training.json` in the model's folder.

Promises: believed of the very weights it names only; it answers only by the bytes of the embedded data set's pictures, which are sorted
by artist: pictures of artists that were never shown, of artists that were (drawn anew, so those very pictures were not), or others.
Cost: one read of the items' pictures and of the embedded ones, and nothing for a model without that file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from intervale.core.embedded import ASSETS
from intervale.core.errors import UserError
from intervale.core.files import read_object
from intervale.core.records import Record
from intervale.evaluate.identity import DIGITS, picture_keys
from intervale.model.source import fingerprint

TRAINING = "training.json"


def _artists(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Digest of a picture of the embedded data set -> its artist, by the longest of `names` that its file's name begins with."""
    found = {}
    for file in sorted(folder.glob("images/*")):
        fitting = [name for name in names if file.name.startswith(f"{name}-")]
        if fitting:
            found[hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]] = max(fitting, key=len)
    return found


def told_by_maker(base: Path, records: Sequence[Record]) -> str | None:
    """What a model's own `training.json` says of these items, by code; None where there is none, or it is about other weights.

    `apart`: all their pictures are by artists the model was never shown. `drawings`: some are by artists it was shown. `not kept`: its
    training is known, but these pictures are nobody's that it speaks of. A damaged file is no file.
    """
    if not (base / TRAINING).is_file():
        return None
    try:
        told = read_object(base / TRAINING, "weights", "drawings")
        drawings = told["drawings"]
        shown, never, data = (drawings[key] for key in ("shown", "never_shown", "data"))
        if told["weights"] != fingerprint(base):
            return None
        artists = _artists(ASSETS / str(data), [*shown, *never])
        keys = [key for own in picture_keys(records) for key in own]
    except (UserError, KeyError, TypeError, OSError):
        return None
    by = {artists.get(key) for key in {*keys}}
    if keys and by <= {*never} and all(record.images for record in records):
        return "apart"
    return "drawings" if by & {*shown} else "not kept"
