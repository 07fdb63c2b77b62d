"""What a TPU would do: ResNet-50 on two nodes, compiled ahead of time; no TPU is needed.

    pip install 'jax[tpu]'
    python experiments/tpu_schedule.py

Counts the permutes of the compiled program, and between how many of their starts and ends XLA has
scheduled products or convolutions: messages that are under way while the node computes.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies

import disco_jax as dj
from disco_jax.plan import Program
from disco_jax.trace import modules

START = re.compile(r"%(\S+) = .* collective-permute-start\(")
DONE = re.compile(r"collective-permute-done\(.*?%(\S+?)\)")
WORK = re.compile(r" (?:convolution|dot|fusion)\(.*(?:convolution|dot)")


def program(model: nnx.Module, mesh: dj.NodeMesh) -> Program:
    """A packed model as a program for devices that are not there: shapes instead of arrays."""
    for _, module in modules(model):
        if hasattr(module, "mesh"):
            module.mesh = mesh
    found = Program(model)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        spec = getattr(x.sharding, "spec", ())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.sharding(*spec))

    found._leaves = jax.tree.map(shape, found._leaves)
    return found


def overlaps(text: str) -> list[bool]:
    """For each permute in the order of the schedule, whether anything is computed meanwhile."""
    under_way: dict[str, bool] = {}
    found = []
    for line in text.splitlines():
        if start := START.search(line):
            under_way[start.group(1)] = False
        elif done := DONE.search(line):
            found.append(under_way.pop(done.group(1)))
        elif WORK.search(line):
            under_way = dict.fromkeys(under_way, True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--wire_dtype", default="bfloat16")
    args = parser.parse_args()
    model = dj.models.create(
        "resnet50", mesh=dj.NodeMesh(2, emulate=True), num_classes=1000, rngs=nnx.Rngs(0)
    )
    dj.sparsify.prune(model, 0.2, "random")
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), np.float32)
    frozen = dj.freeze(model, images, wire_dtype=args.wire_dtype)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    mesh = dj.NodeMesh(2, devices=topology.devices)
    compiled = program(frozen.model, mesh).lower(images).compile()
    found = overlaps(compiled.as_text())
    used = compiled.memory_analysis()
    print(
        f"{args.topology}, {args.wire_dtype}: {len(found)} permutes (the plan has "
        f"{frozen.plan.collectives}), {sum(found)} of them while something is computed; "
        f"{used.temp_size_in_bytes / 2**20:.0f} MiB of intermediates"
    )


if __name__ == "__main__":
    main()
