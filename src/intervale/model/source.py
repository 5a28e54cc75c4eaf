"""A model folder as native tensors, whichever format it is in. Opening one checks every name and shape before reading any.

Formats: `official` (InternVLChatModel, as OpenGVLab publishes) and `hf` (transformers' InternVLForConditionalGeneration).
No code from the folder is imported and no Auto* class looks at it. Cost of opening: headers and a module on the meta device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import InternVLConfig, InternVLForConditionalGeneration

from intervale.core.errors import UserError
from intervale.core.files import read_json
from intervale.model import families, layout
from intervale.model.checkpoint import Checkpoint, open_checkpoint, weight_files
from intervale.model.tokenizer import load_tokenizer

OFFICIAL_SIDE = "official_source"  # inside an hf folder: config.json, code and tokenizer files of the official one it came from
_OFFICIAL_HEADS = {"language_model.output.weight", "language_model.lm_head.weight"}
_END = 1 << 20  # bytes
NO_IMAGE_TOKEN = -1  # the id could not be looked up; the network works, but nobody can place a picture by id


@dataclass(frozen=True)
class Source:
    """An opened model folder. `config` is the native one; `official` the official one when it is known."""

    folder: Path
    kind: str  # official | hf
    config: InternVLConfig
    official: dict[str, Any] | None
    arch: str  # the official text architecture
    checkpoint: Checkpoint
    moves: tuple[layout.Move, ...]
    shapes: dict[str, tuple[int, ...]]  # native name -> shape

    @property
    def tied(self) -> bool:
        """Is lm_head the embedding?"""
        return bool(self.config.tie_word_embeddings)

    def dtype_of(self, native: str) -> torch.dtype:
        """The stored type of a native tensor."""
        tensors = self.checkpoint.tensors
        if self.kind == "hf":
            stored = {layout.from_disk(name): info for name, info in tensors.items()}
        else:
            stored = {part: tensors[move.official] for move in self.moves if move.official in tensors for part in move.natives}
        return stored[native if native in stored else layout.EMBEDDING].dtype

    def natives(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stored native tensor once, file by file; a tied lm_head may be absent."""
        heads = families.heads_of(self.config)
        with self.checkpoint.reader() as read:
            if self.kind == "hf":
                for name in self.checkpoint.tensors:
                    yield layout.from_disk(name), read(name)
                return
            for move in sorted(self.moves, key=lambda m: self._file(m)):
                if move.official in self.checkpoint.tensors:
                    yield from layout.split(move, read(move.official), heads).items()

    def _file(self, move: layout.Move) -> str:
        info = self.checkpoint.tensors.get(move.official)
        return info.file if info else ""


def folder_kind(folder: Path) -> str:
    """'official' or 'hf', from config.json. Raises: UserError for anything else."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", "give the path of a model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it", "point at a complete model folder")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a JSON object", "take config.json from the model's source")
    if "llm_config" in config or config.get("model_type") == "internvl_chat":
        return "official"
    if config.get("model_type") == "internvl":
        return "hf"
    found = config.get("model_type") or config.get("architectures")
    raise UserError(
        f"{folder}: not an InternVL model (config.json says {found})",
        "use a folder of the InternVL family, in the official or the hf format",
    )


def build_network(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """The module with its parameters on the meta device (no memory) and its buffers real."""
    with init_empty_weights(include_buffers=False):
        return InternVLForConditionalGeneration(config).eval()


def image_token(folder: Path) -> int | None:
    """The id of <IMG_CONTEXT> by the folder's tokenizer, or None when it has none. config.json is never asked."""
    tokenizer = load_tokenizer(folder)
    return None if tokenizer is None else tokenizer.control("<IMG_CONTEXT>")


def _native_config(folder: Path, raw: dict[str, Any], where: str) -> InternVLConfig:
    for key in ("text_config", "vision_config"):
        if not isinstance(raw.get(key), dict):
            raise UserError(f"{where}: no {key}", "take config.json from the model's source")
    families.native_backbone(raw, where)
    clean = {key: value for key, value in raw.items() if key not in ("auto_map", "quantization_config")}
    return InternVLConfig.from_dict(clean)


def _refuse_types(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if not info.dtype.is_floating_point:
            raise UserError(
                f"{checkpoint.folder}: {name} is {info.dtype}: quantised weights cannot be loaded",
                "use the model's bfloat16 or float32 weights",
            )


def _refuse_layer(config: InternVLConfig, where: str) -> None:
    layers, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise UserError(f"{where}: select_layer {layer} of a tower with {layers} layers", "take config.json from the model's source")


def open_source(folder: Path, image_token_id: int | None = None) -> Source:
    """Open a model folder and hold every tensor against config.json.

    Raises: UserError naming missing, unknown and misshapen tensors, or a setting that is not supported.
    """
    kind = folder_kind(folder)
    where = str(folder / "config.json")
    raw = read_json(folder / "config.json")
    official: dict[str, Any] | None = None
    try:
        if kind == "official":
            official = raw
            token = image_token_id if image_token_id is not None else image_token(folder)
            config = families.native_config(raw, NO_IMAGE_TOKEN if token is None else token, where)
            arch, _ = families.backbone_of(raw, where)
        else:
            side = folder / OFFICIAL_SIDE / "config.json"
            official = read_json(side) if side.is_file() else None
            arch = families.backbone_of(official, str(side))[0] if official else families.native_backbone(raw, where)
            config = _native_config(folder, raw, where)
            if image_token_id is not None:
                config.image_token_id = image_token_id
        checkpoint = open_checkpoint(folder)
        _refuse_types(checkpoint)
        _refuse_layer(config, where)
        if official is not None and not checkpoint.tensors.keys().isdisjoint(_OFFICIAL_HEADS):
            # The official code never ties: a stored output layer is used, whatever the flag says.
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        network = build_network(config)
    except UserError:
        raise
    except Exception as error:  # transformers validates values with exceptions of many kinds
        raise UserError(
            f"{where}: {str(error).strip().splitlines()[-1][:300]}", "correct this value; take config.json from the model's source"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    moves = tuple(layout.plan_moves(shapes, families.BACKBONES[arch].style))
    optional = set()
    if config.tie_word_embeddings:
        optional = {move.official for move in moves if move.natives == (layout.HEAD,)} | {layout.HEAD}
    if kind == "official":
        expected = {move.official: layout.official_shape(move, shapes) for move in moves}
        found = checkpoint.shapes()
    else:
        expected, found = shapes, {layout.from_disk(name): shape for name, shape in checkpoint.shapes().items()}
    layout.compare_names(str(folder), found, expected, optional)
    return Source(folder, kind, config, official, arch, checkpoint, moves, shapes)


def fingerprint(folder: Path) -> str:
    """16 hex digits that name a model's weights: config, file sizes, and the ends of every weight file.

    Reads at most 2 MiB a file, so it costs milliseconds; it tells apart models, it does not detect a flipped bit.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in weight_files(folder):
        add_ends(folder / name, digest)
    return digest.hexdigest()[:16]


def add_ends(path: Path, digest: Any) -> None:
    """Feed a file's name, size, and first and last MiB to a hashlib digest."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(_END))
        file.seek(max(size - _END, 0))
        digest.update(file.read(_END))
