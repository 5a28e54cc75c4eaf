"""Answers to questions without choices: how near the words are to the reference's. Pure functions; the distances are rapidfuzz's.

Four measures of an item, all between 0 and 1, on answer and reference in `score.normalise`'s form (no case, width, blanks, punctuation)
and without the tutorial's "，图中的菜是...". None of them knows what words mean: read the answers, the report lists them.

* exact: the two are the same.
* contained: the reference stands in the answer as words of its own (not inside a longer word or number). The headline, because a model
  that was not tuned yet answers in sentences; it is blind to "not" and to an answer that names everything.
* f1: of characters, how many of both texts are shared, whatever their order (SQuAD's F1, with characters for words).
* rouge_l: of words (a Chinese character is one), the longest common subsequence as an F measure. Source: Lin 2004, ROUGE.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Indel

from intervale.core.errors import UserError
from intervale.core.records import Record
from intervale.evaluate.score import cut_tail, normalise, stands_in
from intervale.evaluate.statistics import wilson

HEADLINE = "contained"
YES_NO, GRADED = ("contained", "exact"), ("f1", "rouge_l")
# Words of scripts that write with blanks are one unit, characters of scripts that do not (Han, kana, Thai ...) one each.
_UNIT = re.compile(r"[^\W\d_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ufaff\uff66-\uff9f]+|\d+(?:\.\d+)?|\w")


def words(text: str) -> list[str]:
    """The units of ROUGE-L, in order: words, numbers, single Chinese characters."""
    return [unit for unit in _UNIT.findall(text.casefold()) if normalise(unit)]


def character_f1(answer: str, reference: str) -> float:
    """Shared characters of two texts in normal form, as an F measure; 0 when one of them is empty."""
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F measure (beta 1): twice the longest common subsequence over both lengths; 0 when nothing is shared.

    Indel's normalised similarity is that very number: 1 - (a + b - 2 lcs) / (a + b).
    """
    one, other = words(answer), words(reference)
    return float(Indel.normalized_similarity(one, other)) if one and other else 0.0


def score_free(raw: str, reference: str) -> dict[str, Any]:
    """{exact, contained, f1, rouge_l} of a raw answer against the record's reference."""
    said, right = cut_tail(raw), cut_tail(reference)
    plain, wanted = normalise(said), normalise(right)
    return {
        "exact": plain == wanted,
        "contained": stands_in(right, said),
        "f1": round(character_f1(plain, wanted), 6),
        "rouge_l": round(rouge_l(said, right), 6),
    }


def without_choices(records: Sequence[Record], where: str, prompt: str, mode: str) -> bool:
    """Is this data of open answers (no item has choices)?

    Raises: UserError for a mixture, for an item without a reference to compare with, for a prompt or mode that needs choices.
    """
    free = [record for record in records if not record.choices]
    if not free:
        return False
    if len(free) < len(records):
        raise UserError(
            f"{where}: {_some(free)} of {len(records)} items have no 'choices'",
            "put them into a file of their own: questions with choices and open ones are scored by different rules",
        )
    if prompt == "mcq" or mode != "strict":
        raise UserError(
            f"{where}: no item has 'choices', so there is nothing for --prompt {prompt} --mode {mode} to choose from",
            "use --prompt open --mode strict: open answers are compared with the record's own answer",
        )
    silent = [record for record in records if not normalise(cut_tail(record.reference()))]
    if silent:
        raise UserError(
            f"{where}: {_some(silent)} of {len(records)} items have neither 'choices' nor an answer to compare with",
            "end each conversation with the assistant's right answer",
        )
    return True


def _some(records: Sequence[Record]) -> str:
    named = ", ".join(record.where.rpartition(":")[2] for record in records[:5])
    return f"{len(records)} (line{'s' if len(records) > 1 else ''} {named}{', ...' if len(records) > 5 else ''})"


def free_numbers(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a summary says of open answers beside its headline: {headline, accuracies, means, empty, cut_off}."""
    n = len(lines)
    counts = {name: sum(line[name] for line in lines) for name in YES_NO}
    return {
        "headline": HEADLINE,
        "accuracies": {
            name: {"n": n, "correct": count, "accuracy": count / n, "interval": list(wilson(count, n))} for name, count in counts.items()
        },
        "means": {name: sum(line[name] for line in lines) / n for name in GRADED},
        "empty": sum(not line["raw"].strip() for line in lines),
        "cut_off": sum(line["finish"] == "length" for line in lines),
    }
