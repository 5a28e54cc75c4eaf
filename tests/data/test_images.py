import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intervale.core.errors import UserError
from intervale.data.images import load_picture, picture_size


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO"])
def test_every_listed_format_is_read_as_rgb(kind: str) -> None:
    assert load_picture(saved(Image.new("RGB", (20, 10), (200, 10, 10)), kind)).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(orientation: int) -> None:
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 255, 255), (0, 0, 10, 10))  # a mark in one corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture, "PNG", exif=exif)
    upright = load_picture(data)
    assert upright.size == picture_size(data) == ((40, 20) if orientation < 5 else (20, 40))
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    x, y = corner[0] * (upright.width - 1), corner[1] * (upright.height - 1)
    assert upright.getpixel((x, y)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16", "CMYK", "1", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    assert load_picture(saved(Image.new(mode, (8, 8)), kind)).mode == "RGB"


def test_alpha_is_dropped_as_the_official_code_drops_it() -> None:
    data = saved(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG")
    assert np.asarray(load_picture(data))[0, 0].tolist() == [10, 20, 30]


def test_a_truncated_picture_is_an_error_never_grey(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    for kind in ("JPEG", "PNG", "WEBP"):
        data = saved(noise, kind)
        (tmp_path / "half").write_bytes(data[: len(data) // 2])
        for source in (data[: len(data) // 2], tmp_path / "half"):
            with pytest.raises(UserError, match="damaged or cut short") as caught:
                load_picture(source)
            assert caught.value.fix.startswith("replace the file")


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "empty"), (b"hello", "not a picture"), (b"%!PS-Adobe EPSF", "not a picture"), (b"<svg/>", "not a pic")]
)
def test_what_is_no_picture_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.png.*{why}"):
        load_picture(tmp_path / "x.png")


def test_too_many_pixels_are_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = saved(Image.new("1", (13000, 13000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for look in (load_picture, picture_size):
        with pytest.raises(UserError, match="13000x13000 is 169,000,000 pixels; the limit is 40,000,000"):
            look(bomb)


def test_the_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (20, 20)), "PNG")
    monkeypatch.setenv("INTERVALE_MAX_PIXELS", "399")
    with pytest.raises(UserError, match="limit is 399"):
        load_picture(data)
    monkeypatch.setenv("INTERVALE_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="INTERVALE_MAX_PIXELS"):
        load_picture(data)
