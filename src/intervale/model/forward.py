"""The network's own steps: pixels to features, ids and features to hidden states, hidden states to losses.

Logits are computed only where a label is. Legend: B samples, S positions, T tokens of a pack, P tiles, N targets, H/W pixels, C channels.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from intervale.data.tiling import IMAGENET_MEAN, IMAGENET_STD
from intervale.model.attention import NAME, Layout


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
    network: InternVLForConditionalGeneration, ids_BS: torch.Tensor, features: torch.Tensor | None, image_token_id: int
) -> torch.Tensor:
    """Token embeddings with the pictures' features in place of `<IMG_CONTEXT>`.

    The counts must agree: a silent mismatch is how other trainers lose pictures.
    """
    embedded = network.get_input_embeddings()(ids_BS)
    places = ids_BS == image_token_id
    count = int(places.sum())
    have = 0 if features is None else features.shape[0] * features.shape[1]
    assert count == have, f"{count} picture tokens but {have} features"
    if features is None:
        return embedded
    return embedded.masked_scatter(places.unsqueeze(-1), features.to(embedded.dtype))


def target_losses(
    network: InternVLForConditionalGeneration,
    embedded_1TD: torch.Tensor,
    positions_1T: torch.Tensor,
    layout: Layout,
    targets_1T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of every target, is it the most likely token), both of length N, in the order of the pack.

    `targets_1T` holds at each token the id that is to follow, or -1; no logits are computed at the -1. The network's language
    model must use packed attention (`model.attention.use_packed_attention`), or the rows would see each other.
    """
    text = network.model.language_model
    assert text.config._attn_implementation == NAME, "rows of a pack would see each other"
    hidden_1TD = text(
        inputs_embeds=embedded_1TD, position_ids=positions_1T, attention_mask=None, use_cache=False, layout=layout
    ).last_hidden_state
    wanted = targets_1T >= 0
    logits_NV = network.lm_head(hidden_1TD[wanted]).float()
    targets_N = targets_1T[wanted]
    losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses_N, logits_NV.argmax(-1) == targets_N
