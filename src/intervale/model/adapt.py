"""What training changes: LoRA layers and trained tensors, in a network and in a checkpoint folder.

A checkpoint folder holds `adapter_config.json` + `adapter_model.safetensors` (PEFT's own format, when LoRA was used),
`trained.safetensors` (other tensors that were trained, under native names) and `base.json` (the model it stands on).
Merging happens in float32. LoRA never reaches a part it was not asked for: name lists such as ["q_proj"] would also hit the
vision tower, so whole paths are matched.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from intervale.core.errors import UserError, nearest
from intervale.core.files import read_object, sha256_file, write_json
from intervale.model.checkpoint import read_header
from intervale.model.families import BACKBONES, native_backbone
from intervale.model.source import add_ends, fingerprint

TRAINED, BASE, ADAPTER, MANIFEST = "trained.safetensors", "base.json", "adapter_model.safetensors", "MANIFEST.json"
CHECKPOINTS = "checkpoints"
_HASHERS = 4  # files hashed at once: adapter, optimizer, and what is small
PARTS = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector.", "llm": ("model.language_model.", "lm_head.")}
_VISION_LINEARS = r"attention\.(q_proj|k_proj|v_proj|projection_layer)|mlp\.(fc1|fc2)"


def lora_pattern(targets: str, model_type: str) -> str:
    """The regular expression of the layers that `targets` ('llm', 'llm+head', 'llm+vision' ...) names.

    `model_type` is the text model's. Raises: UserError for an unknown target.
    """
    linears = BACKBONES[native_backbone({"text_config": {"model_type": model_type}}, "config.json")].linears
    known = {
        "llm": r".*language_model\.layers\.\d+\.(" + "|".join(re.escape(name) for name in linears) + ")",
        "head": "lm_head",
        "vision": r".*vision_tower\.encoder\.layer\.\d+\.(" + _VISION_LINEARS + ")",
    }
    patterns = []
    for target in targets.split("+"):
        if target not in known:
            raise UserError(f"lora.targets: {target!r} is unknown{nearest(target, known)}", "join any of llm, head, vision with '+'")
        patterns.append(known[target])
    return "|".join(patterns)


def attach_lora(network: InternVLForConditionalGeneration, rank: int, alpha: float, dropout: float, targets: str) -> None:
    """Add trainable LoRA layers to the network in place (float32, B = 0: the first output is the base's)."""
    if "head" in targets.split("+") and network.config.tie_word_embeddings:
        raise UserError("lora.targets names head, but this model's output layer is its embedding (tied)", "leave head out")
    pattern = lora_pattern(targets, network.config.text_config.model_type)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, task_type="CAUSAL_LM")
    with _quiet():
        get_peft_model(network, config, autocast_adapter_dtype=True)
    for layer in _lora_layers(network):
        for parts in (layer[1].lora_A, layer[1].lora_B):
            parts.float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's use of a name that transformers is about to drop: nothing a user could act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def _lora_layers(network: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def has_lora(network: torch.nn.Module) -> bool:
    """Does the network carry LoRA layers?"""
    return next(_lora_layers(network), None) is not None


