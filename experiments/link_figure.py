"""Table and figure of what ``link_latency.py`` has measured.

python experiments/link_figure.py [--rows=FILE.jsonl] [--out=FILE.png] [--fronts=FILE.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

RESULTS = Path(__file__).parent / "results" / "link_latency.jsonl"
COSTS = Path(__file__).parent / "results" / "cost_table.json"
RESNET = "resnet50"
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The newest row of each network, kind, number of nodes, hosts and rate."""
    newest = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        key = row.get("model", RESNET), row["what"], row["nodes"]
        hosts = row.get("gmacs", 0), row.get("cpu", 1), row.get("burst", 64)
        newest[*key, *hosts, row.get("mbit", 0)] = row
    return [newest[key] for key in sorted(newest)]


def show(row: Row) -> None:
    rate = f", {row['mbit']:g} Mbit/s" if "mbit" in row else ""
    rate += f" in bursts of {row['burst']} kB" if "burst" in row else ""
    share = f", {row['cpu']:g} of a core each" if "cpu" in row else ""
    share += f", {row['gmacs']:g} GMAC/s a core" if "gmacs" in row else ""
    print(f"\n{row.get('model', RESNET)}: {row['what']}, {row['nodes']} nodes{rate}{share}")
    if row["what"] == "memory":
        alone = row["above"]["one host"]
        print("  MiB above a process that computes x + 1")
        for way, mib in row["above"].items():
            print(f"  {way:24s} {mib:8.1f}, {mib / alone:5.2f} of one host")
    elif row["what"] == "streams":
        for flight, rate in row["images_per_second"].items():
            print(f"  {flight}: {rate:6.2f} images/s, {rate / row['limit']:.2f} of the limit")
    else:
        show_latencies(row["ways"])


def show_latencies(ways: dict[str, Row]) -> None:
    rivals = [way for way in ("dense float32", "one host", "Megatron") if way in ways]
    for way, found in ways.items():
        line = f"  {way:24s} {found['ms']:9.1f} ms"
        for rival in rivals:
            line += f"  {rival.split(' float')[0]}/it {ways[rival]['ms'] / found['ms']:5.2f}"
        if found["plan_bytes"]:
            excess = 100 * (found["wire_bytes"] / found["plan_bytes"] - 1)
            line += f"  {found['plan_bytes']:11,} bytes, {excess:+.1f} % on the wire"
        if "predicted_ms" in found:
            error = 100 * (found["predicted_ms"] / found["ms"] - 1)
            line += f"  predicted {error:+.0f} %  of limit {found['ms'] / found['limit_ms']:.2f}"
        print(line)


def draw(rows: list[Row], path: Path) -> None:
    """Latency against the rate of the link, and bytes against the number of nodes."""
    special = {"cpu", "burst", "model"}
    rows = [r for r in rows if r["what"] == "latency" and not special & r.keys()]
    most = max(rows, key=lambda row: sum(r["nodes"] == row["nodes"] for r in rows))["nodes"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    draw_rates(left, [row for row in rows if row["nodes"] == most], most)
    draw_nodes(right, rows)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_fronts(rows: list[Row], path: Path) -> None:
    """Latency against a share of the weights: a line of panels for each kind of hosts."""
    kinds: dict[tuple[int, float], list[Row]] = {}
    for row in rows:  # by rate
        kinds.setdefault((row["nodes"], row["gmacs"] * row.get("cpu", 1)), []).append(row)
    ways = dict.fromkeys(w for row in rows for w in row["ways"] if not w.startswith("planned"))
    size = len(kinds), max(map(len, kinds.values()))
    figure, axes = plt.subplots(*size, figsize=(3 * size[1], 2.9 * size[0]), squeeze=False)
    for line, ((nodes, gmacs), found) in zip(axes, kinds.items(), strict=True):
        for axis in line[len(found) :]:
            axis.axis("off")
        for axis, row in zip(line, found, strict=False):
            draw_front(axis, row["ways"], list(ways))
            title = f"{nodes} nodes of {gmacs:g} GMAC/s\n{row['mbit']:g} Mbit/s"
            axis.set_title(title, fontsize=10)
        line[0].set_ylabel("latency, ms")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(lines.values(), lines, loc="lower center", ncols=6, fontsize=9)
    figure.tight_layout(rect=(0, 0.12 / size[0], 1, 1))
    figure.savefig(path, dpi=120)


def draw_front(axis: Any, found: dict[str, Row], ways: list[str]) -> None:
    """Planned points, joined, and the others; ONNX says nothing of its weights."""
    points = {way: (one.get("memory", 1), one["ms"]) for way, one in found.items()}
    front = sorted({point for way, point in points.items() if way.startswith("planned")})
    axis.plot(*zip(*front, strict=True), "o-", color="C0", label="planned")
    for i, way in enumerate(ways, start=1):
        if way in points:
            axis.plot(*points[way], "s", color=f"C{i}", label=way, markersize=5)
    axis.set(xlim=(0, 1.05), yscale="log", xlabel="of one node's weights")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(ScalarFormatter())
    axis.grid(alpha=0.3, which="both")


def draw_rates(axis: Any, rows: list[Row], nodes: int) -> None:
    mine = sorted(rows, key=lambda row: row["mbit"])
    rates = [row["mbit"] for row in mine]
    for i, way in enumerate(mine[0]["ways"]):
        found = [row["ways"][way] for row in mine]
        style = "--" if way.startswith("one host") else "-"
        axis.plot(rates, [f["ms"] for f in found], style, marker="o", color=f"C{i}", label=way)
        if "predicted_ms" in found[0]:
            axis.plot(rates, [f["predicted_ms"] for f in found], "x", color=f"C{i}")
    axis.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel="latency, ms")
    axis.set_title(f"ResNet-50, batch 1, {nodes} hosts of one core (x: predicted)", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def draw_nodes(axis: Any, rows: list[Row]) -> None:
    """The plan's bytes as ``cost_table.py`` counts them, and those on the interfaces."""
    costs = json.loads(COSTS.read_text())
    counts = [row["nodes"] for row in costs]
    for i, (way, key) in enumerate(
        (("dense float32", "dense_traffic_bytes"), ("0.2 float32", "traffic_bytes"))
    ):
        axis.plot(counts, [row[key] / 1e6 for row in costs], color=f"C{i}", label=f"{way}, plan")
        points = [(row["nodes"], row["ways"][way]["wire_bytes"] / 1e6) for row in rows]
        axis.plot(*zip(*points, strict=True), "o", color=f"C{i}", label=f"{way}, interfaces")
    axis.set(xscale="log", yscale="log", xlabel="nodes", ylabel="MB per image, all links")
    axis.set_xticks(counts, counts)
    axis.minorticks_off()
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="latency against rate, bytes against nodes")
    parser.add_argument("--fronts", type=Path, help="latency against memory")
    args = parser.parse_args()
    rows = read(args.rows)
    for row in rows:
        show(row)
    fronts = [r for r in rows if r["what"] == "front" and not {"model", "burst"} & r.keys()]
    if args.fronts:
        draw_fronts(fronts, args.fronts)
    if args.out:
        draw(rows, args.out)


if __name__ == "__main__":
    main()
