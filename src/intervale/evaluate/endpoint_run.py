"""A data set asked of an endpoint: the folder, lines and summary that `evaluate.run` leaves for a model in this process.

Promises: as there, an evaluation that was stopped goes on and ends with the same summary (but for its times); likelihood needs
lettered questions and the server's log-probabilities, and is refused otherwise. Cost: a request an item.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intervale.core.errors import UserError
from intervale.core.files import locked, write_json
from intervale.core.lang import say
from intervale.core.records import Record, data_digest, read_records
from intervale.core.runlog import versions
from intervale.engine.api import Request, Sampling
from intervale.engine.whole import Ask, Whole, ask_all
from intervale.evaluate.ask import refuse_unscorable
from intervale.evaluate.endpoint import TOP, EndpointAsker, letter_scores, line_of, once_answered, turns_of
from intervale.evaluate.folder import SUMMARY, append_prediction, begin, in_order, open_folder, read_evaluation, read_predictions
from intervale.evaluate.free import HEADLINE, score_free
from intervale.evaluate.identity import picture_keys, pictures_digest, refuse_changed
from intervale.evaluate.prompts import messages_for
from intervale.evaluate.provenance import about
from intervale.evaluate.run import picture_sizes, refuse_modes, summarise
from intervale.evaluate.score import cut_tail, match_choice, most_likely, parse_letter, parse_official
from intervale.evaluate.suite_folder import used
from intervale.evaluate.suite_progress import Progress

Tell = Callable[[str], None]


@dataclass(frozen=True)
class EndpointPlan:
    """A checked evaluation at an endpoint."""

    asker: EndpointAsker
    data: Path
    records: tuple[Record, ...]
    prompt: str
    mode: str
    out: Path
    free: bool
    pictures: tuple[tuple[str, ...], ...]  # digests of each record's

    def protocol(self) -> dict[str, Any]:
        """How every item is asked and scored: the keys of a local evaluation, and what is the endpoint's own."""
        own = {key: value for key, value in self.asker.protocol().items() if key not in ("max_new_tokens", "max_tiles")}
        likely = self.mode == "likelihood"
        new = None if likely else self.asker.max_new_tokens
        headline = "sum" if likely else HEADLINE if self.free else None
        return {
            "prompt": self.prompt,
            "mode": self.mode,
            "max_new_tokens": new,
            "max_tiles": None,
            "headline": headline,
            **own,
        }

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one."""
        return {
            "protocol": self.protocol(),
            "model": self.asker.identity(),
            "data": {"items": len(self.records), "digest": data_digest(self.records), "pictures": pictures_digest(self.pictures)},
        }


def plan_endpoint(asker: EndpointAsker, data: Path, out: Path, *, prompt: str, mode: str, limit: int | None = None) -> EndpointPlan:
    """Check what can be checked before anything is asked. Raises: UserError as `run.plan` does; for likelihood of open answers."""
    refuse_modes(prompt, mode)
    if mode == "likelihood" and prompt == "open":
        raise UserError(
            "an endpoint gives log-probabilities of what it says, not of a text it is given, so the open prompt's choices cannot be scored",
            "add --prompt mcq, or use --mode strict",
        )
    records = read_records(data)[:limit]
    free = refuse_unscorable(records, str(data), prompt, mode)
    picture_sizes(records)
    asker = replace(asker, text=mode != "likelihood", letters=mode == "likelihood")
    return EndpointPlan(asker, data, tuple(records), prompt, mode, out, free, picture_keys(records))


def evaluate_endpoint(job: EndpointPlan, *, fresh: bool, tell: Tell, on_answer: Callable[[], None] | None = None) -> dict[str, Any]:
    """Ask what is not answered yet, write DIR/summary.json, return it. A finished folder is only read."""
    with locked(job.out):
        identity = job.identity()
        state = open_folder(job.out, identity, fresh, tell)
        if state == "done":
            tell(say(f"{job.out}: already evaluated; --fresh would start over", f"{job.out}：已评测过；--fresh 可重新开始"))
            return read_evaluation(job.out)[0]
        done = {line["id"] for line in read_predictions(job.out)}
        if done:
            tell(
                say(f"continuing: {len(done)} of {len(job.records)} items are done", f"继续：{len(job.records)} 条中已完成 {len(done)} 条")
            )
        if len(done) < len(job.records):
            _ask_rest(job, identity, state, done, tell, on_answer)
        refuse_changed(job.records, job.pictures)
        lines = in_order(job.out, [record.id for record in job.records])
        summary = summarise([line | {"tokens": line["tokens"] or 0} for line in lines]) | {
            "refused": sum("refused" in line for line in lines),
            "used": used(lines, job.asker.price),
            "protocol": identity["protocol"],
            "model": job.asker.about(),
            "data": {"file": str(job.data.resolve()), **identity["data"]},
            **about(job.asker.folder, job.data, job.records, identity["data"], tell),
            "versions": versions(),
        }
        if job.mode == "likelihood":
            unseen = sum(line["scores"] is None for line in lines)
            summary |= {"unseen": unseen, "ties": summary["ties"] - unseen}
        write_json(job.out / SUMMARY, summary)
        return summary


def _ask_rest(
    job: EndpointPlan, identity: dict[str, Any], state: str, done: set[str], tell: Tell, on_answer: Callable[[], None] | None
) -> None:
    left = {record.id: record for record in job.records if record.id not in done}
    keys = {record.id: list(own) for record, own in zip(job.records, job.pictures, strict=True)}
    top = TOP if job.mode == "likelihood" else 0
    asks = [Ask(name, functools.partial(_request, job, record), top) for name, record in left.items()]
    price = None if job.asker.prices is None else lambda prompt, new: job.asker.price(prompt, new) or 0.0
    progress = Progress(len(job.records), {record.id: 1.0 + len(record.images) for record in left.values()}, tell, price)
    try:
        with closing(once_answered(ask_all(job.asker.server, asks), bool(done))) as answered:
            for together in answered:
                if state == "new":
                    begin(job.out, identity)
                    state = "resume"
                lines = []
                for name, told in together:
                    first = told.first if isinstance(told, Whole) else None
                    line = line_of(told)
                    append_prediction(job.out, _scored(job, left[name], line, first) | {"pictures": keys[name]})
                    lines.append({"key": name, **line})
                    done.add(name)
                    if on_answer:
                        on_answer()
                progress.step(lines)
    except (KeyboardInterrupt, UserError):
        if done:
            tell(say(f"stopped after {len(done)} of {len(job.records)} items; the same command continues",
                     f"已停止：完成 {len(done)} / {len(job.records)} 条；再次运行同一命令即可继续"))  # fmt: skip
        raise


def _request(job: EndpointPlan, record: Record) -> Request:
    new = 1 if job.mode == "likelihood" else job.asker.max_new_tokens
    return Request(turns_of(messages_for(record, job.prompt), record), Sampling(max_new_tokens=new))


def _scored(job: EndpointPlan, record: Record, line: dict[str, Any], first: tuple[tuple[str, float], ...] | None) -> dict[str, Any]:
    """The line of predictions.jsonl."""
    told: dict[str, Any] = {}
    if job.mode == "likelihood":
        scores = letter_scores(first, len(record.choices)) if first else None
        parsed = most_likely(scores) if scores else None
        told = {"scores": [{"sum": value, "mean": value, "tokens": 1} for value in scores] if scores else None, "parsed_mean": parsed}
    elif job.free:
        told, parsed = {"reference": cut_tail(record.reference()), **score_free(line["raw"], record.reference())}, None
    elif job.prompt == "open":
        parsed = match_choice(line["raw"], record.choices)
    else:
        parsed = (parse_official if job.mode == "official" else parse_letter)(line["raw"], record.choices)
    return {
        "id": record.id,
        "question": record.question(),
        "images": list(record.images),
        "choices": list(record.choices),
        "answer": record.answer,
        "prompt": job.prompt,
        "mode": job.mode,
        **line,
        **told,
        "parsed": parsed,
        "correct": told[HEADLINE] if job.free else parsed == record.answer,
        "tags": record.tags,
    }
