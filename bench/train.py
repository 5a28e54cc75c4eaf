"""How much faster does `intervale train` make the same steps than a plain transformers + PEFT loop, in how much memory?

python bench/train.py [--preset internvl2-2b] [--device cuda] [--tiles 13] [--k 1] [--steps 12] [--warmup 4] [--rounds 1]
                      [--ablate] [--stock-both] [--set KEY=VALUE ...] [--curve N [--exact]] [--work DIR] [--out FILE]

Both sides make the same optimizer steps: same random base, same items in the same order, LoRA 128 on the language model and a projector
that learns, batch 4 x accumulation 2. Every variant runs in a process of its own, so peaks of memory are its own. See bench/README.md.
"""

import argparse
import datetime
import itertools
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_sides
from train_data import MOST_TILES, base_model, lengths_of, order_like, orders_of, set_keys, side_of, write_items

from intervale.core.records import read_records
from intervale.train.recipe import TrainRecipe

SEED, PER_STEP = 42, 8
# The trainer's devices: how to switch each on beyond its default, and off. Of several spellings the first that the recipe knows counts.
SHARED: list[dict[str, Any]] = [{"train.share_prefix": "on"}, {"train.share_prefix": True}]
OFF: dict[str, list[dict[str, Any]]] = {
    "one item a pack": [{"train.pack_tokens": 1}],
    "LoRA not fused": [{"train.fused_lora": "off"}],
    "sharing off": [{"train.share_prefix": "off"}, {"train.share_prefix": False}],
    "features live": [{"train.features": "live"}, {"train.features": "off"}],
    "compile off": [{"train.compile": "off"}, {"train.compile": False}],
    "one item a pack, recomputed": [{"train.pack_tokens": 1, "train.checkpointing": "on"}],
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="internvl2-2b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiles", type=int, default=13, choices=(1, 5, 13), help="tiles a picture")
    parser.add_argument("--k", type=int, default=1, choices=(1, 4), help="questions a picture")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--warmup", type=int, help="steps before them; they are an epoch (default 4; 1 on a CPU)")
    parser.add_argument("--rounds", type=int, default=1, help="how often ours and stock run, in turns")
    parser.add_argument("--ablate", action="store_true", help="also ours with each of its devices off in turn")
    parser.add_argument("--only", action="append", metavar="TEXT", help="of those only what has TEXT in its name")
    parser.add_argument("--shared-only", action="store_true", help="with --k 4: leave the run without sharing out")
    parser.add_argument("--stock-both", action="store_true", help="also stock without gradient checkpointing")
    parser.add_argument("--curve", type=int, metavar="N", help="compare the losses of N steps instead, without dropout")
    parser.add_argument("--exact", action="store_true", help="with --curve: also stock in float32, recomputing; whose losses are nearer?")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--targets", default="llm", help="where LoRA goes: llm or llm+head")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--workers", type=int, default=8, help="data.workers of ours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key for every variant of ours")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all; what would begin later is left out")
    parser.add_argument("--work", type=Path, help="a folder to work in and to keep the base model in (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="where the JSON goes too; rewritten after every variant")
    given = parser.parse_args()
    if given.exact and not given.curve:
        parser.error("--exact belongs to --curve N: it is the float32 run that the curves are held against")
    if given.warmup is None:
        given.warmup = 4 if given.device == "cuda" else 1
    given.precision = given.precision or ("bf16" if given.device == "cuda" else "fp32")
    if given.curve:
        given.dropout = 0.0
    return given


class Bench:
    """One case: its data, its variants' results, and the time that is left."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work, self.until = given, work, time.monotonic() + given.budget
        self.base = base_model(work, given.preset)
        self.side = side_of(self.base)
        self.total = given.curve or given.warmup + given.steps
        items = 64 if given.curve and given.device == "cuda" else given.warmup * PER_STEP
        name = f"data-{given.tiles}-{given.k}-{time.time_ns()}"
        self.data = write_items(work / name, self.side.tiling, given.tiles, given.k, items)
        self.lengths = lengths_of(read_records(self.data), self.side)
        self.orders = orders_of(self.data, PER_STEP, SEED, self.total)
        self.order = "plain"
        self.results: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.machine: dict[str, Any] = {}
        self.left_out: list[str] = []

    def note(self, text: str) -> None:
        """Print a remark and keep it for the JSON."""
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def recipe(self, extra: dict[str, Any], name: str) -> dict[str, Any]:
        """The recipe of ours as plain values."""
        given = self.given
        recipe: dict[str, Any] = {
            "model": str(self.base),
            "out": str(self.work / f"run-{name}-{time.time_ns()}"),
            "data": {"train": str(self.data), "max_tiles": MOST_TILES, "min_tiles": 1, "workers": given.workers},
            "lora": {"rank": given.rank, "alpha": 2.0 * given.rank, "dropout": given.dropout, "targets": given.targets},
            "train": {
                "epochs": -(-self.total // max(1, len(self.lengths) // PER_STEP)),
                "max_steps": self.total,
                "batch_size": 4,
                "accumulation": 2,
                "learning_rate": given.learning_rate,
                "precision": given.precision,
                "compile": "on" if given.device == "cuda" else "off",  # what `auto` decides for a run of minutes; these are a few steps
                "seed": SEED,
                "save_steps": self.total,
            },
        }
        recipe, self.left_out = set_keys(recipe, given.set)
        for key, value in extra.items():
            section, _, last = key.partition(".")
            recipe[section][last] = value
        return recipe

    def stock_spec(self, name: str, checkpointing: bool, batch_size: int = 4) -> dict[str, Any]:
        """The same for stock."""
        given = self.given
        learning = {"learning_rate": given.learning_rate, "warmup_ratio": 0.03, "weight_decay": 0.05, "max_norm": 1.0, "seed": SEED}
        lora = {"rank": given.rank, "alpha": 2 * given.rank, "dropout": given.dropout, "targets": given.targets}
        where = {"base": str(self.base), "data": str(self.data), "order": self.orders[self.order], "device": given.device}
        how = {"checkpointing": checkpointing, "batch_size": batch_size, "precision": given.precision}
        return {"side": "stock", "name": name} | how | learning | lora | where

    def run(self, label: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Run a variant in its process, take its numbers, print its row."""
        left = self.until - time.monotonic()
        if left < 20:
            self.note(f"{label}: left out, the budget of {self.given.budget:.0f} s is spent")
            return {"variant": label, "error": "no time left"}
        found = train_sides.run_child(spec, self.work, left)
        if spec["side"] == "ours" and "lines" in found:
            seen = [line["targets"] for line in found["lines"] if "loss" in line]
            order = order_like(self.orders, self.lengths, seen)
            if order is None:
                self.note(f"{label}: its steps do not hold the items of any order this script knows; compare speed only")
            found["order"] = order
        row = {"variant": label, "side": spec["side"]} | numbers(found, self.given.warmup if not self.given.curve else 0)
        self.machine = self.machine or {key: found[key] for key in ("device", "cuda", "threads", "versions") if key in found}
        self.results.append(row)
        print(line_of(row, self.results), flush=True)
        if "error" in row:
            print("    " + "\n    ".join(found.get("log", [])), flush=True)
        self.save()
        return row

    def ours(self, label: str, extra: dict[str, Any]) -> dict[str, Any]:
        """A variant of ours."""
        name = label.replace(" ", "-").replace(",", "")
        recipe = self.recipe(extra, name)
        row = self.run(label, {"side": "ours", "name": name, "recipe": recipe, "device": self.given.device})
        shutil.rmtree(recipe["out"], ignore_errors=True)
        return row

    def known(self, ways: list[dict[str, Any]], label: str, more: dict[str, Any]) -> dict[str, Any] | None:
        """The first of some spellings of a setting that the present recipe accepts together with `more`, or None and a note."""
        for way in ways:
            try:
                TrainRecipe.model_validate(self.recipe(more | way, "check"), strict=True)
            except ValueError:
                continue
            return more | way
        self.note(f"{label}: left out, this trainer's recipe has no {next(iter(ways[0]))}")
        return None

    def report(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        given = self.given
        prompt, answer = (statistics.mean(length[at] for length in self.lengths) for at in (0, 1))
        case = {
            key: getattr(given, key) for key in ("preset", "tiles", "k", "steps", "warmup", "rank", "targets", "dropout", "set", "curve")
        }
        case |= {"items": len(self.lengths), "prompt_tokens": round(prompt, 1), "answer_tokens": round(answer, 1)}
        head = {"bench": "train", "date": datetime.date.today().isoformat(), **self.machine, "case": case}
        return head | {"variants": self.results, "notes": self.notes}

    def save(self, more: dict[str, Any] | None = None) -> None:
        """Rewrite --out."""
        if self.given.out:
            self.given.out.parent.mkdir(parents=True, exist_ok=True)
            self.given.out.write_text(json.dumps(self.report() | (more or {}), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def numbers(found: dict[str, Any], warmup: int) -> dict[str, Any]:
    """A variant's numbers: rates from the time between the ends of two steps, as seen from outside for ours."""
    if "error" in found:
        return {"error": found["error"], "process_s": round(found["process_s"], 1)}
    lines = [line for line in found["lines"] if "loss" in line]
    seen = zip(found["line_times"], found["lines"], strict=False)  # other lines, such as a held-out loss, stand between
    times = found.get("own_times") or [at for at, line in seen if "loss" in line]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)][max(warmup - 1, 0) :]
    steps = [line["seconds"] for line in lines][warmup:]
    samples = statistics.mean(line["samples"] for line in lines[warmup:])
    told = [round(at - found["begun"], 2) for at, _ in found.get("told", [])]
    row = {
        "samples_s": round(samples / statistics.median(gaps), 3),
        "samples_s_mean": round(samples * len(gaps) / sum(gaps), 3),
        "step_s": round(statistics.median(gaps), 4),
        "step_s_least": round(min(gaps), 4),
        "step_s_most": round(max(gaps), 4),
        "step_s_inside": round(statistics.median(steps), 4),
        "first_step_s": round(times[0] - found["begun"], 2),
        "peak_gib": found["peak_gib"],
        "process_s": round(found["process_s"], 1),
        "losses": [line["loss"] for line in lines],
        "first_gradient_norm": lines[0]["gradient_norm"],
        "seconds": [round(line["seconds"], 4) for line in lines],
    }
    more = {key: found[key] for key in ("reserved_gib", "attention", "order") if key in found}
    return row | more | ({"told": list(zip(told, [text for _, text in found["told"]], strict=True))} if told else {})


def stock_rate(rows: list[dict[str, Any]]) -> float | None:
    """The median rate of stock with checkpointing so far."""
    rates = [row["samples_s"] for row in rows if row["variant"] == "stock" and "samples_s" in row]
    return statistics.median(rates) if rates else None


HEAD = f"{'variant':26} {'samples/s':>9} {'step s':>8} {'least':>7} {'most':>7} {'inside':>7} {'GiB':>6} {'held':>6} {'1st step':>8} {'x stock':>7}"


def line_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['variant']:26} {row['error']}"
    rate = stock_rate(rows)
    ratio = f"{row['samples_s'] / rate:6.2f}x" if rate else "      -"
    return (
        f"{row['variant']:26} {row['samples_s']:9.2f} {row['step_s']:8.3f} {row['step_s_least']:7.3f} {row['step_s_most']:7.3f} "
        f"{row['step_s_inside']:7.3f} {row['peak_gib']:6.1f} {row.get('reserved_gib', 0):6.1f} {row['first_step_s']:8.1f} {ratio}"
    )


def compare_speed(bench: Bench) -> dict[str, Any]:
    """Ours and stock in turns, then what was asked for beside them; returns what to add to the JSON."""
    given = bench.given
    print(HEAD, flush=True)
    shared = bench.known(SHARED, "ours, shared", {}) if given.k > 1 else None
    best = ("ours, shared", shared) if shared else ("ours", {})
    for _ in range(given.rounds):
        ran = [] if shared and given.shared_only else [bench.ours("ours", {})]
        if shared:
            ran.append(bench.ours(*best))
        bench.order = next((row["order"] for row in reversed(ran) if row.get("order")), bench.order)
        bench.run("stock", bench.stock_spec("stock", True))
    if given.stock_both:
        bench.run("stock, no recompute", bench.stock_spec("stock-all", False))
    if given.ablate:
        for label, ways in OFF.items():
            if (label == "sharing off" and given.k == 1) or (given.only and not any(text in label for text in given.only)):
                continue
            more = dict(best[1])
            if label == "one item a pack" and shared:  # sharing lives in a pack
                more = bench.known(OFF["sharing off"], label, {}) or {}
            chosen = bench.known(ways, label, more)
            if chosen is not None:
                bench.ours(f"{best[0]}, {label}", chosen)
    print("\n" + HEAD)
    for row in bench.results:
        print(line_of(row, bench.results))
    rows = {row["variant"]: row for row in bench.results if "losses" in row}
    summary: dict[str, Any] = {}
    if "stock" in rows:
        rates = {name: [row["samples_s"] for row in bench.results if row["variant"] == name and "losses" in row] for name in rows}
        medians = {name: statistics.median(found) for name, found in rates.items()}
        summary["ratios"] = {name: round(rate / medians["stock"], 3) for name, rate in medians.items()}
        first = rows["stock"]["losses"][0]
        same = {name: abs(row["losses"][0] - first) for name, row in rows.items() if row.get("order") == bench.order}
        summary["first_loss_difference"] = same
        for name, difference in same.items():
            print(f"loss of the first step, {name} against stock: {difference:.2e} apart (of {first:.4f})")
    return summary


def compare_curves(bench: Bench) -> dict[str, Any]:
    """The losses of ours and of stock step by step, and two measures of bfloat16's noise: stock with its micro-batches cut otherwise (the
    same rounding in another order), and with --exact how far stock is from itself in float32 (what rounding changes in the learning)."""
    print(HEAD, flush=True)
    mine = bench.ours("ours", {})
    if mine.get("order") is None:
        raise SystemExit("the curves cannot be compared: ours failed, or took its items in an order this script does not know")
    bench.order = mine["order"]
    rows = {"ours": mine, "stock": bench.run("stock", bench.stock_spec("stock", False))}
    if "losses" not in rows["stock"]:
        raise SystemExit("the curves cannot be compared: stock failed")
    if bench.given.exact:
        limited = {"precision": "fp32", "seconds": bench.until - time.monotonic() - 10}  # what it has made by then is compared
        rows["float32"] = bench.run("stock, float32", bench.stock_spec("stock-float32", True) | limited)
    rows["stock_2x4"] = bench.run("stock, 2 x 4", bench.stock_spec("stock-2x4", False, batch_size=2))
    rows = {name: row for name, row in rows.items() if "losses" in row}
    summary: dict[str, Any] = {"curves": {name: row["losses"] for name, row in rows.items()}}
    for reference in ("stock", "float32"):
        for name in rows if reference in rows else ():
            if name != reference and (name, reference) != ("float32", "stock"):
                summary[f"{name} against {reference}"] = apart(name, rows[name], reference, rows[reference])
    if bench.given.out:
        draw_curves(bench.given.out.with_suffix(".png"), summary["curves"])
    return summary


def apart(name: str, one: dict[str, Any], reference: str, other: dict[str, Any]) -> dict[str, float]:
    """How far a variant's losses are from another's; `mean_signed` tells a lag from noise."""
    differences = [a - b for a, b in zip(one["losses"], other["losses"], strict=False)]  # the float32 run may have had time for fewer
    sizes = [abs(difference) for difference in differences]
    norms = abs(one["first_gradient_norm"] / other["first_gradient_norm"] - 1)
    means = {"mean": statistics.mean(sizes), "mean_signed": statistics.mean(differences)}
    found = {"steps": len(sizes), "max": max(sizes), **means, "first": sizes[0]}
    print(f"{name} against {reference}, {len(sizes)} steps: max |d| {found['max']:.2e}, mean |d| {found['mean']:.2e}, ", end="")
    print(f"mean d {found['mean_signed']:+.2e}, first step {sizes[0]:.2e}; first gradient norm {norms:.2e} apart (relative)")
    return found | {"first_gradient_norm_relative": norms}


def draw_curves(path: Path, curves: dict[str, list[float]]) -> None:
    """Losses above; below, differences from stock in float32, or from stock."""
    from matplotlib.figure import Figure

    reference = "float32" if "float32" in curves else "stock"
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, (name, losses) in enumerate(curves.items()):
        steps, style = range(1, len(losses) + 1), {"color": f"C{number}", "linewidth": 1, "linestyle": "--" if name == "ours" else "-"}
        above.plot(steps, losses, label=name, zorder=3 if name == "ours" else 2, **style)
        if name != reference:
            sizes = [max(abs(a - b), 1e-9) for a, b in zip(losses, curves[reference], strict=False)]
            below.plot(steps[: len(sizes)], sizes, label=f"|{name} - {reference}|", **style)
    above.set_ylabel("loss of a step")
    below.set(xlabel="optimizer step", ylabel="difference", yscale="log")
    above.legend()
    below.legend()
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


def main() -> None:
    """Run the case; the last line printed is its JSON."""
    given = options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that a child is ended too
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(given, (given.work or Path(temporary)).resolve())
        case = bench.report()["case"]
        print(
            f"{given.preset} on {given.device}: {given.tiles} tiles a picture, {given.k} questions a picture, {case['items']} items, ",
            end="",
        )
        print(f"{case['prompt_tokens']} + {case['answer_tokens']} text tokens, {bench.total} steps of {PER_STEP}", flush=True)
        bench.recipe({}, "check")
        for text in bench.left_out:
            bench.note(text)
        summary = (compare_curves if given.curve else compare_speed)(bench)
        bench.save(summary)
        shutil.rmtree(bench.data.parent, ignore_errors=True)
        compact = [{k: v for k, v in row.items() if k not in ("told", "seconds")} for row in bench.results]
        print(json.dumps(bench.report() | {"variants": compact} | summary, ensure_ascii=False))


if __name__ == "__main__":
    main()