def trained_tensors(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters that are not LoRA's, by native name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad and ".lora_" not in name}


def merge_into(network: torch.nn.Module, dtype_of: Callable[[str], torch.dtype]) -> dict[str, torch.Tensor]:
    """Fold LoRA into the weights in place, and return every changed tensor: {native name: tensor in its stored type}.

    W + scale * B A is computed in float32 and rounded once, to `dtype_of(name)`; the network gets the rounded values (and its
    LoRA B becomes 0), so that its outputs are those a reload must give. Trained tensors are rounded the same way.
    """
    changed: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, layer in _lora_layers(network):
            weight = layer.base_layer.weight
            total = weight.float()
            for adapter in layer.active_adapters:
                first, second = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
                total = total + layer.scaling[adapter] * (second @ first)
                layer.lora_B[adapter].weight.zero_()
            native = f"{name}.weight"
            rounded = total.to(dtype_of(native))
            weight.copy_(rounded)
            changed[native] = rounded.cpu()
    return changed


def save_trained(folder: Path, network: torch.nn.Module, base: dict[str, str], values: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write what training changed, and `base` (name, folder, fingerprint), into an existing folder (a staged one).

    `values`: the tensors by name, where the network holds only parts of them.
    """
    values = values if values is not None else {name: p for name, p in network.named_parameters() if p.requires_grad}
    if has_lora(network):
        config: Any = network.peft_config["default"]  # type: ignore[index]
        config.base_model_name_or_path = base["folder"]
        state = get_peft_model_state_dict(network, {n: t for n, t in values.items() if ".lora_" in n}, save_embedding_layers=False)
        # PEFT's loaders expect the wrapper's prefix, which the bare network does not have.
        state = {
            name if name.startswith("base_model.") else f"base_model.model.{name}": t.detach().contiguous() for name, t in state.items()
        }
        save_file(state, folder / ADAPTER, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    own = {name: tensor.detach().contiguous() for name, tensor in values.items() if ".lora_" not in name}
    if own:
        save_file(own, folder / TRAINED, metadata={"format": "pt"})
    write_json(folder / BASE, base)


def write_manifest(folder: Path, step: int) -> None:
    """List every file of a checkpoint folder (a staged one) with its size and sha256: the last file to be written."""
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(_HASHERS) as pool:  # hashing leaves the interpreter lock alone
        digests = pool.map(sha256_file, paths)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)}
    write_json(folder / MANIFEST, {"step": step, "files": files})


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest step of a run folder, or None."""
    found = sorted((run / CHECKPOINTS).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    return found[-1] if found else None


def checkpoint_of(folder: Path) -> Path | None:
    """The checkpoint folder that `folder` is or (a run) holds; None for a plain model.

    Raises: UserError for a run without a checkpoint.
    """
    if (folder / BASE).is_file():
        return folder
    if (folder / "run.json").is_file():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"{folder}: the run has no checkpoint yet", "let it train until its first save (train.save_steps)")
        return newest
    return None


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """A short name for what a checkpoint adds to its base: sizes and ends of its own tensors' files, 16 hex digits."""
    digest = hashlib.sha256()
    for name in (ADAPTER, TRAINED, "adapter_config.json"):
        if (checkpoint / name).is_file():
            add_ends(checkpoint / name, digest)
    return digest.hexdigest()[:16]


def base_folder(folder: Path) -> Path:
    """The model folder under a run or checkpoint; a plain model is its own.

    Raises: UserError when the base has moved or changed since.
    """
    checkpoint = checkpoint_of(folder)
    if checkpoint is None:
        return folder
    base = read_object(checkpoint / BASE, "folder", "fingerprint")
    path = Path(base["folder"])
    if not path.is_dir():
        raise UserError(f"{checkpoint}: its base model {path} is not there any more", "put it back, or write its new place into base.json")
    if fingerprint(path) != base["fingerprint"]:
        raise UserError(f"{checkpoint}: its base model {path} has changed since training", "put the original model back")
    return path


def trained_tiles(folder: Path) -> tuple[int | None, int | None]:
    """(least, most) tiles a picture that the recipe of a run or checkpoint asked for; None where it left them to the model."""
    checkpoint = checkpoint_of(folder)
    if checkpoint is None or not (checkpoint / "state.json").is_file():
        return None, None
    data = read_object(checkpoint / "state.json", "identity")["identity"]["recipe"]["data"]
    return data["min_tiles"], data["max_tiles"]


def verify_checkpoint(folder: Path, only: tuple[str, ...] = ()) -> str:
    """'' when every file (or those of `only`) is as its manifest says, else what is wrong. Cost: one hash of the files."""
    try:
        manifest = read_object(folder / MANIFEST, "files")
        for name, entry in manifest["files"].items():
            path = folder / name
            if only and name not in only:
                continue
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                return f"{name} is damaged"
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return ""


def adapted_network(
    network: InternVLForConditionalGeneration, folder: Path, *, trainable: bool = False
) -> InternVLForConditionalGeneration:
    """The base network with a checkpoint's adapter and tensors applied, in place."""
    checkpoint = checkpoint_of(folder)
    assert checkpoint is not None
    if (checkpoint / MANIFEST).is_file() and (fault := verify_checkpoint(checkpoint, (ADAPTER, TRAINED))):
        raise UserError(f"{checkpoint}: {fault}", "name an older checkpoint of the run, or let `intervale train --resume` make it again")
    if (checkpoint / TRAINED).is_file():
        load_trained(network, checkpoint / TRAINED)
    if (checkpoint / ADAPTER).is_file():
        _load_adapter(network, checkpoint, trainable)
    return network if trainable else network.requires_grad_(False).eval()


def _load_adapter(network: InternVLForConditionalGeneration, checkpoint: Path, trainable: bool) -> None:
    """Put the adapter's layers in, with the file's numbers unrounded. Raises: UserError when file and configuration do not match."""
    stored = read_header(checkpoint / ADAPTER)
    # low_cpu_mem_usage draws no random matrices that the file's replace at once, but rounds the file's to the base's type on the way
    exact = network.dtype == torch.float32
    with _quiet():
        model = PeftModel.from_pretrained(
            network, str(checkpoint), is_trainable=trainable, low_cpu_mem_usage=exact, torch_device=str(network.device)
        )
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    absent = sorted(own.keys() - stored.keys())
    unknown = sorted(name for name in stored.keys() - own.keys() if ".lora_" in name)
    if absent or unknown:
        found = [f"{len(names)} {fault}, {names[0]} first" for names, fault in ((absent, "not there"), (unknown, "too many")) if names]
        raise UserError(
            f"{checkpoint / ADAPTER}: not the tensors that adapter_config.json names: {'; '.join(found)}",
            "take both files from one adapter",
        )
    mapped = {tensor.data_ptr() for tensor in own.values()} if exact and network.device.type == "cpu" else set()
    for parameter in network.parameters():
        if parameter.data_ptr() in mapped:  # else whoever writes over the file changes a model in use
            parameter.data = parameter.data.clone()


def load_trained(network: torch.nn.Module, path: Path) -> None:
    """Copy stored tensors over the network's own of the same names. Raises: UserError for one it lacks or another shape."""
    read_header(path)
    parameters = dict(network.named_parameters())
    for name, tensor in load_file(path).items():
        own = parameters.get(name)
        if own is None or own.shape != tensor.shape:
            raise UserError(f"{path}: {name} does not fit the network", "this checkpoint belongs to another base model")
        with torch.no_grad():
            own.copy_(tensor)
