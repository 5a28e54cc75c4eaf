"""The files beside the weights: what transformers, LMDeploy and vLLM need of an hf folder, and an official folder's own.

An hf folder made from an official one keeps the official side files (config.json, tokenizer, code: as data, never run) in
`official_source/`, so that the way back gives the same folder again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from intervale.core.files import read_json
from intervale.data.prompt import has_bos, jinja, stop_ids, template_named
from intervale.data.tiling import IMAGENET_MEAN, IMAGENET_STD
from intervale.model import families
from intervale.model.source import OFFICIAL_SIDE, Source
from intervale.model.tokenizer import Tokenizer, load_tokenizer, with_bos

LAYOUT = ".intervale-layout.json"
PROVENANCE = "intervale.json"  # what `export` says of a folder; it stays with the weights, at the top
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".index.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_DOCUMENTS = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt")
_BICUBIC = 3  # PIL's number, as transformers stores it


def _copy_files(src: Path, dst: Path, *, leave: tuple[str, ...] = ()) -> None:
    """Copy what is not weights: files and folders, byte for byte (links of a hub cache are followed)."""
    for path in sorted(src.iterdir()):
        if path.name in leave or path.name == ".git" or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, dst / path.name, ignore=shutil.ignore_patterns(*(f"*{ending}" for ending in _WEIGHTS)))
        elif path.is_file():
            shutil.copyfile(path, dst / path.name)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _main_dtype(source: Source, dtype: torch.dtype | None) -> str:
    sizes: dict[torch.dtype, int] = {}
    for info in source.checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return str(dtype or max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.")


def write_hf_side(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """Config, generation, processor, tokenizer and chat template of an hf folder."""
    if source.kind == "hf":
        _copy_files(source.folder, folder)
        _set_dtype(folder / "config.json", dtype, "dtype")
        return
    config = source.config.to_dict()
    config["dtype"] = _main_dtype(source, dtype)
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", preprocessor(config))
    _write(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": config["image_seq_length"]})
    kept = folder / OFFICIAL_SIDE
    kept.mkdir()
    _copy_files(source.folder, kept, leave=(PROVENANCE,))
    _write(kept / LAYOUT, {"shards": {name: info.file for name, info in sorted(source.checkpoint.tensors.items())}})
    for name in (*_DOCUMENTS, PROVENANCE):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    tokenizer = load_tokenizer(source.folder)
    if tokenizer is None:
        text = source.config.text_config
        _write(folder / "generation_config.json", {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id})
        return
    _write_tokenizer(source, tokenizer, folder)


def preprocessor(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' GotOcr2 image processor, set to the official pixels (its own defaults are not InternVL's)."""
    edge = config["force_image_size"]
    dynamic = config["dynamic_image_size"]
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": dynamic,
        "min_patches": config["min_dynamic_patch"] if dynamic else 1,
        "max_patches": config["max_dynamic_patch"] if dynamic else 1,
        "use_thumbnail": config["use_thumbnail"],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": edge, "width": edge},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _write_tokenizer(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    template = template_named(source.config.template, str(source.folder / "config.json"))
    own = source.folder / "tokenizer.json"
    if own.is_file() and not tokenizer.add_bos:
        shutil.copyfile(own, folder / "tokenizer.json")
    else:
        (with_bos(tokenizer.backend) if tokenizer.add_bos else tokenizer.backend).save(str(folder / "tokenizer.json"))
    bos = has_bos(template, tokenizer)
    ends = stop_ids(template, tokenizer, tokenizer.eos)
    chat = jinja(template, bos)
    end = tokenizer.backend.id_to_token(tokenizer.eos[0]) if tokenizer.eos else template.end
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if tokenizer.backend.token_to_id("<s>") is not None else None,
        "eos_token": end,
        "pad_token": end,
        "unk_token": "<unk>" if tokenizer.backend.token_to_id("<unk>") is not None else None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.text_config.max_position_embeddings,
        "padding_side": "left",
        "processor_class": "InternVLProcessor",
        "chat_template": chat,
        # InternVLProcessor reads these names. The family has no video token; naming the picture's keeps a new id from being added.
        "extra_special_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<IMG_CONTEXT>",
        },
    }
    _write(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")
    generation: dict[str, Any] = {"eos_token_id": list(ends), "pad_token_id": tokenizer.eos[0] if tokenizer.eos else ends[0]}
    if bos:
        generation["bos_token_id"] = tokenizer.control(template.bos or "<s>")
    _write(folder / "generation_config.json", generation)


def _set_dtype(path: Path, dtype: torch.dtype | None, key: str) -> None:
    if dtype is not None:
        config = read_json(path)
        config[key] = str(dtype).removeprefix("torch.")
        _write(path, config)


def write_official_side(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json and side files of an official folder: its source's own, else made from the native configuration."""
    kept = source.folder if source.kind == "official" else source.folder / OFFICIAL_SIDE
    if kept.is_dir():
        _copy_files(kept, folder, leave=(LAYOUT, PROVENANCE) if source.kind == "hf" else ())
        if source.kind == "hf" and (source.folder / PROVENANCE).is_file():
            shutil.copyfile(source.folder / PROVENANCE, folder / PROVENANCE)
        _set_dtype(folder / "config.json", dtype, "torch_dtype")
        return
    for name in (*_TOKENIZER_FILES, *_DOCUMENTS, PROVENANCE):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    _write(folder / "config.json", families.official_config(source.config, source.arch, _main_dtype(source, dtype)))


def set_tiles(folder: Path, least: int, most: int) -> None:
    """Write the tiles a model was tuned with into every file that says how pictures are cut."""
    names = {"config.json": "_dynamic_patch", f"{OFFICIAL_SIDE}/config.json": "_dynamic_patch", "preprocessor_config.json": "_patches"}
    for name, ending in names.items():
        path = folder / name
        if path.is_file():
            config = read_json(path)
            config |= {f"min{ending}": least, f"max{ending}": most}
            _write(path, config)
