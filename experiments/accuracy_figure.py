"""Table and figure of what ``accuracy_vs_traffic.py`` has measured so far.

python experiments/accuracy_figure.py [--rows=FILE.jsonl] [--out=FILE.png]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Group = tuple[str, int, int, int, str]  # model, width, nodes, times less, method
SEEDS = 3  # fewer are no claim
DASHED = {
    "dense": {"color": "black", "linestyle": "--", "label": "dense split"},
    "none": {"color": "grey", "linestyle": "--", "label": "nodes never talk"},
}
NAMES = {
    "uniform l2": "magnitude (plain DISCO)",
    "all": "assignment, cost, distillation",
    "int8": "magnitude, int8",
    "best": "assignment, cost, distillation, int8",
    "planned": "planned, int4",
    "in training": "assignment, cost, int8 in training",
    "rows early": "early layers by rows, late ones int8",
    "rows early, exact": "early layers by rows, float16, no training",
    "rows": "all layers by rows",
}
WITHOUT_BUDGET = ("dense", "none")
NAMED = {
    "resnet20": "ResNet-20",
    "vit_micro": "ViT",
    "deeplab": "DeepLabV3",
    "ssd": "SSD",
    "edsr": "EDSR",
}
METRICS = {"deeplab": "mIoU, %", "ssd": "mAP, %", "edsr": "PSNR, dB"}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for r in rows:
        group = (model(r), r["width"], r["nodes"], r["times_less"], r["method"])
        groups.setdefault(group, []).append(r)
    return groups


def model(row: Row) -> str:
    return row.get("model", "resnet20")


def dense(rows: Iterable[Row]) -> dict[tuple[str, int, int], float]:
    """Accuracy of the dense split by (model, width, seed): nodes do not change it."""
    return {(model(r), r["width"], r["seed"]): r["test"] for r in rows if r["method"] == "dense"}


def summary(found: list[Row]) -> tuple[float, float, float]:
    """Mean and standard deviation of the accuracy, mean traffic."""
    tests = np.array([r["test"] for r in found])
    spread = tests.std(ddof=1) if len(tests) > 1 else np.nan
    return tests.mean(), spread, np.mean([r["traffic"] for r in found])


def show(rows: list[Row]) -> None:
    """One line for every method and budget; ``to dense`` compares runs of the same seed."""
    right = dense(rows)
    for (name, width, nodes, times, method), found in sorted(grouped(rows).items()):
        mean, spread, traffic = summary(found)
        gaps = [r["test"] - right.get((name, width, r["seed"]), np.nan) for r in found]
        validation = np.mean([r["validation"] for r in found])
        less = found[0]["dense_traffic"] / max(traffic, 1)
        budget = "  -" if method in WITHOUT_BUDGET else f"{times:2d}x"
        print(
            f"{NAMED[name]}, width {width}, {nodes} nodes, {budget} ({less:6.2f}) {method:24s} "
            f"test {mean:.2f} ± {spread:.2f} ({len(found)} seeds), to dense {np.mean(gaps):+.2f}, "
            f"validation {validation:.2f}"
        )


def draw(rows: list[Row], path: Path, shown: list[str]) -> None:
    """Accuracy against bytes, where there are enough seeds: a panel for each width and nodes."""
    groups = {k: v for k, v in grouped(rows).items() if len(v) >= SEEDS and k[-1] in shown}
    panels = sorted({group[:3] for group in groups})
    if not panels:
        raise SystemExit(f"no method has {SEEDS} seeds yet: there is nothing to draw")
    high = math.ceil(len(panels) / 4)
    wide = math.ceil(len(panels) / high)
    figure, axes = plt.subplots(high, wide, figsize=(4 * wide, 3.4 * high + 0.7), squeeze=False)
    axes = axes.flat
    for spare in axes[len(panels) :]:
        spare.remove()
    for axis, (name, width, nodes) in zip(axes, panels, strict=False):
        mine = {k[3:]: v for k, v in groups.items() if k[:3] == (name, width, nodes)}
        draw_panel(axis, mine, shown)
        right = np.mean([v for k, v in dense(rows).items() if k[:2] == (name, width)])
        axis.axhline(right, **DASHED["dense"])
        most = max(found[0]["dense_traffic"] for found in mine.values())
        axis.plot(most / 1e3, right, "*", color="black", markersize=10)
        axis.set_title(f"{NAMED[name]}, width {width}, {nodes} nodes", fontsize=10)
        axis.set_ylabel(f"test {METRICS.get(name, 'accuracy, %')}")
    lines = {
        label: line
        for a in figure.axes
        for line, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines, loc="lower center", ncols=4, fontsize=9)
    figure.tight_layout(rect=(0, 0.14 / high, 1, 1))
    figure.savefig(path, dpi=150)


def draw_panel(axis: Any, groups: dict[tuple[int, str], list[Row]], shown: list[str]) -> None:
    """One line for each method, and its points for each budget."""
    for i, method in enumerate(shown):
        found = [summary(v) for (_, name), v in groups.items() if name == method]
        if not found:
            continue
        mean, spread, traffic = np.array(sorted(found, key=lambda point: point[2])).T
        if method == "none":
            axis.axhline(mean[0], **DASHED[method])
        else:
            style = {"marker": "o", "capsize": 3, "color": f"C{i}"}
            axis.errorbar(traffic / 1e3, mean, spread, label=NAMES.get(method, method), **style)
    axis.set(xscale="log", xlabel="traffic, kB per image")
    axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "accuracy_vs_traffic.jsonl")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", nargs="+", default=["none", "random", *NAMES])
    args = parser.parse_args()
    rows = read(args.rows)
    show(rows)
    if args.out:
        draw(rows, args.out, args.methods)


if __name__ == "__main__":
    main()
