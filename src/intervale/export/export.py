"""From a training run (or a model) to one plain model folder, proven equal to what was trained.

The steps: logits of the adapter model in float32; merge in float32, rounded once to the stored type; write; reload from disk;
compare. A merge that changes nothing is refused. Peak memory: one float32 copy of the network, on the GPU if there is one with room for it,
and the changed tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from intervale.core.errors import OutsideError, UserError
from intervale.core.files import read_json, refuse_existing
from intervale.core.lang import say
from intervale.core.runlog import versions
from intervale.model.adapt import (
    ADAPTER,
    TRAINED,
    adapted_network,
    base_folder,
    checkpoint_fingerprint,
    checkpoint_of,
    merge_into,
    trained_tiles,
)
from intervale.model.convert import convert
from intervale.model.hf_files import PROVENANCE
from intervale.model.load import as_device, narrow, network_from, text_side
from intervale.model.source import NO_IMAGE_TOKEN, Source, fingerprint, open_source

# Reloaded against in-memory float32 logits: the same numbers take the same path, so only summation order may differ.
_TOLERANCE = 2e-5
_PROBE_TOKENS, _PROBES = 24, 3
_ACTIVATIONS = 2 << 30  # bytes beside the weights on a GPU: a probe's activations, and what the libraries take


@dataclass(frozen=True)
class Proof:
    """What the comparison found; differences are the largest over all logits of all probes."""

    changed_tensors: int
    reload_difference: float  # the written folder against the merged network in memory
    rounding_difference: float  # the merged network against the adapter model: what the stored type costs
    same_top_token: float  # share of positions with the adapter model's most likely token
    largest_logit: float


def _probe(network: Any, source: Source) -> torch.Tensor:
    """Logits (probes x positions, vocabulary) on fixed random tokens, one tile of noise before them when pictures can be placed."""
    config = network.config
    generator = torch.Generator().manual_seed(0)
    token = source.config.image_token_id
    vocabulary = config.text_config.vocab_size
    rows = []
    for _ in range(_PROBES):
        ids = torch.randint(3, vocabulary, (1, _PROBE_TOKENS), generator=generator)
        ids[ids == token] = 3
        pixels = None
        if token != NO_IMAGE_TOKEN:
            edge = config.vision_config.image_size[0]
            tokens = int((edge // config.vision_config.patch_size[0]) ** 2 * config.downsample_ratio**2)
            pixels = torch.randn(1, 3, edge, edge, generator=generator)
            ids = torch.cat([ids[:, :4], torch.full((1, tokens), token), ids[:, 4:]], 1)
        place = network.device
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            logits = network(input_ids=ids.to(place), pixel_values=None if pixels is None else pixels.to(place), use_cache=False).logits[0]
        rows.append((logits if pixels is None else torch.cat([logits[:4], logits[4 + tokens :]])).float().cpu())
    return torch.cat(rows)


def _place_for(source: Source, checkpoint: Path | None) -> torch.device:
    """Where the logits are computed: the device a run would take, or the CPU where network and adapter in float32, and the merge of the
    largest matrix (its product, the product scaled, the sum), do not fit there."""
    device = as_device(None)
    if device.type == "cuda":
        sizes = [math.prod(shape) for shape in source.shapes.values()]
        adapter = checkpoint / ADAPTER if checkpoint is not None else None
        needed = 4 * (sum(sizes) + 3 * max(sizes)) + (adapter.stat().st_size if adapter and adapter.is_file() else 0) + _ACTIVATIONS
        if torch.cuda.mem_get_info(device)[0] < needed:
            return torch.device("cpu")
    return device


def export(src: Path, dst: Path, to: str, *, dtype: torch.dtype | None, tell: Callable[[str], None]) -> Proof:
    """Write `src` (a run, a checkpoint or a model) as one plain folder `dst`, 'hf' or 'official'; see the module's promises.

    `dtype` None keeps each tensor's stored type. Raises: UserError when nothing changed or `dst` holds something;
    OutsideError when what was written does not give the logits of what was trained. Then `dst` does not exist.
    """
    refuse_existing(dst)
    checkpoint = checkpoint_of(src)
    base = base_folder(src)
    source = open_source(base)
    device = _place_for(source, checkpoint)
    tell(say(f"loading {base} in float32 on {device}", f"以 float32 载入 {base}（{device}）"))
    network = network_from(source, dtype=torch.float32, device=device)
    if checkpoint is not None:
        network = adapted_network(network, src)
    tuned = _probe(network, source)
    changed: dict[str, torch.Tensor] = {}
    if checkpoint is not None:
        changed = merge_into(network, lambda name: dtype or source.dtype_of(name))
        changed |= _trained(checkpoint, network, source, dtype)
        _refuse_no_op(source, changed, src)
    if dtype is not None:
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype).float()
    merged = _probe(network, source)
    del network
    proofs: list[Proof] = []

    def verify(folder: Path) -> None:
        tell(say("reloading what was written and comparing logits", "重新载入并比较 logits"))
        written = _probe(network_from(open_source(folder, source.config.image_token_id), dtype=torch.float32, device=device), source)
        proofs.append(_compare(tuned, merged, written, len(changed)))
        (folder / PROVENANCE).write_text(
            json.dumps(_provenance(src, base, checkpoint, to, proofs[0]), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
        if (folder / "README.md").is_file():  # the base's model card, with the base's numbers
            (folder / "README.md").rename(folder / "README.base.md")

    token = None if source.config.image_token_id == NO_IMAGE_TOKEN else source.config.image_token_id
    convert(base, dst, to, image_token_id=token, overrides=changed, dtype=dtype, tiles=_tiles(src, base), verify=verify)
    return proofs[0]


def _tiles(src: Path, base: Path) -> tuple[int, int] | None:
    least, most = trained_tiles(src)
    if least is None and most is None:
        return None
    tiling = narrow(text_side(base).tiling, least, most)
    return tiling.min_tiles, tiling.max_tiles


def _trained(checkpoint: Path, network: torch.nn.Module, source: Source, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The checkpoint's own tensors rounded to their stored type, in the network too."""
    if not (checkpoint / TRAINED).is_file():
        return {}
    parameters = dict(network.named_parameters())
    found = {}
    with safe_open(checkpoint / TRAINED, "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 (not a dict)
            found[name] = file.get_tensor(name).to(dtype or source.dtype_of(name))
            parameters[name].copy_(found[name])
    return found


def _refuse_no_op(source: Source, changed: dict[str, torch.Tensor], src: Path) -> None:
    for name, stored in source.natives():
        if name in changed and not torch.equal(changed[name].float(), stored.to(changed[name].dtype).float()):
            return
    raise UserError(
        f"{src}: nothing changed: every tensor is the base model's own (after rounding to its stored type)",
        "train it first; if the change is smaller than the stored type can hold, export with --dtype float32",
    )


def _compare(tuned: torch.Tensor, merged: torch.Tensor, written: torch.Tensor, changed: int) -> Proof:
    scale = max(1.0, float(tuned.abs().max()))
    proof = Proof(
        changed_tensors=changed,
        reload_difference=float((written - merged).abs().max()),
        rounding_difference=float((merged - tuned).abs().max()),
        same_top_token=float((written.argmax(-1) == tuned.argmax(-1)).float().mean()),
        largest_logit=float(tuned.abs().max()),
    )
    if not proof.reload_difference <= _TOLERANCE * scale:
        raise OutsideError(
            f"the written folder does not give the logits of the merged model (difference {proof.reload_difference:.3g}); it was removed",
            "try again on another disk; if it stays, report it with the output of `intervale doctor`",
        )
    return proof


def _provenance(src: Path, base: Path, checkpoint: Path | None, to: str, proof: Proof) -> dict[str, Any]:
    """What the exported folder says about itself: where it comes from and what was compared."""
    value: dict[str, Any] = {
        "made_by": "intervale export",
        "format": to,
        "from": str(src),
        "base": {"folder": str(base), "fingerprint": fingerprint(base)},
        "proof": asdict(proof),
        "versions": versions(),
    }
    if checkpoint is not None:
        state = read_json(checkpoint / "state.json")
        value |= {"checkpoint_fingerprint": checkpoint_fingerprint(checkpoint), "step": state["step"]}
        value |= {"recipe": state["identity"]["recipe"], "data": state["identity"]["data"]}
        run = checkpoint.parent.parent / "run.json"
        if run.is_file():
            value["train"] = read_json(run)["train"]
    elif (base / PROVENANCE).is_file():
        value["before"] = read_json(base / PROVENANCE)
    return value
