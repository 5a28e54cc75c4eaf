"""The features that training, or an earlier evaluation, left on the disk: which of them an evaluation reads, and where it writes others.

Promises: an entry is read only if its key agrees, which holds the picture's bytes, the tiling, the tower's weights and the type; what an
evaluation reads is settled when it begins (`features.json` in its folder), because features that were computed in other company are
rounded otherwise, and a continued evaluation must be the straight one. Nothing is written where no folder was named. Cost: nothing where
there is no such folder; else one read of the tower's weights and of every picture file, to name them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import read_json, read_object
from intervale.core.lang import say
from intervale.core.records import Record
from intervale.data.pictures import Picture, hash_pictures, pictures_of
from intervale.model.adapt import ADAPTER, PARTS, TRAINED, base_folder, checkpoint_of
from intervale.model.checkpoint import read_header
from intervale.model.feature_plan import default_store_folder
from intervale.model.features import FeatureStore, Stage, picture_key, tower_digest
from intervale.model.load import Model

Tell = Callable[[str], None]
FEATURES = "features.json"
_GIB = 1 << 30
_MOST = 20 * _GIB  # of a folder that is written to: what training allows itself by default


@dataclass(frozen=True)
class Kept:
    """Features on file. `found`: the picture files whose features are read, and the key and stage of each; `writable`: those whose
    tower features are written, and the picture under its key."""

    store: FeatureStore
    found: dict[str, tuple[str, Stage]]
    writable: dict[str, Picture]

    def told(self) -> dict[str, Any]:
        """The content of features.json."""
        return {"read": sorted({key for key, _ in self.found.values()})}


def _changed_parts(folder: Path) -> set[str]:
    """Which of vision, projector and llm a run or checkpoint holds other weights of."""
    checkpoint = checkpoint_of(folder)
    if checkpoint is None:
        return set()
    names = [name for file in (ADAPTER, TRAINED) if (checkpoint / file).is_file() for name in read_header(checkpoint / file)]
    ours = [name.removeprefix("base_model.model.") for name in names]
    return {
        part
        for part, prefixes in PARTS.items()
        if any(name.startswith(tuple([prefixes] if isinstance(prefixes, str) else prefixes)) for name in ours)
    }


def _folder_of_training(folder: Path) -> Path:
    """Where the run that `folder` is, or is a checkpoint of, kept features on the disk: its data.features_dir, else the default."""
    checkpoint = checkpoint_of(folder)
    for place in (folder, checkpoint.parent.parent) if checkpoint else ():
        if (place / "run.json").is_file():
            named = read_json(place / "run.json").get("features_dir")
            return Path(named) if named else default_store_folder()
    return default_store_folder()


def begun_with(out: Path, answered: int) -> frozenset[str] | None:
    """The keys that the evaluation in `out` reads; None when that is not settled yet. (One begun before there was such a file reads none.)"""
    if (out / FEATURES).is_file():
        return frozenset(read_object(out / FEATURES, "read")["read"])
    return frozenset() if answered else None


def kept_features(model: Model, records: Sequence[Record], named: Path | None, begun: frozenset[str] | None, tell: Tell) -> Kept | None:
    """What there is on file for an evaluation of `records`, or None.

    `named`: read there and write there; without it, read where the training of this model would have written. `begun`: of a continued
    evaluation, the only keys that are read. Raises: UserError for a picture that cannot be read.
    """
    folder = named or _folder_of_training(model.folder)
    if named is None and not begun and (begun is not None or not folder.is_dir()):
        return None
    changed = _changed_parts(model.folder)
    if "vision" in changed:  # the digest is of the base's weights
        if named is not None:
            tell(say("this model's vision tower was trained: its features are neither read nor written",
                     "该模型的视觉塔参与了训练：不读取也不写入特征缓存"))  # fmt: skip
        return None
    base, dtype = base_folder(model.folder), model.network.dtype
    stages: tuple[Stage, ...] = ("tower",) if "projector" in changed else ("projected", "tower")
    digests = {stage: tower_digest(base, projector=stage == "projected") for stage in stages}
    store = FeatureStore(folder, disk_budget=_MOST if named else 0, tell=tell)
    found: dict[str, tuple[str, Stage]] = {}
    writable: dict[str, Picture] = {}
    named_pictures = pictures_of(records)
    for path, sha in hash_pictures(named_pictures, tell).items():
        if isinstance(sha, UserError):
            raise sha
        keys = {stage: picture_key(sha, model.tiling, digests[stage], stage, dtype) for stage in stages}
        there = [(key, stage) for stage, key in keys.items() if (key in store if begun is None else key in begun)]
        if there:
            found[str(path)] = there[0]
        elif named is not None:
            writable[str(path)] = Picture(keys["tower"], path, sha, named_pictures[path])
    tell(say(f"features: {len(found)} of {len(named_pictures)} pictures are read from {folder}",
             f"特征：{len(named_pictures)} 张图片中有 {len(found)} 张从 {folder} 读取"))  # fmt: skip
    return Kept(store, found, writable)
