"""How far apart are copies of a picture, and how near each other are different ones, by the difference hash and the grey fields that find training pictures?

python bench/looks.py DATA PHOTOGRAPHS

DATA: a folder with train.jsonl and eval.jsonl that share no picture (`intervale prepare foodieqa foodemoji DATA`); PHOTOGRAPHS: a folder of JPEGs.
"""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from imagehash import dhash
from PIL import Image

from intervale.core.records import read_records
from intervale.data.images import load_picture
from intervale.evaluate.contamination import look_of

SIDES = (8, 16)  # of the hash: 64 and 256 bits


def again(picture: Image.Image, quality: int) -> Image.Image:
    kept = io.BytesIO()
    picture.save(kept, "JPEG", quality=quality)
    return Image.open(kept).convert("RGB")


def copies(picture: Image.Image) -> dict[str, Image.Image]:
    width, height = picture.size
    return {
        "JPEG quality 30": again(picture, 30),
        "half the size": picture.resize((width // 2, height // 2)),
        "256 pixels wide": picture.resize((256, round(256 * height / width))),
        "15% brighter": picture.point(lambda level: min(255, round(level * 1.15))),
        "2% cropped at each edge": picture.crop((width // 50, height // 50, width - width // 50, height - height // 50)),
    }


def bits(pictures: list[Image.Image], side: int) -> np.ndarray:
    return np.array([dhash(picture, side).hash.ravel() for picture in pictures])


def greys(pictures: list[Image.Image]) -> np.ndarray:
    looks = [look_of(picture) for picture in pictures]
    assert all(looks), "a picture without structure"
    return np.array([look.grey_1024 for look in looks if look])


def main(data: Path, photographs: Path) -> dict[str, object]:
    own = [load_picture(path) for path in sorted(photographs.rglob("*.jp*g"))]
    changed: dict[str, list[Image.Image]] = {}
    for picture in own:
        for name, copy in copies(picture).items():
            changed.setdefault(name, []).append(copy)
    sides = [sorted({r.root / image for r in read_records(data / f"{name}.jsonl") for image in r.images}) for name in ("train", "eval")]
    train, held = ([load_picture(path) for path in side] for side in sides)
    found: dict[str, object] = {"photographs": len(own), "drawings": [len(train), len(held)]}
    for side in SIDES:
        plain = bits(own, side)
        found[f"{side * side} bits"] = {
            "nearest different photographs": min(int((one != other).sum()) for one, other in itertools.combinations(plain, 2)),
            "nearest different drawings": int(min((bits(train, side) != one).sum(1).min() for one in bits(held, side))),
            "farthest copy": {name: int((bits(pictures, side) != plain).sum(1).max()) for name, pictures in changed.items()},
        }
    plain, taught = greys(own), greys(train)
    found["grey fields"] = {
        "nearest different photographs": round(min(float(np.abs(one - other).max()) for one, other in itertools.combinations(plain, 2)), 2),
        "nearest different drawings": round(min(float(np.abs(taught - one).max(1).min()) for one in greys(held)), 2),
        "farthest copy": {name: round(float(np.abs(greys(pictures) - plain).max()), 2) for name, pictures in changed.items()},
    }
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
