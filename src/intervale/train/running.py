"""What the steps of a run share, in one object."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import InternVLForConditionalGeneration

from intervale.data.dataset import TileCache
from intervale.train.batches import Batch
from intervale.train.best import Scores
from intervale.train.job import Job
from intervale.train.memory import Fit
from intervale.train.optimizer import Optimizers
from intervale.train.parallel import World, wait
from intervale.train.prepare import recompute_tower
from intervale.train.saving import Saver
from intervale.train.state import Progress
from intervale.train.step import Compute
from intervale.train.strategy import Strategy, spare_batch
from intervale.train.tracking import Trackers


@dataclass
class Loop:
    """What the steps share. One object, so that its parts are named once."""

    job: Job
    world: World
    network: InternVLForConditionalGeneration
    optimizer: Optimizers
    strategy: Strategy
    compute: Compute
    cache: TileCache
    known: Mapping[str, tuple[str, int]] | None  # the pictures whose features are kept
    total: int
    progress: Progress
    share: bool = False
    fit: Fit = field(default_factory=lambda: Fit(0, False))
    begun: float = field(default_factory=time.monotonic)
    an_epoch: int = 1  # items
    stop: int | None = None
    skipped: set[str] = field(default_factory=set)
    spare: Batch = field(default_factory=spare_batch)
    scores: Scores = field(default_factory=Scores)
    saver: Saver = field(default_factory=Saver)
    trackers: Trackers | None = None  # of the first process

    def settle(self) -> None:
        """Wait, in every process, for what is being written, before all of them leave: when one has left, its launcher ends the others."""
        self.saver.wait()
        wait(self.world)

    def refit(self, fit: Fit) -> None:
        """Take another plan for the memory."""
        self.fit = fit
        walk = replace(self.compute.walk, recompute=fit.recompute)
        self.compute = replace(self.compute, walk=walk)
        if fit.recompute:
            recompute_tower(self.network, self.job.recipe)
