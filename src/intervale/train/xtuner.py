"""An XTuner config of an InternVL fine-tune as one of our recipes, value by value.

Promises: what the config says is in the recipe, or in one of three lists with its line: what differs here, what has no
counterpart, what could not be read. The values are taken from where XTuner takes them (`model`, `train_dataloader`,
`optim_wrapper` ...), not from the settings on top, which a user may no longer use. Nothing is executed (core.pyconfig).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from intervale.core.config import parse_yaml
from intervale.core.errors import UserError
from intervale.core.lang import say
from intervale.core.pyconfig import Found, PyConfig, Unread
from intervale.train.recipe import TrainRecipe
from intervale.train.xtuner_notes import NO_EFFECT, reason_for
from intervale.train.xtuner_walk import Imported, Note, Place, Walk

_LLM_LEAVES = ({"wqkv", "wo", "w1", "w2", "w3"}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
_HEAD_LEAF, _VISION_LEAVES = "output", {"qkv", "proj", "fc1", "fc2"}
_PARTS = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg")


def import_config(config: PyConfig, data: Path) -> Imported:
    """The recipe of a config; `data` is the folder that its data will be prepared into.

    Raises: UserError, with file, line and fix, for a config of another kind or a value that is not data.
    """
    walk, out = Walk(config), Imported(config.where)
    _refuse_other_kinds(walk)
    _model(walk, out)
    _data(walk, out, data)
    _optimizer(walk, out)
    _schedule(walk, out, _length(walk, out))
    _saving(walk, out)
    _rest(walk, out)
    for notes in (out.different, out.missing, out.unread):
        notes.sort(key=lambda note: note.line)
    recipe_of(out)
    return out


def _refuse_other_kinds(walk: Walk) -> None:
    config = walk.config
    based = [entry for entry in config.unread if "read_base" in entry.value.text]
    based += [config.values[name] for name in ("_base_",) if name in config.values]
    if based:
        raise UserError(
            f"{config.at(based[0].line)}: it builds on another config file, which is not read",
            "give the whole config: XTuner writes one into its work_dirs at the start of every run",
        )
    for name in _PARTS:
        if name not in config.values:
            raise UserError(f"{config.where}: no `{name}` in it", "give an XTuner config of an InternVL fine-tune")
    kind = walk.type_of("model")
    if kind != "InternVL_V1_5":
        line = config.values["model"].line
        raise UserError(f"{config.at(line)}: model.type is {kind or 'absent'}", "only InternVL configs (InternVL_V1_5) can be imported")


def _model(walk: Walk, out: Imported) -> None:
    path = walk.text("model", "model_path")
    if path is None:
        raise UserError(f"{walk.config.at(walk.config.values['model'].line)}: no model_path in it", "name the base model's folder there")
    out.put("model", path.value, path)
    llm_lora, vision_lora = walk.get("model", "llm_lora"), walk.get("model", "visual_encoder_lora")
    for part, adapters, switch in (("llm", llm_lora, "freeze_llm"), ("vision", vision_lora, "freeze_visual_encoder")):
        frozen = walk.get("model", switch)
        setting = "lora" if adapters else "frozen" if frozen is not None and frozen.value is True else "full"
        out.put(f"train.{part}", setting, adapters or frozen)
    out.put("train.projector", "full")
    targets = []
    if llm_lora:
        targets += _lora(walk, out, "llm_lora", _llm_targets)
        small = walk.get("model", "quantization_llm")  # without LoRA it has no counterpart, and is told as such
        if small is not None and small.value is True:
            out.put("lora.quantize", "nf4", small)
            out.differs("quantize", small)
    if vision_lora:
        before = {key: value for key, value in out.values.items() if key.startswith("lora.")}
        targets += _lora(walk, out, "visual_encoder_lora", _vision_targets)
        after = {key: value for key, value in out.values.items() if key.startswith("lora.")}
        if before and before != after:
            out.lacks(
                vision_lora,
                f"visual_encoder_lora has other numbers ({after}); a recipe has one `lora` section, which keeps those of llm_lora",
                f"visual_encoder_lora 的数值不同（{after}）；配方只有一个 `lora` 部分，采用 llm_lora 的数值",
            )
            out.values |= before
    if targets:
        out.put("lora.targets", "+".join(targets), llm_lora or vision_lora)


def _lora(walk: Walk, out: Imported, name: str, targets_of: Any) -> list[str]:
    rank, alpha = walk.number("model", name, "r", whole=True), walk.number("model", name, "lora_alpha")
    dropout, kind = walk.number("model", name, "lora_dropout"), walk.type_of("model", name)
    place = walk.config.at(walk.config.values["model"].value[name].line)
    if kind != "LoraConfig":
        raise UserError(f"{place}: model.{name}.type is {kind or 'absent'}", "only LoraConfig can be imported")
    out.put("lora.rank", rank.value if rank else 8, rank)  # what is absent has PEFT's default
    out.put("lora.alpha", alpha.value if alpha else 8, alpha)
    out.put("lora.dropout", dropout.value if dropout else 0.0, dropout)
    modules = walk.get("model", name, "target_modules")
    leaves = None if modules is None else {str(part).rsplit(".", 1)[-1] for part in _listed(modules)}
    return list(targets_of(walk, out, leaves, modules))


def _listed(found: Found) -> list[Any]:
    value = found.plain()
    return value if isinstance(value, list) else [value]


def _llm_targets(walk: Walk, out: Imported, leaves: set[str] | None, modules: Found | None) -> list[str]:
    """XTuner's default reaches every linear layer but `lm_head`; InternLM2's head is called `output`, so it is among them."""
    if leaves is None:
        if not _internlm2(walk, out):
            return ["llm"]
        out.differs("head", walk.get("model", "llm_lora"))
        return ["llm", "head"]
    if leaves - {_HEAD_LEAF, "lm_head"} not in _LLM_LEAVES:
        out.lacks(
            modules,
            f"target_modules {sorted(leaves)}: a recipe's LoRA reaches every linear layer of the language model (targets: llm)",
            f"target_modules {sorted(leaves)}：配方的 LoRA 作用于语言模型的全部线性层（targets: llm）",
        )
    return ["llm", "head"] if leaves & {_HEAD_LEAF, "lm_head"} else ["llm"]


def _vision_targets(walk: Walk, out: Imported, leaves: set[str] | None, modules: Found | None) -> list[str]:
    if leaves is not None and leaves != _VISION_LEAVES:
        out.lacks(
            modules,
            f"target_modules {sorted(leaves)}: a recipe's LoRA reaches every linear layer of the vision tower (targets: vision)",
            f"target_modules {sorted(leaves)}：配方的 LoRA 作用于视觉塔的全部线性层（targets: vision）",
        )
    return ["vision"]


def _internlm2(walk: Walk, out: Imported) -> bool:
    """Is the language model an InternLM2? By its config.json where it is here, else by the template, else by the name."""
    config = Path(out.values["model"]).expanduser() / "config.json"
    try:
        kind = str(json.loads(config.read_text(encoding="utf-8"))["llm_config"]["architectures"][0]).lower()
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        template = walk.get("train_dataloader", "dataset", "template")
        kind = str(template.plain() if template else "").lower()
        kind = kind if "internlm2" in kind or "phi3" in kind else out.values["model"].lower()
    return "internlm2" in kind or not any(word in kind for word in ("phi", "4b", "qwen", "llama"))


def _data(walk: Walk, out: Imported, data: Path) -> None:
    at = ("train_dataloader", "dataset")
    kind = walk.type_of(*at)
    if kind != "InternVL_V1_5_Dataset":
        found = walk.config.values["train_dataloader"]
        raise UserError(
            f"{walk.config.at(found.line)}: train_dataloader.dataset.type is {kind or 'absent'}",
            "only InternVL_V1_5_Dataset can be imported",
        )
    files, folders = walk.get(*at, "data_paths"), walk.get(*at, "image_folders")
    names = [str(name) for name in _listed(files)] if files else []
    if files is None or not names:
        raise UserError(
            f"{walk.config.at(walk.config.values['train_dataloader'].line)}: no data_paths in its dataset", "name the data file there"
        )
    root = str(_listed(folders)[0]) if folders and _listed(folders) else "."
    source = names[0]
    if len(names) > 1:
        source = "JOINED.json"
        out.lacks(
            files,
            f"{len(names)} data files ({', '.join(names)}): `prepare` reads one; join their lists into one, with image paths from one folder",
            f"{len(names)} 个数据文件（{', '.join(names)}）：`prepare` 只读一个；请先合并成一个文件，图片路径相对同一文件夹",
        )
    out.put("data.train", str(data / "train.jsonl"), files)
    out.prepare.append(f"intervale prepare llava {shlex.quote(source)} {shlex.quote(str(data))} --image-root {shlex.quote(root)}")
    repeat = walk.get(*at, "repeat_times")
    if repeat is not None and any(times != 1 for times in _listed(repeat)):
        out.lacks(
            repeat,
            f"repeat_times {repeat.plain()}: every item is used once an epoch",
            f"repeat_times {repeat.plain()}：每轮每条数据使用一次",
        )
    length = walk.number(*at, "max_length", whole=True)
    out.put("data.max_length", length.value if length else 8192, length)
    out.differs("length", length)
    out.differs("template", walk.get(*at, "template"))
    out.differs("pictures", files)
    workers = walk.number("train_dataloader", "num_workers", whole=True)
    out.put("data.workers", workers.value if workers else 0, workers)
    size = walk.number("train_dataloader", "batch_size", whole=True)
    out.put("train.batch_size", size.value if size else 1, size)
    walk.get(*at, "model_path")


def _optimizer(walk: Walk, out: Imported) -> None:
    wrapper, optimizer = ("optim_wrapper",), ("optim_wrapper", "optimizer")
    counts = walk.number(*wrapper, "accumulative_counts", whole=True, least=1)
    out.put("train.accumulation", counts.value if counts else 1, counts)
    if out.values["train.accumulation"] > 1:
        out.differs("mean", counts, count=out.values["train.accumulation"])
    kind = walk.type_of(*optimizer)
    if kind != "AdamW":
        out.lacks(
            walk.get(*optimizer, "type"),
            f"optimizer {kind or '(none)'}: the recipe takes AdamW instead",
            f"优化器 {kind or '（无）'}：配方使用 AdamW",
        )
    rate = walk.number(*optimizer, "lr")
    out.put("train.learning_rate", float(rate.value) if rate else 1e-3, rate)  # torch's default for AdamW
    betas = walk.get(*optimizer, "betas")
    pair = betas.plain() if betas else [0.9, 0.999]
    if not isinstance(pair, list) or not all(isinstance(beta, int | float) for beta in pair):
        place = walk.config.at(betas.line if betas else 1)
        raise UserError(
            f"{place}: optim_wrapper.optimizer.betas is {pair!r}, not two numbers", "write (0.9, 0.999), or other numbers, there"
        )
    out.put("train.betas", [float(beta) for beta in pair], betas)
    decay = walk.number(*optimizer, "weight_decay")
    out.put("train.weight_decay", decay.value if decay else 0.01, decay)
    out.differs("decay", decay)
    clip = walk.number(*wrapper, "clip_grad", "max_norm")
    out.put("train.max_norm", clip.value if clip else 0, clip)
    dtype, plain = walk.get(*wrapper, "dtype"), walk.type_of(*wrapper) == "OptimWrapper"
    name = "float32" if plain else str(dtype.plain() if dtype else "float16").rsplit(".", 1)[-1]
    out.put("train.precision", {"bfloat16": "bf16", "float32": "fp32"}.get(name, "auto"), dtype)
    if name == "float16":
        out.differs("precision", dtype)


def _length(walk: Walk, out: Imported) -> int | float:
    """Epochs (or micro-batches, when the config counts them) of the run."""
    walk.type_of("train_cfg")
    epochs, iterations = (walk.number("train_cfg", key, whole=True, least=1) for key in ("max_epochs", "max_iters"))
    if epochs is None and iterations is None:
        raise UserError(f"{walk.config.at(walk.config.values['train_cfg'].line)}: neither max_epochs nor max_iters", "add max_epochs there")
    if epochs is not None:
        out.put("train.epochs", epochs.value, epochs)
        return float(epochs.value)
    assert iterations is not None
    out.put("train.epochs", 1_000_000)  # max_steps ends the run
    out.put("train.max_steps", -(-iterations.value // out.values["train.accumulation"]), iterations)
    return float(iterations.value)


def _schedule(walk: Walk, out: Imported, length: float) -> None:
    """Warm-up and fall of the learning rate, from mmengine's list of schedulers."""
    found = walk.get("param_scheduler")
    entries = found.value if found and isinstance(found.value, tuple) else (found,) if found else ()
    schedule, warmup = "constant", 0.0
    for number, entry in enumerate(entries):
        part = Walk(PyConfig(walk.config.where, {"param_scheduler": entry}))
        kind = part.type_of("param_scheduler")
        get = {key: part.number("param_scheduler", key) for key in ("start_factor", "end_factor", "begin", "end", "eta_min", "power")}
        value = {key: None if item is None else item.value for key, item in get.items()}
        epochs = part.get("param_scheduler", "by_epoch")
        counted = (epochs is None or epochs.value is True) == ("train.max_steps" not in out.values)
        if kind == "LinearLR" and (value["start_factor"] or 0) < 1 and number == 0:
            warmup = (value["end"] or 0) / length if counted else 0.0
            out.put("train.warmup_ratio", min(max(round(warmup, 6), 0.0), 0.99), get["end"] or entry)
            out.differs("warmup", entry)
            if not counted:
                out.lacks(
                    entry,
                    "the warm-up's end is counted otherwise than the run's; set train.warmup_ratio",
                    "预热长度的计数方式与训练不同；请自行设置 train.warmup_ratio",
                )
        elif kind in ("CosineAnnealingLR", "PolyLR", "LinearLR", "ConstantLR"):
            schedule = {"CosineAnnealingLR": "cosine", "ConstantLR": "constant"}.get(kind, "linear")
            out.put("train.schedule", schedule, entry)
            odd = {key: value[key] for key in ("eta_min", "end_factor") if value[key]} | (
                {"power": value["power"]} if kind == "PolyLR" else {}
            )
            if odd and odd != {"power": 1}:
                out.lacks(
                    entry,
                    f"{kind} with {odd}: here the rate falls to 0 as `{schedule}`",
                    f"{kind} 的 {odd}：这里学习率按 `{schedule}` 降到 0",
                )
        else:
            out.lacks(entry, f"scheduler {kind or entry.plain()}: nothing stands for it", f"调度器 {kind or entry.plain()}：没有对应")
    out.values.setdefault("train.warmup_ratio", 0.0)
    out.values.setdefault("train.schedule", schedule)


