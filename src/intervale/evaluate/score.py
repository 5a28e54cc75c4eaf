"""From what a model said to the choice it meant, and whether that is right. Pure functions on text and numbers.

Every rule is deterministic and errs towards "nothing recognised": an answer that fits two choices, hedges between letters or
cannot be read counts as wrong, and the unread ones are counted. Nothing is drawn at random.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from intervale.evaluate.prompts import LETTERS

# The tutorial's training answers read "<choice>，图中的菜是<dish>". The dish is told, not asked for, and its name often contains
# another choice ("辣，图中的菜是酸辣粉" would also hit 酸), so what follows is not part of the answer.
_TAIL = re.compile(r"[，,]\s*图中的菜是")


def cut_tail(text: str) -> str:
    """The answer before the tutorial's "，图中的菜是"."""
    found = _TAIL.search(text)
    return text[: found.start()].rstrip() if found else text


def _kept(text: str) -> Iterator[tuple[str, bool]]:
    """(character, does it follow a dropped one or the start?) of a text in normal form."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    fresh = True
    for at, char in enumerate(folded):
        point = char == "." and folded[at - 1 : at].isdigit() and folded[at + 1 : at + 2].isdigit()  # 1.5 is not 15
        if not point and (char.isspace() or unicodedata.category(char)[0] in "PZC"):
            fresh = True
            continue
        yield char, fresh
        fresh = False


def normalise(text: str) -> str:
    """NFKC (full and half width are one), case folded, without white space, punctuation and control characters."""
    return "".join(char for char, _ in _kept(text))


def _letter(char: str) -> bool:
    return char.isalpha() and ord(char) < 0x250  # scripts that write with spaces: Latin


def _number(char: str) -> bool:
    return char.isdigit() or char == "."


def _occurrences(needle: str, text: str, fresh: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, end) of every place where `needle` stands, never inside a number (5 in 25) or late in a word (sweet in unsweet)."""
    start = text.find(needle) if needle else -1
    while start >= 0:
        end = start + len(needle)
        inside = start > 0 and not fresh[start] and any(kind(text[start - 1]) and kind(needle[0]) for kind in (_letter, _number))
        longer = end < len(text) and not fresh[end] and _number(needle[-1]) and _number(text[end])
        if not inside and not longer:
            yield start, end
        start = text.find(needle, start + 1)


def stands_in(needle: str, answer: str) -> bool:
    """Does `needle` stand in an answer as words of its own? Both normalised; never inside a longer number or Latin word."""
    kept = list(_kept(answer))
    text, fresh = "".join(char for char, _ in kept), [start for _, start in kept]
    wanted = normalise(needle)

    def goes_on(end: int) -> bool:
        return end < len(text) and not fresh[end] and _letter(text[end]) and _letter(wanted[-1])

    return any(not goes_on(end) for _, end in _occurrences(wanted, text, fresh))


def match_choice(answer: str, choices: Sequence[str]) -> int | None:
    """The choice that an open answer names: exactly one choice's text occurs in it, else None.

    Both are normalised. An occurrence inside an occurrence of a longer choice does not count (酸 in 酸辣). Two choices with
    the same text are always named together, so such an item cannot be right.
    """
    kept = list(_kept(cut_tail(answer)))
    text, fresh = "".join(char for char, _ in kept), [start for _, start in kept]
    places = [list(_occurrences(normalise(choice), text, fresh)) for choice in choices]
    spans = {span for own in places for span in own}

    def covered(span: tuple[int, int]) -> bool:
        return any(other[0] <= span[0] and span[1] <= other[1] and other != span for other in spans)

    named = [number for number, own in enumerate(places) if any(not covered(span) for span in own)]
    return named[0] if len(named) == 1 else None


_OPEN, _CLOSE = r"[(\[{【「『〈《<\"'*`]*", r"[)\]}】」』〉》>\"'*`]*"
# What may stand between "answer" and its letter. No 不/非/not: "the answer is not A" names nothing.
_FILLER = r"[^A-Za-z0-9不非没\n]{0,6}?"


