"""How many tokens go through the network at once, and whether activations are made again on the way back: as fast as memory allows.

Promises: every choice here changes the speed and not the step, which divides by all of its target tokens however it is cut. What is
estimated is tried; where memory ends all the same, the same step is made again with smaller packs, then with recomputed activations
(`lower`), and the run says so. Cost: nothing until memory ends; then the step that failed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from intervale.core.lang import say
from intervale.train.recipe import TrainRecipe

_MOST_TOKENS = 16384  # of a pack: five pictures of 13 tiles; more takes memory and no longer saves launches worth having
_SHARE = 0.85  # of the free memory that a plan may count on
_FAR_OVER = 2.0  # an estimate this many times over the room is not worth a try


@dataclass(frozen=True)
class Fit:
    """`tokens` of a pack (one item may have more; 0: `train.batch_size` items a pack), and are activations recomputed?"""

    tokens: int
    recompute: bool


def first_fit(recipe: TrainRecipe, device: torch.device, longest: int, room: float, kept: float, recomputed: float) -> Fit:
    """The first plan. `room`: bytes left for activations; `kept` and `recomputed`: bytes a token, estimated for the two ways."""
    asked, wanted = recipe.train.pack_tokens, recipe.train.checkpointing
    ask = 0 if asked == "auto" else asked
    if device.type != "cuda":
        rows = max(ask, longest) if ask else recipe.train.batch_size * longest
        return Fit(ask, wanted == "on" or (wanted == "auto" and rows * kept > _SHARE * room))
    over = longest * kept > _FAR_OVER * _SHARE * room
    recompute = wanted == "on" or (wanted == "auto" and over)
    possible = int(_SHARE * room / (recomputed if recompute else kept))
    return Fit(ask or max(longest, min(_MOST_TOKENS, possible)), recompute)


def after_first_step(fit: Fit, device: torch.device, longest: int, tokens: int) -> Fit:
    """The plan again, from what the first step's largest pack of `tokens` tokens took: packs that would not fit are made smaller,
    none larger than the recipe asked for."""
    if device.type != "cuda" or not fit.tokens or not tokens:
        return fit
    static = torch.cuda.memory_allocated(device)
    each = max(1.0, (torch.cuda.max_memory_allocated(device) - static) / tokens)
    free, _ = torch.cuda.mem_get_info(device)
    room = 0.92 * (free + torch.cuda.memory_reserved(device)) - static
    return replace(fit, tokens=min(fit.tokens, max(longest, int(room / each))))


def lower(fit: Fit, recipe: TrainRecipe, longest: int) -> Fit | None:
    """The next rung when memory has ended: half the tokens, down to one item a pack, then recomputed activations; None at the end."""
    if fit.tokens == 0 or fit.tokens > longest:
        most = fit.tokens or recipe.train.batch_size * longest
        return replace(fit, tokens=max(longest, most // 2))
    if recipe.train.checkpointing == "auto" and not fit.recompute:
        return replace(fit, recompute=True)
    return None


def at_once(fit: Fit, recipe: TrainRecipe, longest: int, a_step: int) -> int:
    """The most tokens that go through the network at once when a step has `a_step` items: an item may have more than a pack."""
    return min(max(fit.tokens, longest), a_step * longest) if fit.tokens else recipe.train.batch_size * longest


def what_to_set(recipe: TrainRecipe, gpu: bool, climbed: bool) -> str:
    """What may still help when memory has ended; `climbed`: the ladder has tried smaller packs and, where it might, recomputing."""
    settings = []
    if not climbed and recipe.train.pack_tokens != 1:
        settings.append("train.pack_tokens: 1 (an item at a time, the same step)")
    if recipe.train.checkpointing == "off" or (not climbed and recipe.train.checkpointing == "auto"):
        settings.append("train.checkpointing: on")
    if recipe.train.llm == "full":
        settings.append("train.llm: lora")
    elif gpu and recipe.train.llm == "lora" and recipe.lora.quantize == "none" and recipe.parallel.strategy in ("single", "ddp"):
        settings.append("lora.quantize: nf4")
    fewer = "lower data.max_tiles"
    return f"set {', '.join(settings)}, or {fewer}" if settings else fewer


def in_words(fit: Fit, recipe: TrainRecipe) -> str:
    """The plan for the log."""
    size = recipe.train.batch_size
    packs = say(f"packs of up to {fit.tokens:,} tokens", f"每个 pack 至多 {fit.tokens:,} 个 token")
    if fit.tokens == 0:
        packs = say(f"packs of {size} items", f"每个 pack {size} 条")
    elif fit.tokens == 1:
        packs = say("an item at a time", "逐条计算")
    return packs + (say(", activations recomputed", "，重算激活值") if fit.recompute else "")
