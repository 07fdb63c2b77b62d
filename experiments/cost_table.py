"""What density 0.2 costs against the dense split and one node, at full size.

    python experiments/cost_table.py [--model=resnet50] [--size 224 224] [--density=0.2]
    python experiments/cost_table.py --model=deit_s
    python experiments/cost_table.py --model=ssd300                  # 300x300
    python experiments/cost_table.py --model=deeplabv3_resnet50      # 513x513
    python experiments/cost_table.py --model=edsr                    # 360x640 to 720x1280

Traffic is in bytes per example over all links (float32), multiplications and memory
(weights, and activations of one example) are one node's. Masks are chosen by the magnitude of
random weights; the figures come from traced shapes and the frozen plan, and the network is not run.
The latency is what ``cost.predict`` says of links of 100 Mbit/s and 0.1 ms, and nodes of
70 * 10⁹ multiplications per second. A transformer has a column more: the traffic of Megatron's
split (Shoeybi et al. 2019, arXiv 1909.08053), which pairs columns of one product with rows of the
next and sums up, over all nodes, two tensors of a block; it is less than that of the dense split
here, and nothing of it can be left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import disco_jax as dj
from disco_jax.models.vit import VisionTransformer

COLUMNS = (
    "nodes",
    "traffic MB",
    "dense MB",
    "Megatron MB",
    "dense / traffic",
    "total MACs",
    "weights",
    "memory",
)
SIZES = {"ssd300": (300, 300), "deeplabv3_resnet50": (513, 513), "edsr": (360, 640)}
LINK, GMACS = dj.cost.Link(mbit=100, ms=0.1), 70


def row(name: str, nodes: int, density: float, size: tuple[int, ...]) -> dict[str, Any]:
    mesh = dj.NodeMesh(nodes, emulate=True)
    model = dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, density)
    plan = dj.freeze(model, jax.ShapeDtypeStruct((1, *size, 3), np.float32)).plan
    memory = dj.cost.memory(plan)
    weights, macs = plan.single_node_weight_bytes, plan.single_node_macs
    return {
        "nodes": nodes,
        "density": density,
        "exchanges": plan.collectives,
        "traffic_bytes": plan.traffic_bytes,
        "dense_traffic_bytes": plan.dense_traffic_bytes,
        "megatron_traffic_bytes": megatron_bytes(model, nodes),
        "traffic_saving": plan.dense_traffic_bytes / max(plan.traffic_bytes, 1),
        "macs_per_node": plan.macs_per_node,
        "total_macs_share": plan.macs_per_node * nodes / macs,
        "weight_bytes_per_node": plan.weight_bytes_per_node,
        "weight_share": plan.weight_bytes_per_node / weights,
        "activation_bytes_per_node": memory.activation_bytes,
        "memory_bytes_per_node": memory.total_bytes,
        "predicted_ms": dj.cost.predict(plan, LINK, gmacs=GMACS).ms,
    }


def megatron_bytes(model: nnx.Module, nodes: int) -> int | None:
    """Bytes of two ring all-reduces a block in float32, over all links; None without blocks."""
    if not isinstance(model, VisionTransformer):
        return None
    *_, tokens, width = model.position.embedding.shape
    return 2 * len(model.blocks) * 2 * (nodes - 1) * tokens * width * 4


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, help="height and width; 224x224 for most")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = tuple(args.size or SIZES.get(args.model, (224, 224)))
    alone, *rows = (row(args.model, n, args.density, size) for n in (1, *args.nodes))
    for r in rows:
        r["memory_share"] = r["memory_bytes_per_node"] / alone["memory_bytes_per_node"]
    table = Table(title=f"{args.model}, {size[0]}x{size[1]}, density {args.density}")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for r in rows:
        table.add_row(
            str(r["nodes"]),
            megabytes(r["traffic_bytes"]),
            megabytes(r["dense_traffic_bytes"]),
            megabytes(r["megatron_traffic_bytes"]),
            f"{r['traffic_saving']:.2f}x",
            f"{r['total_macs_share']:.3f}",
            f"{r['weight_share']:.3f}",
            f"{r['memory_share']:.3f}",
        )
    Console(width=100).print(table)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
