"""The network's own steps: pixels to features, ids and features to hidden states, hidden states to losses.

Logits are computed only where a label is. Legend: B samples, S positions, T tokens of a pack, P tiles, N targets, H/W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import InternVLForConditionalGeneration

from intervale.data.tiling import IMAGENET_MEAN, IMAGENET_STD
from intervale.model.attention import Layout
from intervale.model.decoder import Walk, hidden_at_targets

_LABELS = 1024  # logits at a time; with more labels than this they are made again on the way back (0.4 GiB at 92,553 words)


def normalise(tiles_PHWC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 tiles to `pixels_PCHW`: scaled to 0..1, then ImageNet's mean and deviation, in float32 as the official code."""
    mean = torch.tensor(IMAGENET_MEAN, device=tiles_PHWC.device)
    deviation = torch.tensor(IMAGENET_STD, device=tiles_PHWC.device)
    return ((tiles_PHWC.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous().to(dtype)


def tower_features(network: InternVLForConditionalGeneration, pixels_PCHW: torch.Tensor) -> torch.Tensor:
    """(tiles, tokens a tile, tower width x shuffle): the tower and the pixel shuffle, before the projector.

    The same for a picture as long as the tower is frozen, which is what makes it worth keeping.
    """
    core, config = network.model, network.config
    layer = config.vision_feature_layer
    seen = core.vision_tower(pixel_values=pixels_PCHW.to(core.dtype), output_hidden_states=layer != -1, return_dict=True)
    hidden = (seen.last_hidden_state if layer == -1 else seen.hidden_states[layer])[:, 1:]
    edge = int(hidden.shape[1] ** 0.5)
    shuffled = core.pixel_shuffle(hidden.reshape(len(hidden), edge, edge, -1), scale_factor=config.downsample_ratio)
    return shuffled.reshape(len(hidden), -1, shuffled.shape[-1])


def picture_features(network: InternVLForConditionalGeneration, pixels_PCHW: torch.Tensor) -> torch.Tensor:
    """(tiles, tokens a tile, width of the language model): tower, pixel shuffle and projector."""
    return network.model.multi_modal_projector(tower_features(network, pixels_PCHW))


def embed(
    network: InternVLForConditionalGeneration,
    ids_BS: torch.Tensor,
    features: torch.Tensor | None,
    image_token_id: int,
    places_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token embeddings with the pictures' features in place of `<IMG_CONTEXT>`.

    The counts must agree: a silent mismatch is how other trainers lose pictures. `places_P`: where these tokens stand in the flattened
    ids, if it is known already: looking for them makes the host wait for all that a GPU was given before, here and on the way back.
    What is returned is no view of another tensor, as no layer's output is: for a view the first layer would be compiled apart.
    """
    embedded = network.get_input_embeddings()(ids_BS)
    if places_P is None:
        places_P = (ids_BS == image_token_id).flatten().nonzero()[:, 0]
    have = 0 if features is None else features.shape[0] * features.shape[1]
    assert len(places_P) == have, f"{len(places_P)} picture tokens but {have} features"
    if features is None:
        return embedded
    at = (places_P // ids_BS.shape[1], places_P % ids_BS.shape[1])
    return embedded.index_put(at, features.flatten(0, 1).to(embedded.dtype))


def target_losses(
    network: InternVLForConditionalGeneration,
    embedded_1TD: torch.Tensor,
    positions_1T: torch.Tensor,
    layout: Layout,
    labelled_N: torch.Tensor,
    targets_N: torch.Tensor,
    walk: Walk = Walk(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of every target, is it the most likely token), both of length N, in the order of the pack.

    `labelled_N` are the places of the tokens with a target, the id that is to follow; no logits are computed elsewhere.
    """
    hidden_ND = hidden_at_targets(network, embedded_1TD, positions_1T, layout, labelled_N, walk)
    losses, right = zip(*(_head_losses(network, *part) for part in _parts(hidden_ND, targets_N)), strict=True)
    return torch.cat(losses), torch.cat(right)


def _parts(hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(hidden_ND.split(_LABELS), targets_N.split(_LABELS), strict=True)


def _head_losses(
    network: InternVLForConditionalGeneration, hidden_ND: torch.Tensor, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def losses(hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NV = network.lm_head(hidden_ND).float()
        return functional.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV.detach().argmax(-1) == targets_N

    if len(targets_N) < _LABELS or not torch.is_grad_enabled():
        return losses(hidden_ND)
    found: tuple[torch.Tensor, torch.Tensor] = checkpoint(losses, hidden_ND, use_reentrant=False)
    return found
