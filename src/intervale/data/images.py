"""The one way a picture enters, in training, evaluation and serving alike.

Promises: the size is read from the header and refused there when it is over the limit, only known raster formats are
decoded, a damaged file is an error (never grey pixels), the EXIF orientation is applied, and the result is RGB.
The official code ignores EXIF; a third of phone photographs carry one. Cost: one decode (about 0.1 s for 12 megapixels).
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from intervale.core.errors import UserError
from intervale.data.stored import is_stored, picture_bytes

# JPEG covers MPO, which many phones write into a .jpg. Vector, scientific and PostScript formats stay out: their decoders are bomb-prone.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
DEFAULT_MAX_PIXELS = 40_000_000  # 40 megapixels: 120 MB as RGB
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap width and height


class PictureError(UserError):
    """A picture that cannot be used: what `on_bad_sample: skip` may leave out."""


_CUT = ("the picture is damaged or cut short", "replace the file; it does not decode to its end")


def max_pixels() -> int:
    """The limit in force: `INTERVALE_MAX_PIXELS`, else 40 megapixels."""
    raw = os.environ.get("INTERVALE_MAX_PIXELS", "")
    if not raw:
        return DEFAULT_MAX_PIXELS
    if not raw.isdigit() or int(raw) == 0:
        raise UserError(f"INTERVALE_MAX_PIXELS is {raw!r}", "set it to a number of pixels, for example 40000000")
    return int(raw)


def _open(source: Path | bytes, where: str) -> Image.Image:
    """The picture with its header read and no pixel decoded."""
    known = "use a JPEG, PNG, WebP, BMP, GIF or TIFF file (convert HEIC and others first)"
    if isinstance(source, Path) and is_stored(source):
        source = _stored(source, where)
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise PictureError(f"{where}: not a file", "name the picture file itself")  # a pipe would block for ever
    try:
        with warnings.catch_warnings():
            # Pillow warns or raises at sizes of its own; our limit below is the lower one and names the numbers.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{where}: far too many pixels", f"make the picture smaller than {max_pixels():,} pixels") from error
    except FileNotFoundError as error:
        raise PictureError(f"{where}: no such picture", "check the path (in a data file it starts from the file's folder)") from error
    except Exception as error:
        if _begins_as_webp(source):  # Pillow decodes these when it opens them
            raise PictureError(f"{where}: {_CUT[0]}", _CUT[1]) from error
        empty = (len(source) if isinstance(source, bytes) else _size(source)) == 0
        raise PictureError(f"{where}: {'the file is empty' if empty else 'not a picture that can be read'}", known) from error
    width, height = picture.size
    limit = max_pixels()
    if width * height > limit:
        raise PictureError(
            f"{where}: {width}x{height} is {width * height:,} pixels; the limit is {limit:,}",
            "make the picture smaller, or raise the limit with INTERVALE_MAX_PIXELS",
        )
    return picture


def _stored(path: Path, where: str) -> bytes:
    try:
        return picture_bytes(path)
    except OSError as error:
        raise PictureError(
            f"{where}: cannot be read from its archive: {error.strerror}", "restore the archive, or remove its index"
        ) from error


def _begins_as_webp(source: Path | bytes) -> bool:
    try:
        if isinstance(source, bytes):
            head = source[:12]
        else:
            with source.open("rb") as file:
                head = file.read(12)
    except OSError:
        return False
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def load_picture(source: Path | bytes, where: str = "", *, rough: int | None = None) -> Image.Image:
    """Decode a file or bytes to an upright RGB picture.

    `rough`: both sides may come out smaller, though not below so many pixels (a JPEG is then decoded several times as fast).
    Raises: PictureError naming `where` (default: the path) for a missing, empty, damaged, too large or foreign file.
    """
    where = where or (str(source) if isinstance(source, Path) else "the picture")
    picture = _open(source, where)
    with picture:
        try:
            if rough is not None:
                picture.draft("RGB", (rough, rough))
            # load() first: the EXIF step may otherwise meet a truncated stream half-way.
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            # The official code drops alpha this way; converting before any processor keeps the pixels equal to its own.
            return upright.convert("RGB")
        except Exception as error:
            raise PictureError(f"{where}: {_CUT[0]}", _CUT[1]) from error


def picture_size(source: Path | bytes, where: str = "") -> tuple[int, int]:
    """(width, height) as the picture will stand after EXIF, from the header alone (a PNG may hide its EXIF behind the pixels).

    Raises: PictureError as `load_picture` does, except for damage past the header.
    """
    where = where or (str(source) if isinstance(source, Path) else "the picture")
    with _open(source, where) as picture:
        width, height = picture.size
        try:
            sideways = picture.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
        except Exception as error:
            raise PictureError(
                f"{where}: the picture is damaged or cut short", "replace the file, or save it again with an image editor"
            ) from error
    return (height, width) if sideways else (width, height)
