"""XTuner's `iter_N.pth` as a checkpoint folder of ours: LoRA in PEFT's format, the projector, and what they stand on.

Promises: the file is read in a sandbox (model.pickled); every tensor is used or refused by name, its shape held against the
base; LoRA on a fused matrix becomes LoRA on its parts with the same product: A is shared, B's rows are dealt out as the
matrix's own are. Numbers are kept (float16 and bfloat16 widen to float32). Cost: the file's bytes a few times.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from intervale.core.errors import UserError
from intervale.core.files import disk_errors, need_space, refuse_existing, staged_folder, write_json
from intervale.core.lang import say
from intervale.core.pyconfig import PyConfig, parse_pyconfig, read_pyconfig
from intervale.model import families, layout
from intervale.model.adapt import ADAPTER, BASE, TRAINED, checkpoint_of, lora_pattern, write_manifest
from intervale.model.pickled import read_pickled
from intervale.model.source import Source, fingerprint, open_source
from intervale.train.recipe import Lora
from intervale.train.state import STATE
from intervale.train.xtuner import import_config, recipe_of
from intervale.train.xtuner_walk import Walk

_LORA = re.compile(r"(?:module\.)?(?:model\.)?(language_model|vision_model)\.base_model\.model\.(.+)\.lora_(A|B)(?:\.\w+)?\.weight")
_WHOLE = re.compile(r"(?:module\.)?(?:model\.)?((?:mlp1|language_model|vision_model)\.(?!base_model\.).+)")
_PROJECTOR = "mlp1."


@dataclass(frozen=True)
class Scale:
    """What the tensors do not say of a LoRA: alpha, and rank-stabilised (alpha / sqrt(rank)) or not; rank where a config says it."""

    alpha: float
    rank: int | None = None
    stabilised: bool = False


@dataclass(frozen=True)
class Summary:
    """What was imported: the base, the step (XTuner's micro-batches), and how much of what."""

    base: Path
    iteration: int
    rank: int
    alpha: float
    lora_layers: int
    trained: int


@dataclass(frozen=True)
class _Read:
    """The file's tensors by what they are: LoRA pairs and whole tensors, by official name."""

    pairs: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, torch.Tensor]


