"""Write a model folder in the official or the hf format: `convert`, and the last step of `export`.

Promises: total and strict (an unknown or missing tensor stops it and nothing is written), official -> hf -> official gives
every tensor back byte for byte under its name, type and file, and the target folder is complete or absent.
Peak memory: the largest weight file of the source.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from intervale.core.errors import UserError
from intervale.core.files import need_space, read_json, staged_folder
from intervale.model import families, layout
from intervale.model.checkpoint import write_index
from intervale.model.hf_files import LAYOUT, set_tiles, write_hf_side, write_official_side
from intervale.model.source import NO_IMAGE_TOKEN, OFFICIAL_SIDE, Source, open_source


def convert(
    src: Path,
    dst: Path,
    to: str,
    *,
    image_token_id: int | None = None,
    overrides: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, str] | None = None,
    tiles: tuple[int, int] | None = None,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write the model of `src` into the new folder `dst` as 'hf' or 'official'.

    `overrides` replaces native tensors (what training changed); they take the stored type of what they replace. `dtype` casts
    every floating tensor. `notes` are extra files (name -> text); `tiles` (least, most) goes into the tiling settings.
    `verify` sees the finished folder before it gets its name. Raises: UserError; then `dst` does not exist.
    """
    source = open_source(src, image_token_id)
    if to == "hf" and source.config.image_token_id == NO_IMAGE_TOKEN:
        raise UserError(f"{src}: no tokenizer files, so the id of <IMG_CONTEXT> cannot be looked up", "give it with --image-token-id N")
    changed = overrides or {}
    unknown = sorted(set(changed) - set(source.shapes))
    assert not unknown, f"overrides for tensors the model lacks: {unknown[:3]}"
    need_space(dst, source.checkpoint.nbytes())
    with staged_folder(dst) as folder:
        _write_weights(source, folder, to, changed, dtype)
        if to == "hf":
            write_hf_side(source, folder, dtype)
        else:
            write_official_side(source, folder, dtype)
        if tiles is not None:
            set_tiles(folder, *tiles)
        for name, text in (notes or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        open_source(folder, None if to == "hf" else image_token_id)  # what was written is read as strictly as any source
        if verify is not None:
            verify(folder)


def _placed(path: Path) -> dict[str, str]:
    """{official name: file} as an hf folder kept it. A file name from a folder is data: it may not lead out of the target."""
    raw = read_json(path)
    shards = raw.get("shards") if isinstance(raw, dict) else None
    if not isinstance(shards, dict):
        raise UserError(f"{path}: damaged", "take the folder from its source")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path}: {name!r} is not the name of a weight file", "take the folder from its source; this one was tampered with"
            )
    return dict(shards)


def _targets(source: Source, to: str) -> dict[str, list[tuple[str, layout.Move | None, str]]]:
    """{file: [(target name, the Move to join or None, the native name)]} in the order of writing."""
    tensors = source.checkpoint.tensors
    disk = {layout.from_disk(name): info.file for name, info in tensors.items()} if source.kind == "hf" else {}
    known = source.folder / OFFICIAL_SIDE / LAYOUT
    placed = _placed(known) if source.kind == "hf" and known.is_file() else {}
    files: dict[str, list[tuple[str, layout.Move | None, str]]] = defaultdict(list)
    for move in source.moves:
        head = move.natives == (layout.HEAD,)
        if source.kind == "official":
            if move.official not in tensors:
                continue  # a tied output layer that is not stored
            file = tensors[move.official].file
        elif placed:
            if move.official not in placed:
                continue
            file = placed[move.official]
        else:
            if head and source.tied and layout.HEAD not in disk:
                continue
            file = disk[move.natives[0]]
        if to == "official":
            files[file].append((move.official, move, move.natives[0]))
        elif not (head and source.tied):
            for native in move.natives:
                files[disk.get(native, file)].append((layout.to_disk(native), None, native))
    return files


def _write_weights(source: Source, folder: Path, to: str, changed: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    read_native = _native_reader(source, changed, dtype)
    heads = families.heads_of(source.config)
    index: dict[str, str] = {}
    total = 0
    with source.checkpoint.reader() as read:
        for file, entries in sorted(_targets(source, to).items()):
            tensors: dict[str, torch.Tensor] = {}
            for name, move, native in entries:
                natives = (native,) if move is None else move.natives
                parts = [read_native(read, part) for part in natives]
                tensors[name] = (layout.join(move, parts, heads) if move else parts[0]).contiguous()
                total += tensors[name].nbytes
                index[name] = file
            save_file(tensors, folder / file, metadata={"format": "pt"})
    write_index(folder, index, total)


def _native_reader(
    source: Source, changed: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> Callable[[Callable[[str], torch.Tensor], str], torch.Tensor]:
    """A function (read, native name) -> tensor; the last fused tensor is kept, because its three parts are asked in turn."""
    heads = families.heads_of(source.config)
    owner = {native: move for move in source.moves for native in move.natives}
    disk = {layout.from_disk(name): name for name in source.checkpoint.tensors}
    kept: dict[str, dict[str, torch.Tensor]] = {}

    def stored(read: Callable[[str], torch.Tensor], native: str) -> torch.Tensor:
        if source.kind == "hf":
            # A tied output layer is the embedding; a copy, because one file may not hold the same memory twice.
            return read(disk[native]) if native in disk else read(disk[layout.EMBEDDING]).clone()
        move = owner[native]
        if move.official not in kept:
            kept.clear()
            kept[move.official] = layout.split(move, read(move.official), heads)
        return kept[move.official][native]

    def get(read: Callable[[str], torch.Tensor], native: str) -> torch.Tensor:
        tensor = stored(read, native)
        if native in changed:
            new = changed[native]
            assert new.shape == tensor.shape, f"{native}: {tuple(new.shape)} is not {tuple(tensor.shape)}"
            tensor = new.to("cpu", tensor.dtype)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return get
