"""How well a model's vision tower sees the same dish in another artist's hand, before anything is tuned.

    python assets/nearest_dish.py nano

Each of the five training artists in turn is left out: its pictures of foodemoji are named by the nearest mean of the others' pictures of a
dish (cosine, over the mean and the maximum of a picture's features, each standardised). The test artists are not used. Cost: 10 s.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from artists import TRAIN
from PIL import Image
from torch.nn.functional import normalize

from intervale.core.embedded import ASSETS
from intervale.data.tiling import cut_tiles
from intervale.model.forward import normalise, tower_features
from intervale.model.load import load_model, narrow

_AT_ONCE = 128


def features_of(name: str, files: list[str]) -> torch.Tensor:
    """(pictures, width x 2) of a model's tower, standardised."""
    model = load_model(name)
    tiling = narrow(model.tiling, None, 1)
    tiles_PHWC = np.concatenate([cut_tiles(Image.open(ASSETS / "foodemoji" / file).convert("RGB"), tiling) for file in files])
    parts = []
    with torch.inference_mode():
        for pixels in torch.from_numpy(tiles_PHWC).to(model.device).split(_AT_ONCE):
            seen = tower_features(model.network, normalise(pixels, torch.float32)).float()
            parts.append(torch.cat([seen.mean(1), seen.amax(1)], 1).cpu())
    all_ND = torch.cat(parts)
    return normalize((all_ND - all_ND.mean(0)) / (all_ND.std(0) + 1e-6), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    asked = parser.parse_args()
    items = json.loads((ASSETS / "foodemoji" / "sivqa_tidy.json").read_text(encoding="utf-8"))
    named = {item["food_meta"]["food_file"]: (item["artist"], item["food_name"]) for item in items if item["split"] == "train"}
    assert {artist for artist, _ in named.values()} <= set(TRAIN)
    features_ND = features_of(asked.model, list(named))
    artists, dishes = (np.array(column) for column in zip(*named.values(), strict=True))
    shares = []
    for artist in sorted(set(artists)):
        others = artists != artist
        known = sorted(set(dishes[others]))
        means = torch.stack([features_ND[torch.from_numpy(others & (dishes == dish))].mean(0) for dish in known])
        nearest = np.array(known)[(features_ND[torch.from_numpy(~others)] @ normalize(means, dim=1).T).argmax(1).numpy()]
        shares.append(float((nearest == dishes[~others]).mean()))
        print(f"{artist}: {shares[-1]:.1%} of {int((~others).sum())} pictures")
    print(f"mean: {np.mean(shares):.1%}")


if __name__ == "__main__":
    main()