def import_checkpoint(
    file: Path, base: Path | None, dst: Path, *, alpha: float | None, config: Path | None, tell: Callable[[str], None]
) -> Summary:
    """Write `file` as the new checkpoint folder `dst` on the model folder `base` (None: the one its config names).

    `alpha` and `config` (an XTuner config) replace what the file itself carries. Raises: UserError; then `dst` does not exist.
    """
    refuse_existing(dst)
    with disk_errors(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=dst.parent) as inner:
        tell(say(f"reading {file} in a process of its own (tensors only)", f"在独立进程中读取 {file}（仅张量）"))
        pickled = read_pickled(file, Path(inner))
        own = _config(file, config, pickled.facts.get("cfg"))
        source = open_source(_base(file, base, own))
        if checkpoint_of(source.folder) is not None:
            raise UserError(f"{source.folder} is a training run, not a model", "name the model that XTuner's run started from")
        read = _sort(file, load_file(pickled.tensors), source)
        scale = _scale(file, own, alpha, read)
        native = _native(read, source)
        config_ = _lora_config(read, source, scale, native) if read.pairs else None
        iteration = int(pickled.facts.get("iter", 0))
        _write(dst, file, source, native, config_, own, iteration, tell)
    if not any(name.startswith(_PROJECTOR) for name in read.whole):
        tell(say(f"{file} holds no projector (mlp1): the base's is kept", f"{file} 中没有投影层（mlp1）：保留基座的"))
    rank = config_.r if config_ else 0
    return Summary(source.folder, iteration, rank, scale.alpha, len(native[0]) // 2, len(native[1]))


def _config(file: Path, config: Path | None, carried: str | None) -> PyConfig | None:
    """The XTuner config of this checkpoint, as data: the one that is given, else the one the file carries."""
    if config is not None:
        return read_pyconfig(config)
    return parse_pyconfig(carried, f"{file} (its config)") if carried else None


def _base(file: Path, base: Path | None, config: PyConfig | None) -> Path:
    if base is not None:
        return base
    named = Walk(config).text("model", "model_path") if config else None
    if named is None or not Path(named.value).is_dir():
        told = f" (its config names {named.value}, which is not here)" if named else ""
        raise UserError(f"{file}: which model does it stand on?{told}", "name the base model's folder with --base")
    return Path(named.value)


def _sort(file: Path, tensors: Mapping[str, torch.Tensor], source: Source) -> _Read:
    """Every tensor by what it is. Raises: UserError naming what is unknown, misshapen, half of a pair, or not a number."""
    moves = {move.official: move for move in source.moves}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    unknown, wrong = [], []
    for name, tensor in tensors.items():
        lora, plain = _LORA.fullmatch(name), _WHOLE.fullmatch(name)
        official = f"{lora[1]}.{lora[2]}.weight" if lora else plain[1] if plain else ""
        if official not in moves:
            unknown.append(name)
            continue
        expected = layout.official_shape(moves[official], source.shapes)
        if lora:
            pairs.setdefault(official, {})[lora[3]] = tensor.float()
            fits = tensor.dim() == 2 == len(expected) and tensor.shape[lora[3] == "A"] == expected[lora[3] == "A"]
        else:
            whole[official] = tensor.float()
            fits = tuple(tensor.shape) == expected
        if not fits:
            wrong.append(f"{name} {list(tensor.shape)} on {list(expected)}")
        elif not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: {name} holds NaN or infinity", "this run had diverged; import an earlier checkpoint of it")
    halves = [name for name, pair in pairs.items() if len(pair) < 2]
    projector = {name for name in moves if name.startswith(_PROJECTOR)}
    if whole.keys() & projector and not projector <= whole.keys():
        halves += sorted(projector - whole.keys())
    for kind, names in (
        ("that this base model has no place for", unknown),
        ("of another shape than the base's", wrong),
        ("incomplete", halves),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"{file}: {len(names)} tensors {kind}: {', '.join(names[:5])}{more}",
                "name the model it was trained from with --base; only LoRA, the projector and whole weights of XTuner's InternVL can be imported",
            )
    return _Read(pairs, whole)


def _scale(file: Path, config: PyConfig | None, alpha: float | None, read: _Read) -> Scale:
    if not read.pairs:
        return Scale(alpha or 1.0)
    found: list[Scale] = []
    for part, name in (("language_model.", "llm_lora"), ("vision_model.", "visual_encoder_lora")):
        if not any(official.startswith(part) for official in read.pairs):
            continue
        walk = Walk(config) if config else None
        stated, rank = (walk.number("model", name, "lora_alpha"), walk.number("model", name, "r", whole=True)) if walk else (None, None)
        stabilised = walk.get("model", name, "use_rslora") if walk else None
        if alpha is None and stated is None:
            raise UserError(
                f"{file}: the tensors do not say how strongly LoRA counts (lora_alpha), and no config does",
                "name the XTuner config with --config, or the number with --alpha (the tutorial's is 256)",
            )
        chosen = alpha if alpha is not None else float(stated.value if stated else 0)
        if chosen <= 0:
            raise UserError(f"{file}: lora_alpha is {chosen:g}, which switches LoRA off", "give the number it was trained with (--alpha)")
        found.append(Scale(chosen, rank.value if rank else None, bool(stabilised and stabilised.value)))
    if any(scale != found[0] for scale in found):
        raise UserError(
            f"{file}: the language model's and the vision tower's LoRA have other numbers", "importing both at once is not supported"
        )
    return found[0]


def _native(read: _Read, source: Source) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(LoRA tensors by PEFT's names, whole tensors by native names)."""
    heads = families.heads_of(source.config)
    adapter: dict[str, torch.Tensor] = {}
    trained: dict[str, torch.Tensor] = {}
    for move in source.moves:
        if move.official in read.whole:
            trained |= layout.split(move, read.whole[move.official], heads)
        if move.official in read.pairs:
            pair = read.pairs[move.official]
            for name, rows in layout.split(move, pair["B"], heads).items():
                layer = f"base_model.model.{name.removesuffix('.weight')}"
                adapter[f"{layer}.lora_A.weight"] = pair["A"].clone()
                adapter[f"{layer}.lora_B.weight"] = rows
    if source.tied and {layout.HEAD, layout.EMBEDDING} & (trained.keys() | {f"{n[17:-14]}.weight" for n in adapter}):
        raise UserError(f"{source.folder}: its output layer is its embedding (tied), which the checkpoint trains", "name another --base")
    return adapter, trained


def _lora_config(read: _Read, source: Source, scale: Scale, native: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> LoraConfig:
    ranks = {pair["A"].shape[0] for pair in read.pairs.values()} | {pair["B"].shape[1] for pair in read.pairs.values()}
    if len(ranks) != 1 or (scale.rank is not None and ranks != {scale.rank}):
        raise UserError(
            f"{source.folder}: LoRA of rank {sorted(ranks)} in the checkpoint, {scale.rank or 'one rank'} in its config",
            "name the config that this checkpoint was trained with (--config)",
        )
    modules = sorted({name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in native[0]})
    every = [name.removesuffix(".weight") for name in source.shapes if name.endswith(".weight")]
    targets: str | list[str] = modules
    for named in ("llm", "llm+head", "llm+vision", "llm+head+vision"):
        pattern = lora_pattern(named, source.config.text_config.model_type)
        if [name for name in sorted(every) if re.fullmatch(pattern, name)] == modules:
            targets = pattern
    return LoraConfig(
        r=ranks.pop(),
        lora_alpha=int(scale.alpha) if scale.alpha == int(scale.alpha) else scale.alpha,  # a fraction is fine: PEFT divides it by the rank
        lora_dropout=Lora().dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_rslora=scale.stabilised,
        base_model_name_or_path=str(source.folder.resolve()),
        inference_mode=True,
    )


def _write(
    dst: Path,
    file: Path,
    source: Source,
    native: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    lora: LoraConfig | None,
    config: PyConfig | None,
    iteration: int,
    tell: Callable[[str], None],
) -> None:
    adapter, trained = native
    folder = source.folder.resolve()
    base = {"name": str(source.folder), "folder": str(folder), "fingerprint": fingerprint(folder)}
    identity = {"base": base, "recipe": _recipe(config, tell), "data": None, "imported": {"from": str(file), "iter": iteration}}
    need_space(dst, sum(tensor.nbytes for part in native for tensor in part.values()))
    with staged_folder(dst) as aside:
        if lora is not None:
            save_file(adapter, aside / ADAPTER, metadata={"format": "pt"})
            lora.save_pretrained(str(aside))
        if trained:
            save_file(trained, aside / TRAINED, metadata={"format": "pt"})
        write_json(aside / BASE, base)
        write_json(aside / STATE, {"step": iteration, "samples": 0, "tokens": 0, "seconds": 0.0, "identity": identity})
        write_manifest(aside, iteration)


def _recipe(config: PyConfig | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """What is known of how it was trained, for the export's provenance; at least the keys that other commands read."""
    if config is not None:
        try:
            return recipe_of(import_config(config, Path("data"))).model_dump()
        except UserError as error:
            tell(say(f"its config is not recorded: {error.what}", f"未记录其配置：{error.what}"))
    return {"data": {"min_tiles": None, "max_tiles": None}}
