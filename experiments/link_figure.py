"""Table and figure of what ``link_latency.py`` has measured.

python experiments/link_figure.py [--rows=FILE.jsonl] [--out=FILE.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "link_latency.jsonl"
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The newest row of each kind, number of nodes and rate."""
    newest = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        newest[row["what"], row["nodes"], row.get("mbit", 0)] = row
    return [newest[key] for key in sorted(newest)]


def show(row: Row) -> None:
    rate = f", {row['mbit']:g} Mbit/s" if "mbit" in row else ""
    print(f"\n{row['what']}, {row['nodes']} nodes{rate}")
    if row["what"] == "memory":
        alone = row["above"]["one host"]
        for way, mib in row["above"].items():
            print(
                f"  {way:24s} {mib:8.1f} MiB above an empty process, {mib / alone:5.2f} of one host"
            )
    elif row["what"] == "streams":
        for count, rate in row["images_per_second"].items():
            print(
                f"  {count} in flight: {rate:6.2f} images/s, {rate / row['limit']:.2f} of the limit"
            )
    else:
        show_latencies(row["ways"])


def show_latencies(ways: dict[str, Row]) -> None:
    dense, alone = ways["dense float32"]["ms"], ways["one host"]["ms"]
    for way, found in ways.items():
        line = f"  {way:24s} {found['ms']:9.1f} ms  dense/it {dense / found['ms']:6.1f}"
        line += f"  one host/it {alone / found['ms']:5.2f}"
        if found["plan_bytes"]:
            excess = 100 * (found["wire_bytes"] / found["plan_bytes"] - 1)
            line += f"  {found['plan_bytes']:11,} bytes, {excess:+.1f} % on the wire"
        if "predicted_ms" in found:
            error = 100 * (found["predicted_ms"] / found["ms"] - 1)
            line += f"  predicted {error:+.0f} %  of limit {found['ms'] / found['limit_ms']:.2f}"
        print(line)


def draw(rows: list[Row], path: Path) -> None:
    """Latency against the rate of the link: a panel for each number of nodes."""
    rows = [row for row in rows if row["what"] == "latency"]
    counts = sorted({row["nodes"] for row in rows})
    figure, axes = plt.subplots(1, len(counts), figsize=(1 + 4.6 * len(counts), 4), squeeze=False)
    for axis, nodes in zip(axes[0], counts, strict=True):
        mine = sorted((row["mbit"], row["ways"]) for row in rows if row["nodes"] == nodes)
        rates = [rate for rate, _ in mine]
        for i, way in enumerate(mine[0][1]):
            measured = [ways[way]["ms"] for _, ways in mine]
            style = "--" if way.startswith("one host") else "-"
            axis.plot(rates, measured, style, marker="o", color=f"C{i}", label=way)
            if "predicted_ms" in mine[0][1][way]:
                predicted = [ways[way]["predicted_ms"] for _, ways in mine]
                axis.plot(rates, predicted, "x", color=f"C{i}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("link, Mbit/s")
        axis.set_title(f"ResNet-50, batch 1, {nodes} hosts of one core (x: predicted)", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("latency, ms")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = read(args.rows)
    for row in rows:
        show(row)
    if args.out:
        draw(rows, args.out)


if __name__ == "__main__":
    main()
