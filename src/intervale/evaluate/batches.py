"""Which items are asked together, and which pictures go through the vision tower together. Pure functions; no weights.

Promises: both are functions of data, model and protocol alone, never of memory, time or of where an evaluation was stopped. Rounding
depends on what is computed together, so this is what makes a continued evaluation the straight one, bit by bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from intervale.core.files import inside
from intervale.core.records import Record

# The keys and values of 8,192 tokens of InternVL2-2B are 0.8 GB in bfloat16; a picture of 13 tiles with its question is about 3,400
# tokens, so two such items are asked together, and 64 short ones. It is also twice the length from which Phi-3's rotary embedding
# looks at the longest row of all: rows beyond that length are always asked alone.
TOKENS = 8192
ROWS = 64
WINDOW = 512  # items that are sorted among themselves: many batches even of short ones, and still roughly the data's order
KEPT_PICTURES = 16  # beyond the batch that needs them; 13 tiles of InternVL2-2B's features are 14 MB in bfloat16


@dataclass(frozen=True)
class Question:
    """An item as it will be asked. `tokens` of its prompt, `new` at most after it; `continuations` (likelihood): ids of each choice."""

    record: Record
    tokens: int
    picture_tokens: int
    new: int
    continuations: tuple[tuple[int, ...], ...] = ()

    def pictures(self) -> list[str]:
        """The files of its pictures."""
        return [str(inside(self.record.root, image, self.record.where)) for image in self.record.images]


def batches_of(questions: Sequence[Question]) -> list[list[Question]]:
    """All questions, each once, in batches of about equally long ones, at most `ROWS`, `TOKENS` in all with their padding.

    In a window the longest come first, so that too little memory shows at once. Items of as many picture tokens stay in the
    data's order, whatever their text: several questions about a picture are usually neighbours.
    """
    batches: list[list[Question]] = []
    for begin in range(0, len(questions), WINDOW):
        batch: list[Question] = []
        longest = 0
        for question in sorted(questions[begin : begin + WINDOW], key=lambda q: -(q.picture_tokens or q.tokens)):
            longest = max(longest, question.tokens + question.new)
            if not batch or len(batch) == ROWS or (len(batch) + 1) * longest > TOKENS:
                batch, longest = [], question.tokens + question.new
                batches.append(batch)
            batch.append(question)
    return batches


def tower_schedule(batches: Sequence[Sequence[Question]]) -> list[dict[str, int]]:
    """For every batch, its pictures and the number of the batch with which each goes through the tower: its own or an earlier one.

    The last `KEPT_PICTURES` used stay for the next batches. A continued evaluation runs the earlier batch's pictures again, all of them.
    """
    held: OrderedDict[str, int] = OrderedDict()
    schedule = []
    for number, batch in enumerate(batches):
        wanted = list(dict.fromkeys(picture for question in batch for picture in question.pictures()))
        for picture in wanted:
            held.setdefault(picture, number)
            held.move_to_end(picture)
        schedule.append({picture: held[picture] for picture in wanted})
        while len(held) > KEPT_PICTURES:
            held.popitem(last=False)
    return schedule
