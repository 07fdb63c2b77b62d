"""A packed model as a serialised program, which jax runs without disco_jax and Flax.

program.bin     ``jax.export`` of ``(weights, images) -> logits`` on one device per node
manifest.json   mesh, shape of the images, versions, checksums
plan.json       what crosses the links
node-0.npz      the weights of node 0, and so on

A process reads the weights of its own nodes only. The batch is that of the example images: jax
0.10.2 crashes on a program of several devices that leaves it open. docs/hosts.md has what runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.messages import limited
from disco_jax.partition import batch_spec
from disco_jax.plan.artifact import (
    MANIFEST,
    PLAN,
    checksums,
    new_directory,
    node_share,
    whole,
)
from disco_jax.plan.spec import CommunicationPlan
from disco_jax.trace import Images
from disco_jax.version import __version__

FORMAT = 1
PROGRAM = "program.bin"


def write(
    model: nnx.Module,
    plan: CommunicationPlan,
    mesh: NodeMesh,
    directory: Path | str,
    images: Images,
) -> None:
    """Writes the program of a packed model and its weights, node by node.

    Raises:
      DiscoError: if the directory exists and is not empty or cannot be written, the nodes are
        emulated, or this process has not all of the model.
    """
    require(
        not mesh.emulated,
        f"`mesh` (={mesh}) must have one device for each node, of which the program is made; "
        f"freeze(..., mesh=NodeMesh({plan.nodes}, emulate=False)) with "
        f"JAX_NUM_CPU_DEVICES={plan.nodes * mesh.data}",
    )
    variables = whole(model)
    with limited(plan.message_bytes, images.shape[0] // mesh.data):
        program = _program(model, variables, mesh, images)
    files = (PROGRAM, PLAN, *(f"node-{node}.npz" for node in range(plan.nodes)))
    with new_directory(directory) as begun:
        (begun / PROGRAM).write_bytes(program.serialize())
        (begun / PLAN).write_text(plan.to_json())
        for node, file in enumerate(files[2:]):
            share: dict[str, Any] = node_share(variables, node, plan.nodes)
            np.savez(begun / file, **share)
        manifest = {
            "format": FORMAT,
            "disco_jax": __version__,
            "jax": jax.__version__,
            "platforms": program.platforms,
            "mesh": dict(mesh.jax_mesh.shape),
            "images": {"shape": images.shape, "dtype": str(images.dtype)},
            "sha256": checksums(begun, files),
        }
        (begun / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _program(
    model: nnx.Module, variables: dict[str, nnx.Variable], mesh: NodeMesh, images: Images
) -> jax.export.Exported:
    """The model as a function of its weights by name, and of images."""
    graphdef, weights, *rest = nnx.split(model, nnx.Not(nnx.RngState), ...)
    paths = [path for path, _ in nnx.to_flat_state(weights)]

    def call(weights: dict[str, Array], images: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        filled = {
            path: variable.replace(weights[name])
            for path, (name, variable) in zip(paths, variables.items(), strict=True)
        }
        return nnx.merge(graphdef, nnx.from_flat_state(filled), *rest)(images)

    arrays = {name: variable[...] for name, variable in variables.items()}
    sharding = mesh.sharding(*batch_spec(len(images.shape), mesh))
    spec = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=sharding)
    return jax.export.export(jax.jit(call))(arrays, spec)
