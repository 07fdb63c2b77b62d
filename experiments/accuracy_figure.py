"""Table and figure of what ``accuracy_vs_traffic.py`` has measured so far.

python experiments/accuracy_figure.py [--rows=FILE.jsonl] [--out=FILE.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Group = tuple[int, int, int, str]  # width, nodes, times less, method
WITHOUT_BUDGET = ("dense", "none")


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for r in rows:
        groups.setdefault((r["width"], r["nodes"], r["times_less"], r["method"]), []).append(r)
    return groups


def dense(rows: Iterable[Row]) -> dict[tuple[int, int], float]:
    """Accuracy of the dense split by (width, seed): the number of nodes does not change it."""
    return {(r["width"], r["seed"]): r["test"] for r in rows if r["method"] == "dense"}


def summary(found: list[Row]) -> tuple[float, float, float]:
    """Mean and standard deviation of the accuracy, mean traffic."""
    tests = np.array([r["test"] for r in found])
    spread = tests.std(ddof=1) if len(tests) > 1 else np.nan
    return tests.mean(), spread, np.mean([r["traffic"] for r in found])


def show(rows: list[Row]) -> None:
    """One line for every method and budget; ``to dense`` compares runs of the same seed."""
    right = dense(rows)
    for (width, nodes, times, method), found in sorted(grouped(rows).items()):
        mean, spread, traffic = summary(found)
        gaps = [r["test"] - right.get((width, r["seed"]), np.nan) for r in found]
        validation = np.mean([r["validation"] for r in found])
        less = found[0]["dense_traffic"] / max(traffic, 1)
        budget = "  -" if method in WITHOUT_BUDGET else f"{times:2d}x"
        print(
            f"width {width:2d}, {nodes} nodes, {budget} ({less:6.2f}) {method:24s} test "
            f"{mean:.2f} ± {spread:.2f} ({len(found)} seeds), to dense {np.mean(gaps):+.2f}, "
            f"validation {validation:.2f}"
        )


def draw(rows: list[Row], path: Path, shown: list[str]) -> None:
    """Accuracy against bytes: a panel for each width and number of nodes."""
    groups = grouped(rows)
    panels = sorted({(width, nodes) for width, nodes, _, _ in groups})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 4.2 * len(panels), 3.8), squeeze=False, sharey="row"
    )
    for axis, (width, nodes) in zip(axes[0], panels, strict=True):
        mine = {k: v for k, v in groups.items() if k[:2] == (width, nodes)}
        for i, method in enumerate(shown):
            points = sorted(
                (summary(v)[2] / 1e3, *summary(v)[:2]) for k, v in mine.items() if k[3] == method
            )
            if not points:
                continue
            kilobytes, mean, spread = map(np.array, zip(*points, strict=True))
            spread = np.nan_to_num(spread)
            if method in WITHOUT_BUDGET:
                colour = "black" if method == "dense" else "grey"
                axis.axhline(mean[0], color=colour, linestyle="--", linewidth=1)
                axis.annotate(method, (1, mean[0]), xycoords=("axes fraction", "data"), fontsize=8)
            else:
                axis.errorbar(
                    kilobytes, mean, spread, marker="o", capsize=3, color=f"C{i}", label=method
                )
        axis.set_xscale("log")
        axis.set_xlabel("traffic, kB per image")
        axis.set_title(f"ResNet-20, width {width}, {nodes} nodes", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "accuracy_vs_traffic.jsonl")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--methods", nargs="+", default=["dense", "none", "random", "uniform l2", "all", "best"]
    )
    args = parser.parse_args()
    rows = read(args.rows)
    show(rows)
    if args.out:
        draw(rows, args.out, args.methods)


if __name__ == "__main__":
    main()
