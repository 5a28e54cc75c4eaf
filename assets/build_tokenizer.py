"""nano's tokenizer: BPE over the texts it is trained on, bytes for what it has no piece for, InternLM2's and InternVL's control tokens.

    python assets/build_tokenizer.py OUT.json FOODEMOJI TRAIN.jsonl [--size 3000]

FOODEMOJI is the embedded data set (the words of its training side), TRAIN.jsonl conversations of build_pretrain.py (20,000 are
plenty). Of InternLM2's own kind: spaces are ▁, an unknown character is its UTF-8 bytes. Cost: seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from intervale.data.foodieqa import NAMES_THE_DISH
from intervale.data.prompt import TEMPLATES
from intervale.model.tokenizer import INTERNLM2_SPECIALS, VISION_SPECIALS, with_bos

CONTROL = ["<unk>", "<s>", "</s>", *INTERNLM2_SPECIALS.values(), *VISION_SPECIALS]
PHRASES = (
    "图中的菜是",
    "图片里",
    "主要",
    "背景",
    "这是",
    "一种",
    "什么",
    "颜色",
    "属于",
    "和",
    "是",
    "在",
)  # so that no name is glued to its sentence
FOOD_WEIGHT = 4  # each training question counts so often: the tuned answers should be short in tokens


def texts(foodemoji: Path, conversations: Path) -> Iterator[str]:
    """Every text of both sources, and the prompt's fixed parts as often as the first source has items."""
    template = TEMPLATES["internlm2-chat"]
    for line in json.loads((foodemoji / "sivqa_tidy.json").read_text(encoding="utf-8")):
        if line["split"] == "train":
            right = int(line["answer"])
            for _ in range(FOOD_WEIGHT):
                yield line["question"]
                yield line["choices"][right] + NAMES_THE_DISH + line["food_name"]
                yield line["question_en"]
                yield line["choices_en"][right]
                yield template.system
                yield from (text for _, text in template.headers.values())
    for row in conversations.read_text(encoding="utf-8").splitlines():
        for message in json.loads(row)["messages"]:
            yield message["content"].removeprefix("<image>")


def built(corpus: Iterator[str], size: int) -> Tokenizer:
    """A tokenizer of `size` tokens: control tokens, bytes, then the pieces of the corpus."""
    first = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = _bare(models.BPE())
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size - len(first), min_frequency=2, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*first, *pieces]))}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = _bare(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return with_bos(backend)


def _bare(model: models.Model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    phrases = "|".join(PHRASES)
    # A phrase is a piece of its own; a word keeps the space before it; Chinese is cut at phrases and punctuation.
    words = Regex(rf"{phrases}|▁?[A-Za-z]+|(?:(?!{phrases})\p{{Han}})+|\p{{N}}|▁|[^\p{{L}}\p{{N}}▁]")
    backend.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("foodemoji", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--size", type=int, default=3000)
    asked = parser.parse_args()
    backend = built(texts(asked.foodemoji, asked.conversations), asked.size)
    backend.save(str(asked.out))
    print(f"{backend.get_vocab_size()} tokens in {asked.out}")


if __name__ == "__main__":
    main()
