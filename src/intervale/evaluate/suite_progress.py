"""How far a suite is, and what it will still take: told after the first few answers, then every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from intervale.core.lang import say

_EVERY = 3.0  # seconds between two lines
_FIRST = 5  # answers after which the whole time is estimated for the first time


class Progress:
    """Counts answers. `left`: the keys that are to come, and how much work each is (pictures weigh more than words).

    `price` gives the cost of (prompt tokens, tokens) where it is known.
    """

    def __init__(self, total: int, left: dict[str, float], tell: Callable[[str], None], price: Callable[[int, int], float] | None) -> None:
        self._total, self._tell, self._price = total, tell, price
        self._done = self._before = total - len(left)
        self._left, self._work, self._all = left, 0.0, sum(left.values())
        self._began = time.monotonic()
        self._told = self._began
        self._estimated = False
        self._prompt = self._new = 0

    def step(self, answers: Sequence[dict[str, Any]]) -> None:
        """More answers, which came together: they took the time since the last ones."""
        if not answers:
            return
        self._done += len(answers)
        for answer in answers:
            self._work += self._left[answer["key"]]
            self._prompt += answer["prompt_tokens"] or 0
            self._new += answer["tokens"] or 0
        made, now = self._done - self._before, time.monotonic()
        left = (now - self._began) / self._work * (self._all - self._work)
        if not self._estimated and made >= _FIRST and self._done < self._total:
            self._estimated, self._told = True, now
            money = self._money(self._all / self._work)
            self._tell(say(f"by the first {made} answers, {_clock(left)} more{money[0]}",
                           f"按前 {made} 个回答估计，还需 {_clock(left)}{money[1]}"))  # fmt: skip
        elif self._estimated and (now - self._told >= _EVERY or self._done == self._total):
            self._told = now
            pace = made / max(now - self._began, 1e-9)
            self._tell(say(f"{self._done}/{self._total}  {pace:.2g} askings/s  ETA {_clock(left)}",
                           f"{self._done}/{self._total}  {pace:.2g} 次/秒  剩余 {_clock(left)}"))  # fmt: skip

    def _money(self, times: float) -> tuple[str, str]:
        """What the whole will use, as far as the first answers tell."""
        prompt, new = round(self._prompt * times), round(self._new * times)
        tokens = (f"; about {prompt:,} prompt and {new:,} new tokens in all", f"；总计约 {prompt:,} 个输入和 {new:,} 个输出 token")
        if self._price is None:
            return tokens
        price = f"{self._price(prompt, new):.2f}"
        return tokens[0] + f", price about {price}", tokens[1] + f"，费用约 {price}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
