"""The training recipe: every key, its default and its meaning. docs/recipe.md is the table for people.

The defaults are the tutorial's (XTuner's InternVL2-2B LoRA): LoRA 128/256/0.05, AdamW 3e-5, cosine after 3% warm-up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Strict = ConfigDict(extra="forbid", frozen=True)
PositiveInt = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Source(BaseModel):
    """One source of a mix: a file or a pattern of files, and how often an epoch shows its items (0.5: half of them, the rest next)."""

    model_config = _Strict
    path: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Data(BaseModel):
    """What is read and how."""

    model_config = _Strict
    train: str | Annotated[list[Source], Field(min_length=1)]
    index: Literal["auto", "on", "off"] = "auto"
    eval: str | None = None
    max_length: PositiveInt = 8192
    max_tiles: PositiveInt | None = None
    min_tiles: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0)] = 2
    on_bad_sample: Literal["fail", "skip"] = "fail"
    features_dir: str | None = None
    features_gib: Number = 20

    def sources(self) -> list[Source]:
        """What `train` names, as a list."""
        return [Source(path=self.train)] if isinstance(self.train, str) else self.train


class Lora(BaseModel):
    """Low-rank adapters, where `train` asks for them."""

    model_config = _Strict
    rank: PositiveInt = 128
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: str = "llm"
    quantize: Literal["none", "nf4"] = "none"


class Train(BaseModel):
    """What learns, for how long, how fast."""

    model_config = _Strict
    vision: Literal["frozen", "lora", "full"] = "frozen"
    projector: Literal["frozen", "full"] = "full"
    llm: Literal["frozen", "lora", "full"] = "lora"
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 4
    accumulation: PositiveInt = 2
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-5
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: Number = 0.05
    max_norm: Number = 1.0
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    save_steps: PositiveInt = 64
    save_total_limit: Annotated[int, Field(ge=-1)] = 3
    eval_steps: PositiveInt | None = None
    patience: PositiveInt | None = None
    features: Literal["auto", "cache", "live"] = "auto"
    share_prefix: Literal["auto", "on", "off"] = "auto"
    checkpointing: Literal["auto", "on", "off"] = "auto"
    pack_tokens: Literal["auto"] | PositiveInt = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    fused_lora: Literal["auto", "off"] = "auto"


class Parallel(BaseModel):
    """How many processes work on a step, and who holds what."""

    model_config = _Strict
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"] = "single"
    processes: PositiveInt | None = None
    zero_stage: Literal[1, 2, 3] = 2


class Log(BaseModel):
    """Where the numbers are copied to: true, or for the services the name of a project."""

    model_config = _Strict
    tensorboard: bool = False
    wandb: bool | str = False
    swanlab: bool | str = False


class TrainRecipe(BaseModel):
    """A whole recipe."""

    model_config = _Strict
    model: str
    out: str | None = None
    data: Data
    lora: Lora = Lora()
    train: Train = Train()
    parallel: Parallel = Parallel()
    log: Log = Log()

    @model_validator(mode="after")
    def _something_learns(self) -> TrainRecipe:
        parts = (self.train.vision, self.train.projector, self.train.llm)
        if all(part == "frozen" for part in parts) and not self.lora_targets():
            raise ValueError("nothing is trained: vision, projector and llm are all frozen")
        targets = self.lora.targets.split("+")
        if self.train.llm == "lora" and not {"llm", "head"} & set(targets):
            raise ValueError(f"train.llm is lora, but lora.targets {self.lora.targets!r} names neither llm nor head")
        if "vision" in targets and self.train.vision != "lora":
            raise ValueError("lora.targets names vision: set train.vision to lora too, or leave it out")
        if self.train.save_total_limit == 0:
            raise ValueError("train.save_total_limit is 0: use -1 to keep all checkpoints, or a positive number")
        return self

    @model_validator(mode="after")
    def _engines_fit(self) -> TrainRecipe:
        strategy, processes = self.parallel.strategy, self.parallel.processes
        if strategy == "single" and (processes or 1) > 1:
            raise ValueError(f"parallel.processes is {processes}: set parallel.strategy to ddp, fsdp or deepspeed")
        if strategy in ("fsdp", "deepspeed") and self.train.optimizer == "muon":
            raise ValueError(f"train.optimizer muon needs whole matrices, and parallel.strategy {strategy} splits them: use adamw or ddp")
        if self.lora.quantize != "none" and self.train.llm != "lora":
            raise ValueError("lora.quantize is for a frozen language model under LoRA: set train.llm to lora")
        if self.lora.quantize != "none" and (strategy == "fsdp" or (strategy == "deepspeed" and self.parallel.zero_stage == 3)):
            raise ValueError("lora.quantize needs whole layers: use parallel.strategy ddp, or deepspeed with zero_stage 1 or 2")
        if self.train.patience and not (self.data.eval and self.train.eval_steps):
            raise ValueError("train.patience counts held-out evaluations: set data.eval and train.eval_steps too")
        return self

    def lora_targets(self) -> str:
        """The parts that get LoRA, joined by '+': what `lora.targets` names, as far as `train` asks for LoRA there."""
        asked = self.lora.targets.split("+")
        wanted = []
        if self.train.llm == "lora":
            wanted += [target for target in asked if target != "vision"]
        if self.train.vision == "lora":
            wanted.append("vision")
        return "+".join(wanted)


def run_folder(recipe: TrainRecipe, name: str) -> Path:
    """Where a run of a recipe called `name` lies."""
    return Path(recipe.out or Path("runs") / name)
