"""An engine for tests of what stands around it: it says the last text back, letter by letter."""

import time
from collections.abc import Iterator

from intervale.engine.api import Delta, Request


class Speaker:
    """`fault`: raised (as a bug would be) after `after` letters; `slow`: a little time passes at each."""

    def __init__(self, fault: str = "", after: int = 0, slow: bool = False) -> None:
        self.fault, self.after, self.slow = fault, after, slow

    def stream(self, request: Request) -> Iterator[Delta]:
        text = "".join(part for part in request.turns[-1].parts if isinstance(part, str))
        for number, letter in enumerate(text, 1):
            if self.fault and number > self.after:
                raise ZeroDivisionError(self.fault)
            if self.slow:
                time.sleep(0.2)
            yield Delta(letter, number, "stop" if number == len(text) else "", 5)