def _saving(walk: Walk, out: Imported) -> None:
    hook = ("default_hooks", "checkpoint")
    interval, limit = walk.number(*hook, "interval", whole=True), walk.number(*hook, "max_keep_ckpts", whole=True)
    epochs = walk.get(*hook, "by_epoch")
    counts = out.values["train.accumulation"]
    if interval is not None and interval.value > 0:
        if epochs is None or epochs.value is True:
            out.lacks(
                interval,
                f"a checkpoint every {interval.value} epochs: set train.save_steps to as many optimizer steps",
                f"每 {interval.value} 轮保存一次：请把 train.save_steps 设为相应的步数",
            )
        else:
            steps = -(-interval.value // counts)
            out.put("train.save_steps", steps, interval)
            if counts > 1:
                out.differs("save", interval, micro=interval.value, steps=steps)
    out.put("train.save_total_limit", limit.value if limit and limit.value else -1, limit)
    seed = walk.number("randomness", "seed", whole=True)
    if seed is not None and 0 <= seed.value < 2**31:
        out.put("train.seed", seed.value, seed)
    else:
        out.put("train.seed", TrainRecipe.model_fields["train"].default.seed)
        out.differs("seed", walk.config.values.get("randomness"), seed=out.values["train.seed"])


def _leaves(found: Found, path: Place) -> Iterator[tuple[Place, Found]]:
    if isinstance(found.value, dict) and found.value:
        for key, entry in found.value.items():
            yield from _leaves(entry, (*path, key))
    else:
        yield path, found


def _rest(walk: Walk, out: Imported) -> None:
    """Everything of the config that was not taken: told with its reason, or as unknown."""
    told: set[str] = set()
    config = walk.config
    statements = {entry.line for entry in config.unread}
    for name, found in config.values.items():
        if name in config.used and not isinstance(found.value, dict):
            continue  # a setting that something else uses
        if name in config.used and name not in (*_PARTS, "default_hooks"):
            continue
        for path, leaf in _leaves(found, (name,)):
            full = ".".join(path)
            if path in walk.taken or NO_EFFECT.get(full, ...) == leaf.plain():
                continue
            prefix, reason = reason_for(full)
            if prefix in told or (isinstance(leaf.value, Unread) and leaf.line in statements):
                continue
            told.add(prefix)
            shown = "" if isinstance(leaf.value, dict | tuple) or prefix != full else f" = {leaf.plain()}"
            (out.unread if isinstance(leaf.value, Unread) else out.missing).append(Note(leaf.line, f"{prefix}{shown}: {reason}"))
    for entry in config.unread:
        out.unread.append(
            Note(
                entry.line,
                f"`{entry.value.text}`: " + say("not executed; what it changes is not in the recipe", "不会执行；它所改变的内容不在配方中"),
            )
        )


def recipe_of(out: Imported) -> TrainRecipe:
    """The recipe itself, by our own strict check. Raises: UserError, its fault told with the config's line."""
    try:
        return TrainRecipe.model_validate(parse_yaml(to_yaml(out), out.where), strict=True)
    except ValueError as error:
        faults: list[Any] = error.errors() if isinstance(error, ValidationError) else []
        first = ".".join(str(part) for part in faults[0]["loc"]) if faults else ""
        told = faults[0]["msg"] if faults else str(error)
        line = out.lines.get(first, 1)
        raise UserError(
            f"{out.where}:{line}: {first or 'recipe'}: {told} (it is {out.values.get(first)!r})", "correct the value in the config"
        ) from error


def to_yaml(out: Imported) -> str:
    """The recipe as YAML, each value with the config's line it comes from."""
    text = [f"# From {out.where} by `intervale import-xtuner`; the number behind a value is its line there.", "# Data:"]
    text += [f"#   {command}" for command in out.prepare]
    section = ""
    for key in sorted(out.values, key=lambda key: ["model", "data", "lora", "train"].index(key.split(".")[0])):
        head, _, name = key.partition(".")
        if name and head != section:
            section = head
            text.append(f"{head}:")
        value = json.dumps(out.values[key], ensure_ascii=False)
        line = f"  # {out.lines[key]}" if key in out.lines else ""
        text.append(f"{'  ' if name else ''}{name or head}: {value}{line}")
    return "\n".join(text) + "\n"
