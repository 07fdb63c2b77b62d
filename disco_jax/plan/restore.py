"""From a directory to a packed model that runs; no training code, and no whole model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from disco_jax import models, wire
from disco_jax.errors import require
from disco_jax.heap import give_back_memory
from disco_jax.mesh import NodeMesh
from disco_jax.plan.artifact import PLAN, check_files, read_manifest, read_weights
from disco_jax.plan.fold import replace_norms
from disco_jax.plan.freeze import move, replace_exchanges
from disco_jax.plan.frozen import Frozen
from disco_jax.plan.row_pack import RowPlan, pack_rows
from disco_jax.plan.spec import CommunicationPlan
from disco_jax.plan.split import split_again
from disco_jax.repartition import channels_read
from disco_jax.trace import exchanges, modules


def load(
    directory: Path | str,
    mesh: NodeMesh | None = None,
    *,
    build: Callable[[NodeMesh], nnx.Module] | None = None,
) -> Frozen:
    """Reads what ``frozen.save`` wrote. A process reads the weights of its own nodes only.

    Args:
      directory: with ``plan.json``, ``manifest.json`` and the weights of this process's nodes.
      mesh: where it is to run; ``NodeMesh(nodes)`` by default.
      build: makes the masked network on a mesh; needed for one that ``models.create`` did not make.

    Raises:
      DiscoError: if a file is missing, damaged or of another version, the mesh has another number
        of nodes, or the network is not the one that was saved.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    nodes = manifest["nodes"]
    mesh = NodeMesh(nodes) if mesh is None else mesh
    require(
        mesh.nodes == nodes,
        f"`nodes` of the mesh (={mesh.nodes}) must be those of {directory} (={nodes}); pass "
        f"mesh=NodeMesh(nodes={nodes}), or freeze the model for {mesh.nodes}",
    )
    mine = _nodes_here(mesh)
    check_files(directory, manifest, mine)
    plan = CommunicationPlan.from_json((directory / PLAN).read_text())
    model = _packed_model(plan, _builder(manifest, directory, build), manifest["split_by_rows"])
    known = dict(modules(model))  # what another network lacks is said by read_weights
    replace_norms(model, {n: m for n, m in manifest["folded"].items() if n in known and m in known})
    move(model, mesh)
    model.eval()
    read_weights(model, directory, mine, mesh, manifest["axes"])
    give_back_memory()
    return Frozen(model, plan)


def _builder(
    manifest: dict[str, Any],
    directory: Path,
    build: Callable[[NodeMesh], nnx.Module] | None,
) -> Callable[[NodeMesh], nnx.Module]:
    require(
        build is not None or manifest["model"] is not None,
        f"`build` is missing: {directory} holds a network that models.create did not make; pass "
        "build=, a function of a NodeMesh that makes it",
    )
    if build is not None:
        return build
    config = json.loads(manifest["model"])
    return lambda mesh: models.create(**config, mesh=mesh, rngs=nnx.Rngs(0))


def _packed_model(
    plan: CommunicationPlan, build: Callable[[NodeMesh], nnx.Module], asked: str | None
) -> nnx.Module:
    """The structure alone: nothing is computed or held but what the exchanges need.

    ``asked`` is how the model was split by rows.
    """
    emulated = NodeMesh(plan.nodes, emulate=True, devices=jax.local_devices())
    model = nnx.eval_shape(lambda: build(emulated))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.RngState)):
        variable.set_value(_any_state(variable.get_value()))
    dtypes = {e.path: e.wire_dtype for e in plan.exchanges}
    rows = None if asked is None else RowPlan.of(model, split_again(model, asked))
    scales = {
        path: np.zeros((2, exchange.channels), np.float32)
        for path, exchange in exchanges(model).items()
        if wire.calibrated(dtypes.get(path))
    }
    hops = {e.path: e.hops for e in plan.exchanges}
    from_rows = {
        path: (bands, channels_read(hops[path]), hops[path][0].width)
        for path, bands in (rows.masked(exchanges(model)) if rows else {}).items()
    }
    replace_exchanges(model, hops, dtypes, scales, from_rows)
    if rows is not None:
        pack_rows(model, rows)
    return model


def _any_state(spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Of a random number generator: none is saved, for a packed model draws nothing."""
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), spec.shape)
    return jnp.zeros(spec.shape, spec.dtype)


def _nodes_here(mesh: NodeMesh) -> list[int]:
    """The nodes that this process plays."""
    if mesh.emulated:
        return list(range(mesh.nodes))
    here = jax.process_index()
    columns = mesh.jax_mesh.devices.T
    return [i for i, column in enumerate(columns) if any(d.process_index == here for d in column)]
