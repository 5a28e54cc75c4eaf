"""`intervale info PATH`: what a folder is, whatever part of the journey made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from intervale.cli.output import emit_json, result
from intervale.core.errors import UserError
from intervale.core.files import read_json, read_object


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, run, checkpoint, data set or evaluation folder, or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a folder holds: format, family, backbone, template, tokens a tile, parameters, files."""
    path = Path(model).expanduser()
    value = describe(path) if path.exists() else describe_model(model)
    if as_json:
        emit_json(value)
        return
    for key, entry in value.items():
        result(f"{key:>16}  {_line(entry)}")


def _line(entry: Any) -> str:
    if isinstance(entry, dict):
        return ", ".join(f"{key} {_line(value)}" for key, value in entry.items())
    if isinstance(entry, list):
        return ", ".join(_line(value) for value in entry)
    return f"{entry:,}" if isinstance(entry, int) and not isinstance(entry, bool) else str(entry)


def describe(path: Path) -> dict[str, Any]:
    """What `path` is, as plain values. Raises: UserError when it is nothing of ours."""
    if path.is_file() and path.suffix == ".jsonl":
        return _data_file(path)
    if (path / "run.json").is_file():
        return _run(path)
    if (path / "base.json").is_file():
        return {"kind": "checkpoint", **read_object(path / "base.json", "folder"), "files": _files(path)}
    if (path / "summary.json").is_file():
        summary = read_json(path / "summary.json")
        keys = ("accuracy", "n", "correct", "interval", "prompt", "mode", "protocol", "scored_on_training_items")
        return {"kind": "evaluation", **{key: summary[key] for key in keys if key in summary}, "files": _files(path)}
    if (path / "report.json").is_file():
        return {"kind": "comparison", "files": _files(path)}
    if (path / "predictions.jsonl").is_file():
        return {"kind": "evaluation, not finished", "files": _files(path)}
    if (path / "config.json").is_file():
        return describe_model(str(path))
    sets = [file for file in (path / "train.jsonl", path / "eval.jsonl") if file.is_file()]
    if sets:
        return {"kind": "data set", **{file.name: _data_file(file) for file in sets}, "files": _files(path)}
    raise UserError(f"{path}: neither a model, a run, a data set nor an evaluation", "give a folder that intervale made, or a model folder")


def _files(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}


def _data_file(path: Path) -> dict[str, Any]:
    from intervale.core.records import data_digest, read_records

    records = read_records(path)
    return {
        "kind": "data",
        "items": len(records),
        "pictures": len({image for record in records for image in record.images}),
        "with_choices": sum(1 for record in records if record.choices),
        "digest": data_digest(records),
    }


def _run(path: Path) -> dict[str, Any]:
    from intervale.core.runlog import read_metrics
    from intervale.model.adapt import newest_checkpoint

    run = read_object(path / "run.json", "status", "base", "train")
    last: dict[str, Any] = next((entry for entry in reversed(read_metrics(path)) if "loss" in entry), {})
    newest = newest_checkpoint(path)
    return {
        "kind": "training run",
        "status": run["status"],
        "base": run["base"]["name"],
        "data": run["train"],
        "step": last.get("step", 0),
        "loss": last.get("loss"),
        "checkpoint": newest.name if newest else None,
        "files": _files(path),
    }


def describe_model(name: str) -> dict[str, Any]:
    """A model folder's (or hub id's) facts, from config.json and headers."""
    import math

    from intervale.model.load import resolve_model, text_side
    from intervale.model.source import open_source

    folder = resolve_model(name)
    source = open_source(folder)
    counted = {part: shape for part, shape in source.shapes.items() if not (source.tied and part == "lm_head.weight")}
    value: dict[str, Any] = {
        "kind": "model",
        "format": source.kind,
        "backbone": source.arch,
        "native": source.config.text_config.architectures[0] if source.config.text_config.architectures else None,
        "template": source.config.template if hasattr(source.config, "template") else None,
        "parameters": sum(math.prod(shape) for shape in counted.values()),
        "types": sorted({str(entry.dtype).removeprefix("torch.") for entry in source.checkpoint.tensors.values()}),
        "context": source.config.text_config.max_position_embeddings,
        "vocabulary": source.config.text_config.vocab_size,
        "tile_size": getattr(source.config, "force_image_size", source.config.vision_config.image_size[0]),
        "tokens_per_tile": source.config.image_seq_length,
    }
    try:
        side = text_side(folder)
        value |= {
            "template": side.template.name,
            "tokenizer": side.tokenizer.size,
            "image_token_id": side.tokenizer.control("<IMG_CONTEXT>"),
        }
        value |= {"tiles": {"least": side.tiling.min_tiles, "most": side.tiling.max_tiles, "thumbnail": side.tiling.thumbnail}}
    except UserError as error:
        value["tokenizer"] = f"none ({error.what})"
    value["files"] = _files(folder)
    return value
