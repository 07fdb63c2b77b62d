"""What an experiment found: a table, ``report.json``, one HTML page, one figure."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from disco_jax.errors import DiscoError
from disco_jax.plan import CommunicationPlan
from disco_jax.tasks import Task, shown


def build(
    plan: CommunicationPlan,
    *,
    name: str,
    mesh: str,
    task: Task,
    found: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of ``report.json``: costs per exchange and in total, the metric, wall times.

    What was ``found`` is under the name of the task's metric, say ``"accuracy"``.

    Traffic is in bytes per example over all directed links; multiplications are per example and,
    like the bytes of weights, of one node. Each stands beside the dense split's and one node's.
    """
    rows = [_row(plan, path) for path in dict.fromkeys(layer.exchange for layer in plan.layers)]
    rows += [
        _row(plan, e.path) for e in plan.exchanges if e.path not in {r["exchange"] for r in rows}
    ]
    macs, weights = plan.single_node_macs, plan.single_node_weight_bytes
    return {
        "name": name,
        "nodes": plan.nodes,
        "mesh": mesh,
        "metric": task.metric,
        "unit": task.unit,
        task.metric: found,
        "seconds": seconds,
        "total": {
            "packed": {
                "traffic_bytes": plan.traffic_bytes,
                "macs_per_node": plan.macs_per_node,
                "weight_bytes_per_node": plan.weight_bytes_per_node,
            },
            "dense_split": {
                "traffic_bytes": plan.dense_traffic_bytes,
                "macs_per_node": macs // plan.nodes,
                "weight_bytes_per_node": weights // plan.nodes,
            },
            "one_node": {
                "traffic_bytes": 0,
                "macs_per_node": macs,
                "weight_bytes_per_node": weights,
            },
        },
        "exchanges": rows,
    }


def _row(plan: CommunicationPlan, path: str) -> dict[str, Any]:
    layers = [layer for layer in plan.layers if layer.exchange == path]
    moved = [e for e in plan.exchanges if e.path == path]
    return {
        "exchange": path,
        "consumers": [layer.path for layer in layers],
        "traffic_bytes": sum(e.traffic_bytes(plan.nodes) for e in moved),
        "dense_traffic_bytes": sum(e.dense_traffic_bytes for e in moved),
        "macs_per_node": sum(layer.macs for layer in layers),
        "dense_macs_per_node": sum(layer.single_node_macs for layer in layers) // plan.nodes,
        "weight_bytes_per_node": sum(layer.weight_bytes for layer in layers),
        "dense_weight_bytes_per_node": sum(layer.single_node_weight_bytes for layer in layers)
        // plan.nodes,
    }


def table(content: dict[str, Any]) -> Table:
    """The report as a table for the terminal."""
    wall = ", ".join(f"{k} {v:.0f} s" for k, v in content["seconds"].items())
    out = Table(
        title=f"{content['name']} on {content['nodes']} nodes",
        caption=f"test {content['metric']}: {_found(content)}\nwall time: {wall}",
        caption_justify="left",
    )
    out.add_column("exchange", no_wrap=True)
    for heading in ("traffic", "/dense", "MACs/node", "/dense", "weights/node", "/dense"):
        out.add_column(heading, justify="right", no_wrap=True)
    for r in content["exchanges"]:
        cells = [r["exchange"]]
        for key in ("traffic_bytes", "macs_per_node", "weight_bytes_per_node"):
            cells += [f"{r[key]:,}", _ratio(r[key], r[f"dense_{key}"])]
        out.add_row(*cells)
    out.add_section()
    dense = content["total"]["dense_split"]
    for kind, total in content["total"].items():
        cells = [f"total, {kind.replace('_', ' ')}"]
        for key, value in total.items():
            cells += [f"{value:,}", _ratio(value, dense[key])]
        out.add_row(*cells)
    return out


