"""FoodieQA's published percentages as counts, with the intervals and p values our statistics give them: the tables of docs/evaluate.md.

python bench/foodieqa_published.py
"""

from intervale.evaluate.published import column, published
from intervale.evaluate.statistics import above_chance, detectable, mcnemar_bounds, wilson

PAIRS = (
    ("sivqa zh", "GPT-4o", "GPT-4V"),
    ("mivqa zh", "GPT-4o", "GPT-4V"),
    ("sivqa en", "Idefics2-8B", "Yi-VL-34B"),
    ("textqa zh", "Qwen2-7B-Instruct", "GPT-4"),
)
CHANCE = 0.25  # four options everywhere


def plain(p: float) -> str:
    return f"{p:.2g}"


def intervals() -> list[str]:
    lines = ["| | model | right | accuracy | 95% interval | p against guessing |", "|---|---|---|---|---|---|"]
    for name in published()["columns"]:
        for row in column(name):
            if row["correct"] is None:
                lines.append(f"| {name} | {row['who']} | – | {row['percent']:.2f}% | – | – |")
                continue
            low, high = row["interval"]
            chance = plain(above_chance(row["correct"], row["n"], CHANCE))
            lines.append(
                f"| {name} | {row['who']} | {row['correct']}/{row['n']} | {row['percent']:.2f}% | {low:.1%} – {high:.1%} | {chance} |"
            )
    return lines


def pairs() -> list[str]:
    lines = ["| | models | right | least p | largest p |", "|---|---|---|---|---|"]
    for name, first, second in PAIRS:
        rows = {row["who"]: row for row in column(name)}
        one, other = rows[first]["correct"], rows[second]["correct"]
        least, largest = mcnemar_bounds(one, other, rows[first]["n"])
        lines.append(f"| {name} | {first}, {second} | {one}, {other} of {rows[first]['n']} | {plain(least)} | {plain(largest)} |")
    return lines


def power() -> list[str]:
    lines = ["| items | interval at 50% | least difference found 4 times in 5: 16% change | 30% change |", "|---|---|---|---|"]
    for n in (40, 100, *sorted(published()["items"].values())):
        low, high = wilson(round(n / 2), n)
        found = [detectable(n, changed) for changed in (0.16, 0.30)]
        lines.append(
            f"| {n} | {low:.1%} – {high:.1%} | " + " | ".join("–" if net is None else f"{100 * net:.1f} points" for net in found) + " |"
        )
    return lines


if __name__ == "__main__":
    print("\n\n".join("\n".join(table()) for table in (intervals, pairs, power)))
