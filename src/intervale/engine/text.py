"""Tokens to pieces of text as they come: no half characters, and nothing of a stop text.

Promises: the pieces add up to the text of all tokens up to the stop. A piece is given for every token, empty where it has to wait for the
next one, so that whoever reads can leave within a token. Cost: the answer so far is decoded anew for each token, which for a
thousand tokens is a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the decoder gives for half of a character


def spoken(
    tokens: Iterator[int], decode: Callable[[list[int]], str], stop_ids: Collection[int], stop_texts: Sequence[str] = ()
) -> Iterator[tuple[str, int, str]]:
    """(piece, tokens so far, finish) a token; the last one's finish is 'stop' or 'length'."""
    ids: list[int] = []
    told = 0
    for token in tokens:
        ids.append(token)
        if token in stop_ids:
            ids.pop()
            yield decode(ids)[told:], len(ids) + 1, "stop"
            return
        text = decode(ids)
        ends = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
        if ends:
            yield text[told : min(ends)], len(ids), "stop"
            return
        ready = len(text) - _held(text, stop_texts)
        if text.endswith(_INCOMPLETE) or ready <= told:
            yield "", len(ids), ""
        else:
            yield text[told:ready], len(ids), ""
            told = ready
    yield decode(ids)[told:], len(ids), "length"


def _held(text: str, stop_texts: Sequence[str]) -> int:
    """How many letters at the end of the text may be the beginning of a stop text."""
    most = 0
    for stop in stop_texts:
        for length in range(min(len(stop) - 1, len(text)), most, -1):
            if text.endswith(stop[:length]):
                most = length
                break
    return most