def show(content: dict[str, Any]) -> None:
    """Prints the table, wide enough for its columns even where the output is no terminal."""
    Console(width=100).print(table(content))


def _found(content: dict[str, Any]) -> str:
    found = content[content["metric"]]
    return ", ".join(f"{k} {shown(v, content['unit'])}" for k, v in found.items())


def _ratio(value: int, dense: int) -> str:
    return f"{value / dense:.3f}" if dense else "-"


def write(content: dict[str, Any], workdir: Path) -> None:
    """Writes ``report.json``, ``report.html`` and ``traffic.png``."""
    plot(content, workdir / "traffic.png")
    (workdir / "report.html").write_text(_page(content))
    (workdir / "report.json").write_text(json.dumps(content, indent=1) + "\n")


def plot(content: dict[str, Any], path: Path) -> None:
    """Bytes that each exchange sends, dense split against packed."""
    from matplotlib.figure import Figure

    rows = [r for r in content["exchanges"] if r["dense_traffic_bytes"]]
    figure = Figure(figsize=(max(6, 1.5 + 0.17 * len(rows)), 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    dense = [r["dense_traffic_bytes"] / 1e3 for r in rows]
    packed = [r["traffic_bytes"] / 1e3 for r in rows]
    axes.bar(places, dense, color="0.85", label=f"dense split: {sum(dense):,.0f} kB")
    axes.bar(places, packed, color="C0", label=f"packed: {sum(packed):,.0f} kB")
    names = [r["exchange"].removesuffix(".exchange") for r in rows]
    axes.set_xticks(places, names, fontsize=6, rotation=90)
    axes.margins(x=0.01)
    axes.set_ylabel("kB per example, all links")
    title = f"{content['name']}, {content['nodes']} nodes; {content['metric']}: {_found(content)}"
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)


def _page(content: dict[str, Any]) -> str:
    dense = content["total"]["dense_split"]
    totals = "".join(
        f"<tr><td>{html.escape(kind.replace('_', ' '))}</td>"
        + "".join(f"<td>{v:,}</td><td>{_ratio(v, dense[k])}</td>" for k, v in total.items())
        + "</tr>"
        for kind, total in content["total"].items()
    )
    facts = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{shown(value, content['unit'])}</td></tr>"
        for kind, value in content[content["metric"]].items()
    )
    walls = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{value:.1f} s</td></tr>"
        for kind, value in content["seconds"].items()
    )
    title = html.escape(f"{content['name']} on {content['nodes']} nodes")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ border-bottom: 1px solid #ccc; padding: .25rem .75rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style></head><body>
<h1>{title}</h1><p>{html.escape(content["mesh"])}</p>
<h2>Test {html.escape(content["metric"])}</h2><table>{facts}</table>
<h2>Cost per example</h2>
<table><tr><th></th><th>traffic, bytes</th><th>/dense</th><th>MACs per node</th><th>/dense</th>
<th>weights per node, bytes</th><th>/dense</th></tr>{totals}</table>
<h2>Traffic of each exchange</h2><img src="traffic.png" alt="bytes of each exchange">
<h2>Answers</h2><img src="pictures.png" alt="images, their truth, and what the models answer">
<h2>Wall time</h2><table>{walls}</table>
</body></html>
"""


def print_again(workdir: Path) -> None:
    """Prints and renders again what ``--mode=all`` found."""
    path = workdir / "report.json"
    try:
        content = {"metric": "accuracy", "unit": "%"} | json.loads(path.read_text())
    except OSError:
        raise DiscoError(
            f"`workdir` (={workdir}) has no report.json; run --mode=all there first"
        ) from None
    except ValueError as error:
        raise DiscoError(
            f"`{path}` is not JSON ({error}); run --mode=all there to write it again"
        ) from None
    try:
        write(content, workdir)
    except (KeyError, TypeError) as error:
        raise DiscoError(
            f"`{path}` lacks {error}; run --mode=all there to write it again"
        ) from None
    show(content)
