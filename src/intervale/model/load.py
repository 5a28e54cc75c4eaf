"""Model folders and hub ids to a network, and everything one needs to talk to it.

Promises: official and hf folders load into transformers' InternVLForConditionalGeneration with no remote code; the weights
are checked by name and shape first; the tiling and the prompt are the checkpoint's own. Cost: one read of the weight files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLForConditionalGeneration

from intervale.core.embedded import embedded
from intervale.core.errors import OutsideError, UserError, nearest
from intervale.core.files import read_json
from intervale.data.prompt import Template, stop_ids, template_named
from intervale.data.tiling import Tiling
from intervale.model import families, layout
from intervale.model.adapt import adapted_network, base_folder, trained_tiles
from intervale.model.source import NO_IMAGE_TOKEN, Source, build_network, folder_kind, open_source
from intervale.model.tokenizer import Tokenizer, load_tokenizer

MOST_TILES = 128  # 32,768 tokens a picture: no model's context holds more
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "*.py"]


@dataclass(frozen=True)
class TextSide:
    """What a prompt needs, without weights."""

    tokenizer: Tokenizer
    template: Template
    tiling: Tiling


@dataclass(frozen=True)
class Model:
    """A network with its tokenizer, template and tiling. `name` is what the user called it, `folder` where it lies."""

    network: InternVLForConditionalGeneration
    tokenizer: Tokenizer
    template: Template
    tiling: Tiling
    name: str
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return stop_ids(self.template, self.tokenizer, self.tokenizer.eos)


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """A torch type by its name. Raises: UserError for an unknown one."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPE_NAMES:
        raise UserError(f"unknown precision {name!r}{nearest(name, DTYPE_NAMES)}", f"use one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def default_device() -> str:
    """'cuda' when there is one, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_device(name: str | torch.device | None) -> torch.device:
    """A device by its name; None is INTERVALE_DEVICE, else the default. Raises: UserError for one that is not here."""
    name = name or os.environ.get("INTERVALE_DEVICE") or default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}", "use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"there is no {name} here", "leave --device out, or use cpu; `intervale doctor` shows what torch sees")
    return device


def resolve_model(name: str | Path) -> Path:
    """The folder of MODEL: a path, the embedded `nano`, or a hub id, which is downloaded (HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN hold).

    Raises: UserError when there is no such folder; OutsideError when the hub cannot serve it.
    """
    path = Path(name).expanduser()
    text = str(name)
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # a NUL in it, or too long: no path, and no hub id either
        text = ""
    if own := embedded(text):
        return own
    if not _HUB_ID.fullmatch(text) or text.startswith((".", "/")):
        raise UserError(f"{name}: no such folder", "give the path of a model folder, or a hub id such as OpenGVLab/InternVL2-2B")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=_HUB_FILES))
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise OutsideError(
            f"{text}: neither a folder here nor to be had from the hub{offline}: {str(error).strip().splitlines()[0].removeprefix('Got: ')[:200]}",
            "check the name and the network; a mirror goes into HF_ENDPOINT, a token for gated models into HF_TOKEN",
        ) from error


def load_network(
    folder: str | Path, *, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu", image_token_id: int | None = None
) -> InternVLForConditionalGeneration:
    """The network of an official or hf folder, from config.json and the weights alone.

    `dtype` None keeps the stored types. `image_token_id` is looked up in the tokenizer when there is one.
    Raises: UserError when anything does not fit; nothing is initialised at random, ever.
    """
    return network_from(open_source(Path(folder), image_token_id), dtype=dtype, device=device)


def network_from(source: Source, *, dtype: torch.dtype | str | None, device: str | torch.device) -> InternVLForConditionalGeneration:
    """The network of an opened source, in eval mode and without gradients."""
    wanted = None if dtype is None else as_dtype(dtype)
    network = build_network(source.config)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in source.natives():
        cast = wanted if tensor.is_floating_point() else None
        moved = tensor.to(device)  # a GPU casts what it has faster than the CPU what it sends
        state[name] = moved.to(cast or tensor.dtype, copy=moved is tensor)
    if source.tied:
        head = state.setdefault(layout.HEAD, state[layout.EMBEDDING])
        if head is not state[layout.EMBEDDING] and not torch.equal(head, state[layout.EMBEDDING]):
            raise UserError(
                f"{source.folder}: tie_word_embeddings is set, but the stored output layer is not the embedding",
                "set llm_config.tie_word_embeddings to false in config.json if the model was trained with both",
            )
    network.load_state_dict(state, strict=True, assign=True)
    if source.tied:
        network.tie_weights()
    network.to(device)  # the buffers
    return network.requires_grad_(False).eval()


def _tiling(folder: Path, raw: dict[str, Any], kind: str) -> Tiling:
    if kind == "hf" and "force_image_size" not in raw:  # a native folder by others: its processor's settings
        side = folder / "preprocessor_config.json"
        processor = read_json(side) if side.is_file() else {}
        size = raw["vision_config"].get("image_size", 448)
        return Tiling(
            tile_size=size[0] if isinstance(size, list) else size,
            min_tiles=processor.get("min_patches", 1),
            max_tiles=processor.get("max_patches", 12),
            tokens_per_tile=raw.get("image_seq_length", 256),
        )
    keys = raw if kind == "hf" else families.tiling_keys(raw)
    dynamic = keys["dynamic_image_size"]
    return Tiling(
        tile_size=keys["force_image_size"],
        min_tiles=keys["min_dynamic_patch"] if dynamic else 1,
        max_tiles=keys["max_dynamic_patch"] if dynamic else 1,
        thumbnail=keys["use_thumbnail"],
        tokens_per_tile=raw["image_seq_length"] if kind == "hf" else families.tokens_per_tile(raw),
    )


def text_side(folder: Path) -> TextSide:
    """Tokenizer, template and tiling of an official or hf folder. Raises: UserError when one is missing or unusable."""
    where = str(folder / "config.json")
    try:
        side = _text_side(folder, where)
        numbers = (side.tiling.tile_size, side.tiling.min_tiles, side.tiling.max_tiles, side.tiling.tokens_per_tile)
        if any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
            raise ValueError("the tile size, tile counts and tokens a tile must be positive whole numbers")
        return replace(side, tiling=narrow(side.tiling, None, None))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: {what}", "take config.json from the model's source") from error


def _text_side(folder: Path, where: str) -> TextSide:
    kind = folder_kind(folder)
    raw = read_json(folder / "config.json")
    if kind == "official":
        families.refuse_unsupported(raw, where)
        name = raw.get("template") or families.backbone_of(raw, where)[1].template
    else:
        # A native folder by others names no template; all such folders published are InternVL 2.5, 3 and 3.5.
        name = raw.get("template") or "internvl2_5"
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(
            f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)", "copy the tokenizer files into it"
        )
    return TextSide(tokenizer, template_named(name, where), _tiling(folder, raw, kind))


def load_text_side(name: str | Path) -> TextSide:
    """`text_side` of MODEL (a folder, a run, or a hub id)."""
    folder = resolve_model(name)
    side = text_side(base_folder(folder))
    return replace(side, tiling=narrow(side.tiling, *trained_tiles(folder)))


def load_model(
    folder_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    max_tiles: int | None = None,
) -> Model:
    """Network, tokenizer, template and tiling of MODEL: an official or hf folder, a training run, or a hub id.

    Defaults: CUDA and bfloat16 when there is a GPU, else CPU and float32. `max_tiles` lowers the tiles a picture.
    """
    folder = resolve_model(folder_or_id)
    device = as_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    base = base_folder(folder)
    side = text_side(base)
    network = load_network(base, dtype=dtype, device=device)
    if network.config.image_token_id == NO_IMAGE_TOKEN:
        network.config.image_token_id = side.tokenizer.control("<IMG_CONTEXT>")
    vocabulary = network.config.text_config.vocab_size
    if side.tokenizer.control("<IMG_CONTEXT>") >= vocabulary:
        raise UserError(
            f"{base}: the tokenizer's <IMG_CONTEXT> has the id {side.tokenizer.control('<IMG_CONTEXT>')}, the network knows {vocabulary} tokens",
            "the tokenizer files belong to another model; take them from this model's source",
        )
    if base != folder:
        network = adapted_network(network, folder)
    least, most = trained_tiles(folder)
    tiling = narrow(narrow(side.tiling, least, most), None, max_tiles)
    return Model(network, side.tokenizer, side.template, tiling, str(folder_or_id), folder)


def narrow(tiling: Tiling, least: int | None, most: int | None) -> Tiling:
    """The tiling with other limits; None keeps one, and the least never exceeds the most unless both were given so."""
    most = tiling.max_tiles if most is None else most
    least = min(tiling.min_tiles, most) if least is None else least
    if most > MOST_TILES:
        raise UserError(f"{most} tiles a picture are more than the limit of {MOST_TILES}", "InternVL models use 6 to 40")
    if not 1 <= least <= most:
        raise UserError(
            f"at least {least} and at most {most} tiles a picture cannot both hold", "give at least 1, and a minimum below the maximum"
        )
    return replace(tiling, min_tiles=least, max_tiles=most)
