"""The features of a frozen tower during a run: where they are kept, filled before the first step, found by picture afterwards.

Promises: a run with kept features is the run without them (tests); what cannot be kept is computed live, and the log says which and
why; an entry that is lost or damaged meanwhile is computed again. Cost: the pass of `train.encode`, then one copy a picture and step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.files import inside
from intervale.core.lang import say
from intervale.core.records import Record
from intervale.data.images import picture_size
from intervale.data.pictures import Picture, count_tiles, load_tiles, pictures_of
from intervale.data.tiling import Tiling
from intervale.model.feature_plan import Place, Plan, default_store_folder, plan_features
from intervale.model.features import FeatureStore, Stage, bytes_needed, tower_digest
from intervale.train.encode import encode_pictures, forward_of
from intervale.train.job import Job
from intervale.train.parallel import World, wait
from intervale.train.prepare import free_memory

_CPU_BATCH, _GPU_BATCH = 16, 64  # tiles a forward pass
_MANY = 100_000  # pictures: about a kilobyte of memory and a read of the file each


def plan_of(job: Job, network: InternVLForConditionalGeneration, dtype: torch.dtype, processes: int = 1) -> Plan:
    """Where this run keeps its features, and why. Raises: UserError for `cache` where the tower learns or nothing has room."""
    recipe, wanted = job.recipe, job.recipe.train.features
    if recipe.train.vision != "frozen":
        if wanted == "cache":
            what = "train.features is cache, but train.vision is not frozen: the features change at every step"
            raise UserError(what, "use auto or live")
        return Plan("live", say("the vision tower learns", "视觉塔参与训练"), 0)
    if wanted == "live":
        return Plan("live", say("the recipe says so", "配方如此规定"), 0)
    if wanted == "auto" and (many := len(job.train.first_of_pictures())) > _MANY:
        why = say(
            f"{many:,} pictures are too many to go through before the first step (cache insists)",
            f"{many:,} 张图片太多，无法在第一步之前全部处理（cache 可强制）",
        )
        return Plan("live", why, 0)
    pictures = pictures_of(_with_pictures(job))
    if not pictures:
        return Plan("live", say("there are no pictures", "没有图片"), 0)
    count, tiles = count_tiles(pictures, job.side.tiling)
    need = bytes_needed(network.config, job.side.tiling, tiles, count, _stage(job), dtype)
    named = recipe.data.features_dir
    folder = Path(named) if named else default_store_folder()
    budget = int(recipe.data.features_gib * (1 << 30))
    free = free_memory(torch.device("cpu")) // processes  # in memory each process has its own
    # several processes share a folder, each computing its part; in memory each would compute and hold everything
    plan = plan_features(
        need, free_ram=free, folder=folder if budget else None, disk_budget=budget, disk_first=named is not None or processes > 1
    )
    if plan.place == "live" and wanted == "cache":
        raise UserError(
            f"train.features is cache, but {plan.why}", "raise data.features_gib, name a larger disk in data.features_dir, or use auto"
        )
    return plan


def _with_pictures(job: Job) -> list[Record]:
    """An item for every distinct list of pictures."""
    return [job.train[int(number)] for number in job.train.first_of_pictures()]


def told(plan: Plan) -> str:
    """The plan in words."""
    kept = {"ram": ("kept in memory", "保存在内存"), "disk": ("kept on the disk", "保存在磁盘"), "live": ("live", "逐步计算")}[plan.place]
    return say(f"{kept[0]}: {plan.why}", f"{kept[1]}：{plan.why}")


def _stage(job: Job) -> Stage:
    return "projected" if job.recipe.train.projector == "frozen" else "tower"


@dataclass(frozen=True)
class KeptFeatures:
    """A run's features. `known`: {path as the records name it: (key, tiles)} of every picture that is kept."""

    store: FeatureStore
    known: dict[str, tuple[str, int]]
    projected: bool
    _pictures: dict[str, Picture]
    _network: InternVLForConditionalGeneration
    _tiling: Tiling
    _dtype: torch.dtype
    _device: torch.device

    def get(self, key: str) -> torch.Tensor:
        """(tiles, tokens, width) on the CPU. Raises: UserError when an entry was lost and its picture cannot be read any more."""
        found = self.store.get(key)
        if found is not None:
            return found
        tiles = load_tiles(self._pictures[key], self._tiling)
        if isinstance(tiles, UserError):
            raise tiles
        compute = forward_of(self._network, "projected" if self.projected else "tower", self._dtype, self._device)
        computed = compute(torch.from_numpy(np.require(tiles, requirements="W")).to(self._device)).cpu()
        self.store.put(key, computed)
        return computed


def fill(job: Job, world: World, network: InternVLForConditionalGeneration, dtype: torch.dtype, plan: Plan) -> KeptFeatures | None:
    """Compute what is not kept yet; None where the plan is to compute live. A KeyboardInterrupt loses nothing that is stored."""
    if plan.place == "live":
        return None
    store = _store(job, world, plan.place, plan.need)
    stage, tiling = _stage(job), job.side.tiling
    records = _with_pictures(job)
    pictures = pictures_of(records)
    digest = tower_digest(job.base, projector=stage == "projected")
    share = (world.rank, world.size) if plan.place == "disk" else (0, 1)
    encoded = encode_pictures(
        pictures,
        network,
        tiling,
        store,
        digest=digest,
        dtype=dtype,
        device=world.device,
        stage=stage,
        workers=job.recipe.data.workers,
        batch_tiles=_GPU_BATCH if world.device.type == "cuda" else _CPU_BATCH,
        tell=job.tell,
        share=share,
    )
    wait(world)
    if encoded.bad and job.recipe.data.on_bad_sample == "fail":
        raise encoded.bad[0][1]
    known: dict[str, tuple[str, int]] = {}
    seen: set[tuple[Path, str]] = set()
    for record in records:
        for image in record.images:
            if (record.root, image) in seen:
                continue
            seen.add((record.root, image))
            name = str(record.root / image)
            path = inside(record.root, image, record.where)
            key = encoded.keys.get(path)
            if key is not None and key in store:
                known[name] = (key, tiling.tiles_of(*picture_size(path)))
    return KeptFeatures(store, known, stage == "projected", encoded.distinct, network, tiling, dtype, world.device)


def _store(job: Job, world: World, place: Place, need: int) -> FeatureStore:
    if place == "ram":
        return FeatureStore(None, ram_budget=need, tell=job.tell)
    folder = Path(job.recipe.data.features_dir) if job.recipe.data.features_dir else default_store_folder()
    hot = free_memory(torch.device("cpu")) // world.size // 8
    budget = int(job.recipe.data.features_gib * (1 << 30))
    store = FeatureStore(folder, disk_budget=budget, ram_budget=hot, tell=job.tell)
    if world.first and store.bytes_on_disk + need > budget:  # what was used longest ago makes room, or a full folder would stay as it is
        store.trim(max(0, budget - need))
    return store
