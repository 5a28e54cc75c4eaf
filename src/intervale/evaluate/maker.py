"""What the maker of a model says of its training where the training files are not kept: `training.json` in the model's folder.

Promises: believed of the very weights it names only; it answers only by the bytes of the embedded data set's pictures, which are sorted
by artist: pictures of artists that were never shown, of artists that were (drawn anew, so those very pictures were not), or others.
Cost: one read of the items' pictures and of the embedded ones, and nothing for a model without that file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervale.core.embedded import ASSETS
from intervale.core.errors import UserError
from intervale.core.files import read_object
from intervale.core.records import Record
from intervale.evaluate.identity import DIGITS, picture_keys

TRAINING = "training.json"


def _artists(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Digest of a picture of the embedded data set -> its artist, by the longest of `names` that its file's name begins with."""
    found = {}
    for file in sorted(folder.glob("images/*")):
        fitting = [name for name in names if file.name.startswith(f"{name}-")]
        if fitting:
            found[hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]] = max(fitting, key=len)
    return found


def _drawings(folder: Path, weights: str | None) -> dict[str, Any] | None:
    """`drawings` of a folder's training.json, if it is about these weights."""
    try:
        told = read_object(folder / TRAINING, "weights", "drawings") if (folder / TRAINING).is_file() else {}
    except UserError:
        return None
    return told["drawings"] if weights and told.get("weights") == weights else None


def told_by_maker(base: Path, weights: str | None, records: Sequence[Record]) -> str | None:
    """What the maker of the model with the fingerprint `weights` says of these items, by code; None where nothing is about these weights.

    It is looked for in the folder `base` and, because a run's or an export's base may be gone, in the embedded nano.

    `apart`: all their pictures are by artists the model was never shown. `drawings`: some are by artists it was shown. `not kept`: its
    training is known, but these pictures are nobody's that it speaks of. A damaged file is no file.
    """
    drawings = next((own for place in (base, ASSETS / "nano") if (own := _drawings(place, weights))), None)
    if drawings is None:
        return None
    try:
        shown, never, data = (drawings[key] for key in ("shown", "never_shown", "data"))
        artists = _artists(ASSETS / str(data), [*shown, *never])
        keys = [key for own in picture_keys(records) for key in own]
    except (UserError, KeyError, TypeError, OSError):
        return None
    by = {artists.get(key) for key in {*keys}}
    if keys and by <= {*never} and all(record.images for record in records):
        return "apart"
    return "drawings" if by & {*shown} else "not kept"
