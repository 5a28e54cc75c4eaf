"""A Desk from what a user names: a model alone, a run beside its base (one copy of the weights), or any two models."""

from __future__ import annotations

import re
from pathlib import Path

from intervale.core.errors import UserError
from intervale.engine.local import CACHE_BYTES, FEATURE_BYTES, Face, LocalEngine, faces_of
from intervale.engine.scheduler import ACTIVE, WAITING, Scheduler
from intervale.model.adapt import checkpoint_of
from intervale.model.load import as_device, load_model, load_text_side, resolve_model
from intervale.model.pair import load_pair

_NO_NAME = re.compile(
    r"run|runs|out|output|model|checkpoints|step-\d+|best|last"
)  # what a folder is called that says what it is, not whose
CPU_TILES = 4  # a 448-pixel tile takes about 4 s on two cores


def default_tiles(model: str, device: str | None) -> int | None:
    """The most tiles a picture where the user named none: fewer on a CPU with large tiles, else None (the model's own)."""
    if as_device(device).type != "cpu":
        return None
    tiling = load_text_side(model).tiling
    return CPU_TILES if tiling.tile_size >= 448 and tiling.max_tiles > CPU_TILES else None


def short_path(model: str) -> str:
    """The end of a path that says which model it is: 'tuned', or 'quickstart/run' where the last part is everybody's; of a hub id its name."""
    if not Path(model).exists():
        return model.rstrip("/").rpartition("/")[2]
    parts = Path(model).expanduser().resolve().parts[1:]
    start = next((at for at in range(len(parts) - 1, -1, -1) if not _NO_NAME.fullmatch(parts[at])), len(parts) - 1)
    return "/".join(parts[start:])


def name_of(model: str) -> str:
    """What an API calls a model: the first part of its short path."""
    return short_path(model).partition("/")[0]


def two_names(first: str, second: str) -> tuple[str, str]:
    """Names of two models, told apart where they are called the same."""
    one, two = name_of(first), name_of(second)
    return one, two if one != two else f"{two}-base"


def local_desk(
    model: str,
    base: str | None = None,
    adapter: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_tiles: int | None = None,
    active: int = ACTIVE,
    waiting: int = WAITING,
    cache_bytes: int = FEATURE_BYTES + CACHE_BYTES,
) -> Scheduler:
    """`model` answers, and beside it `base`; or `model` is the base of `adapter` (a run). A run brings its own base along.

    `cache_bytes`: a third for pictures, the rest for conversations.

    Raises: UserError when they do not fit together.
    """
    if adapter is not None:
        if base is not None:
            raise UserError("--base and --adapter together", "give MODEL --adapter RUN, or RUN (--base MODEL where it has moved)")
        model, base = adapter, model
    if checkpoint_of(resolve_model(model)) is not None:
        pair = load_pair(model, base, dtype=dtype, device=device, max_tiles=max_tiles)
        faces = faces_of(pair, *two_names(model, base or str(pair.base.folder)))
    elif adapter is not None:
        raise UserError(f"{adapter}: not a training run or checkpoint", "name the folder that `intervale train` wrote")
    else:
        first = load_model(model, dtype=dtype, device=device, max_tiles=max_tiles)
        faces = {name_of(model): Face(first)}
        if base is not None:
            one, two = two_names(model, base)
            faces = {one: Face(first), two: Face(load_model(base, dtype=dtype, device=device, max_tiles=max_tiles))}
    first_model = next(iter(faces.values())).model
    engine = LocalEngine(first_model, faces, feature_bytes=cache_bytes // 3, cache_bytes=cache_bytes - cache_bytes // 3)
    return Scheduler(engine, tuple(faces), active=active, waiting=waiting)