def _patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """(lone letter, letter at the start, letter after a keyword, line that starts with a letter) for these letters.

    None takes longer than in proportion to the answer: some servers fill megabytes with blanks.
    """
    one = f"([{letters}])"
    # "A" and "I" are English words too: "Answer: A Sichuan dish" is no letter, "A because ..." is.
    word = r"(?![A-Za-z0-9])(?!\s+(?!because|since|as\b|for\b)[A-Za-z])" if set(letters) & {"A", "I"} else r"(?![A-Za-z0-9])"
    hedge = rf"(?!{_CLOSE}\s*(?:[,、/&]|或者?|和|与|or\b|and\b)\s*{_OPEN}[{letters}](?![A-Za-z]))"
    lone = re.compile(rf"^{_OPEN}([{letters}{letters.lower()}]){_CLOSE}+[.、,:;。!?]*+{_CLOSE}$")
    start = re.compile(rf"^{_OPEN}{one}{hedge}(?:[)\]}}】」』〉》>\"'*`]+|[.、,:;。!?]|\s*\n)")
    keyword = re.compile(
        rf"(?:(?<!不)(?<!别)选(?:择|项)?|答案|\b(?:[Aa]nswer|ANSWER|[Oo]ption|OPTION|[Cc]hoice))(?:应该|应当|应)?(?:\s+(?:is|would be|should be))?"
        rf"(?:\s+(?:option|choice))?{_FILLER}(?<![A-Za-z]){one}{word}{hedge}"
    )
    line = re.compile(rf"^[^\S\n]*{_OPEN}{one}{_CLOSE}\s*[.、:)]", re.MULTILINE)
    return lone, start, keyword, line


def parse_letter(answer: str, choices: Sequence[str]) -> int | None:
    """The choice that an answer to the lettered question names, strictly; None when it names none or more than one.

    In order: a lone letter (B, (b), 【B】。); exactly one choice's text and nothing else; a letter with its own choice (B 川菜); a
    letter set off at the start (B. because ...; B: ...); a letter after 答案, 选, answer, option. Full width counts as half width.
    Source: foodieqa.md B7, with its traps: "Answer: B" is B, "Based on ..." and "A Sichuan dish" are none, "A or B" is none.
    """
    letters = LETTERS[: len(choices)]
    lone, start, keyword, line = _patterns(letters)
    text = unicodedata.normalize("NFKC", cut_tail(answer)).strip()
    if found := lone.match(text):
        return letters.index(found[1].upper())
    plain = normalise(text)
    for told in (choices, [letter + choice for letter, choice in zip(letters, choices, strict=True)]):
        same = [number for number, choice in enumerate(told) if plain and normalise(choice) == plain]
        if len(same) == 1:
            return same[0]
    repeated = len(set(line.findall(text))) > 1  # the options said again, not one of them chosen
    if not repeated and (found := start.match(text)):
        return letters.index(found[1])
    return _said_after_keyword(keyword, text, letters)


def _said_after_keyword(keyword: re.Pattern[str], text: str, letters: str) -> int | None:
    said = set(keyword.findall(text))
    return letters.index(said.pop()) if len(said) == 1 else None


def parse_official(answer: str, choices: Sequence[str]) -> int | None:
    """The official FoodieQA rule: the first of the letters anywhere in the raw answer ("Answer: B" gives A), or None.

    Where none stands the official scorer draws one at random, unseeded, so its number cannot be reproduced; here it is wrong.
    """
    letters = LETTERS[: len(choices)]
    return next((letters.index(char) for char in answer if char in letters), None)


def most_likely(scores: Sequence[float]) -> int | None:
    """The index of the highest score; None on a tie for it."""
    best = max(scores)
    return scores.index(best) if list(scores).count(best) == 1 else None
