"""Which items are asked together, which share their beginning, and which pictures go through the vision tower together. Pure
functions; no weights.

Promises: all are functions of data, model and protocol alone, never of memory, time or of where an evaluation was stopped. Rounding
depends on what is computed together, so this is what makes a continued evaluation the straight one, bit by bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from intervale.core.files import inside
from intervale.core.records import Record

# The keys and values of 8,192 tokens of InternVL2-2B are 0.8 GB in bfloat16. A picture of 13 tiles is about 3,400 tokens, and a question about
# it some 50 and its answer more: two such pictures with a few questions each are asked together, one with many, or 64 short items.
TOKENS = 8192
ROWS = 64  # items of a batch
# What stands behind a shared beginning is held against all of the row, though it sees its own way alone. Twice the beginning, or so many
# positions, keep that small beside what is saved: 128 keys cost a ninth of what else a position costs in nano, a 128th in InternVL2-2B.
BEHIND = 128
WINDOW = 512  # items that are sorted among themselves: many batches even of short ones, and still roughly the data's order
KEPT_PICTURES = 16  # beyond the batch that needs them; 13 tiles of InternVL2-2B's features are 14 MB in bfloat16


@dataclass(frozen=True)
class Question:
    """An item as it will be asked. `tokens` of its prompt, `new` at most after it; `continuations` (likelihood): ids of each choice.

    `outline`: the prompt's ids with a single -1 for each picture, `counts` the tokens of each; without it the item shares nothing.
    `turn`: the length beyond which the rotary embedding is another one for all that is in a pass (None: never). `row`: those of a
    batch with the same one share their beginning.
    """

    record: Record
    tokens: int
    picture_tokens: int
    new: int
    continuations: tuple[tuple[int, ...], ...] = ()
    outline: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    turn: int | None = None
    row: int = 0

    def pictures(self) -> list[str]:
        """The files of its pictures."""
        return [str(inside(self.record.root, image, self.record.where)) for image in self.record.images]

    @property
    def crosses(self) -> bool:
        """Does the rotary embedding change between its prompt and its end? Then it is asked alone."""
        return self.turn is not None and self.tokens <= self.turn < self.tokens + self.new

    @property
    def beyond(self) -> bool:
        """Is all of its answer computed with the other rotary embedding?"""
        return self.turn is not None and self.tokens > self.turn

    @property
    def behind(self) -> int:
        """Positions that may stand behind its prompt: its longest answer, or all its choices."""
        return sum(map(len, self.continuations)) or self.new


@dataclass
class _Row:
    """Questions, with their places in the data, that have their first `trunk` positions in common; `total`: positions of all, each once."""

    members: list[tuple[int, Question]]
    trunk: int
    total: int

    @property
    def length(self) -> int:
        question = self.members[0][1]
        return question.picture_tokens or question.tokens

    def takes(self, question: Question, trunk: int, total: int) -> bool:
        """May it join, which would make the row that long? Worth it if at least half of every prompt is shared, and not too much is behind."""
        first = self.members[0][1]
        alike = question.beyond == first.beyond and not question.crosses and not first.crosses
        within = question.turn is None or not question.beyond or trunk > question.turn
        worth = bool(question.outline) and 2 * trunk >= max(own.tokens for _, own in [*self.members, (0, question)])
        room = len(self.members) < ROWS and total <= TOKENS and total - trunk <= max(2 * trunk, BEHIND)
        return alike and within and worth and room


def _outlines(window: Sequence[Question]) -> tuple[list[tuple[int, ...]], dict[int, int]]:
    """(each prompt's ids with -1 - k in place of the window's picture k, the tokens of each such number)."""
    numbers: dict[str, int] = {}
    weights: dict[int, int] = {}
    outlines = []
    for question in window:
        pictures = iter(zip(question.pictures(), question.counts, strict=True)) if question.outline else iter(())
        outline = []
        for number in question.outline:
            if number < 0:
                picture, count = next(pictures)
                number = -1 - numbers.setdefault(picture, len(numbers))
                weights[number] = count
            outline.append(number)
        outlines.append(tuple(outline))
    return outlines, weights


def _rows(window: Sequence[Question]) -> list[_Row]:
    """All questions of a window, each once, in rows."""
    outlines, weights = _outlines(window)
    rows: list[_Row] = []
    before: tuple[int, ...] = ()
    # In the order of their ids, neighbours have the longest beginnings in common, and a row what its neighbours all have.
    for place in sorted(range(len(window)), key=lambda n: outlines[n]):
        question, outline = window[place], outlines[place]
        differ = next(
            (n for n, (own, other) in enumerate(zip(outline, before, strict=False)) if own != other), min(len(outline), len(before))
        )
        shared = sum(weights.get(number, 1) for number in outline[:differ])
        own, before = question.tokens + question.behind, outline
        if rows and rows[-1].takes(question, min(rows[-1].trunk, shared), rows[-1].total + own - shared):
            rows[-1].members.append((place, question))
            rows[-1].trunk, rows[-1].total = min(rows[-1].trunk, shared), rows[-1].total + own - shared
        else:
            rows.append(_Row([(place, question)], question.tokens, own))
    for row in rows:
        row.members.sort(key=lambda member: member[0])
    return rows


def batches_of(questions: Sequence[Question]) -> list[list[Question]]:
    """All questions, each once, in batches of about equally long rows, at most `ROWS` items, `TOKENS` in all with their padding.

    A question's `row` says which of its batch it shares its beginning with. In a window the longest come first, so that too little
    memory shows at once. Rows of as many picture tokens, and the items of a row, stay in the data's order.
    """
    batches: list[list[Question]] = []
    for begin in range(0, len(questions), WINDOW):
        batch: list[_Row] = []
        for row in sorted(_rows(questions[begin : begin + WINDOW]), key=lambda row: (-row.length, row.members[0][0])):
            if not batch or not _fits(batch, row):
                batch = []
                batches.append([])
            batch.append(row)
            batches[-1] += [replace(question, row=len(batch) - 1) for _, question in row.members]
    return batches


def _fits(batch: Sequence[_Row], row: _Row) -> bool:
    """May the row join the batch? Trunks are padded to the longest, and what stands behind them too."""
    every = [*batch, row]
    widest = max(own.trunk for own in every) + max(own.total - own.trunk for own in every)
    first, other = batch[0].members[0][1], row.members[0][1]
    alike = first.beyond == other.beyond and not first.crosses and not other.crosses
    return alike and len(every) * widest <= TOKENS and sum(len(own.members) for own in every) <= ROWS


def rows_of(batch: Sequence[Question]) -> list[list[Question]]:
    """A batch's questions by the rows they share, in its order."""
    return [list(members) for _, members in groupby(batch, key=lambda question: question.row)]


def work_of(batch: Sequence[Question]) -> int:
    """About how much there is to compute, in positions: a row's longest prompt, and what stands behind its prompts."""
    return sum(max(question.tokens for question in row) + sum(question.behind for question in row) for row in rows_of(batch))


def tower_schedule(batches: Sequence[Sequence[Question]], given: Collection[str] = ()) -> list[dict[str, int]]:
    """For every batch, its pictures and the number of the batch with which each goes through the tower: its own or an earlier one.

    The last `KEPT_PICTURES` used stay for the next batches. A continued evaluation runs the earlier batch's pictures again, all of them.
    `given`: pictures that need no tower.
    """
    held: OrderedDict[str, int] = OrderedDict()
    schedule = []
    for number, batch in enumerate(batches):
        wanted = [p for p in dict.fromkeys(picture for question in batch for picture in question.pictures()) if p not in given]
        for picture in wanted:
            held.setdefault(picture, number)
            held.move_to_end(picture)
        schedule.append({picture: held[picture] for picture in wanted})
        while len(held) > KEPT_PICTURES:
            held.popitem(last=False)
    return schedule
