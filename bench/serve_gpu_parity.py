"""LMDeploy's logits and served tokens, scored by the network in transformers: serve_gpu_parity.py FOLDER CASES LOGITS ANSWERS OUT

For every case: are the prompt's ids ours, the smallest cosine of the logits over the answer, how far below the network's likeliest token the engine's
tokens are at worst (teacher-forced), and what the cosine is when the network is shown another picture. The pictures are tiled by us.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from intervale.data.images import load_picture
from intervale.data.prompt import Picture, Turn, encode_turns
from intervale.data.tiling import cut_tiles
from intervale.engine.decode import encode_tiles
from intervale.model.forward import embed
from intervale.model.load import Model, load_model


def prompt_of(model: Model, messages: list[dict[str, Any]]) -> tuple[np.ndarray, torch.Tensor | None]:
    """(ids, features) of one user turn."""
    import base64

    said: list[str | Picture] = []
    features = []
    for part in messages[0]["content"]:
        if part["type"] == "text":
            said.append(part["text"])
            continue
        picture = load_picture(base64.b64decode(part["image_url"]["url"].split(",", 1)[1]))
        features.append(encode_tiles(model, cut_tiles(picture, model.tiling)))
        said += [Picture(features[-1].shape[0] * features[-1].shape[1]), "\n"]
    ids_S = encode_turns([Turn("user", tuple(said))], model.template, model.tokenizer, answer_next=True).ids_S
    return ids_S, torch.cat(features) if features else None


@torch.inference_mode()
def logits_of(model: Model, ids_S: np.ndarray, features: torch.Tensor | None, answer: list[int]) -> torch.Tensor:
    """The network's logits (tokens, vocabulary) before each token of the answer."""
    ids_BS = torch.tensor([[*ids_S.tolist(), *answer[:-1]]], device=model.device)
    embedded = embed(model.network, ids_BS, features, model.network.config.image_token_id)
    hidden = model.network.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return model.network.lm_head(hidden[0, -len(answer) :]).float().cpu()


def scored(logits: torch.Tensor, answer: list[int]) -> dict[str, Any]:
    """How likely the answer's tokens are to the network."""
    top = logits.topk(2).values
    own = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return {
        "deficit": round(float((top[:, 0] - own).max()), 4),
        "likeliest": f"{int((logits.argmax(1) == torch.tensor(answer)).sum())}/{len(answer)}",
        "gap_p50": round(float((top[:, 0] - top[:, 1]).median()), 3),
    }


def main() -> None:
    folder, cases_file, logits_file, answers_file, out = map(Path, sys.argv[1:6])
    asked, answers = json.loads(cases_file.read_text()), json.loads(answers_file.read_text())
    engine = torch.load(logits_file, weights_only=True)
    model = load_model(folder)
    found: dict[str, Any] = {"engine": engine.pop("backend")}
    for name, one in engine.items():
        ids_S, features = prompt_of(model, asked[name]["messages"])
        same = ids_S.tolist() == one["input_ids"]
        native = logits_of(model, ids_S, features, one["ids"])
        theirs = one["logits"][: len(native), : native.shape[1]]
        cosines = cosine_similarity(theirs, native, dim=1)
        row = {"prompt_tokens": len(ids_S), "same_prompt": same, "cosine_min": round(float(cosines.min()), 6), **scored(native, one["ids"])}
        if served := answers.get(name):
            row["served"] = scored(logits_of(model, ids_S, features, served["ids"]), served["ids"])
            row["gateway_says_the_same"] = served["gateway"] == served["engine"]
        if asked[name]["wrong"]:
            _, wrong = prompt_of(model, asked[name]["wrong"])
            control = logits_of(model, ids_S, wrong, one["ids"])
            row["control_cosine_first"] = round(float(cosine_similarity(theirs[:1], control[:1], dim=1)[0]), 4)
            row["control_deficit"] = scored(control, one["ids"])["deficit"]
        found[name] = row
        print(name, json.dumps(row), flush=True)
        out.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
