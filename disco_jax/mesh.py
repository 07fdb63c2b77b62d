"""Nodes and where they run: real devices, faked CPU devices, or one device that emulates."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from disco_jax.errors import DiscoError, require

DATA, NODE = "data", "node"
log = logging.getLogger("disco_jax")


@dataclasses.dataclass(frozen=True, init=False)
class NodeMesh:
    """A ``("data", "node")`` mesh: the batch is split over ``data``, every layer over ``node``.

    With fewer devices than nodes, the nodes are *emulated*: the physical node axis has size 1
    and a masked layer is the dense layer with its kernel multiplied by the mask.

    On a CPU that was not told how many devices to fake, the first ``NodeMesh`` of a process
    sets ``jax_num_cpu_devices`` to what it needs.

    Train with ``emulate=True`` where one computer fakes the devices: it is faster, and XLA:CPU can
    lock up when several programs with collectives are under way on faked devices, unless each is
    waited for (``jax.block_until_ready``).

    Args:
      nodes: N >= 1, the number of participants that share every layer.
      data: number of copies of the whole node group, each working on its share of the batch.
      devices: the devices to use, ``jax.devices()`` by default.
      emulate: True emulates the nodes, False demands a device for each of them, None (default)
        takes real devices where there are enough.

    Raises:
      DiscoError: if sizes are not positive integers or devices are too few.

    >>> mesh = NodeMesh(nodes=4, emulate=True)
    >>> mesh.emulated, mesh.jax_mesh.shape["node"]
    (True, 1)
    """

    nodes: int
    data: int
    jax_mesh: Mesh | AbstractMesh

    def __init__(
        self,
        nodes: int = 1,
        data: int = 1,
        *,
        devices: Sequence[jax.Device] | None = None,
        emulate: bool | None = None,
    ):
        for name, value in (("nodes", nodes), ("data", data)):
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            require(
                whole and value >= 1,
                f"`{name}` (={value!r}) must be a positive integer; pass {name}=1 for no split",
            )
        too_late = False
        if devices is None:
            if not emulate:
                too_late = not _fake_cpu_devices(nodes * data)
            devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        if emulate is None:
            emulate = len(devices) < nodes * data
            if emulate and nodes > 1:
                log.info("%d devices are fewer than %d nodes: emulating", len(devices), nodes)
            if emulate and too_late:
                warnings.warn(
                    f"JAX started with {len(devices)} CPU device(s) before this NodeMesh could "
                    f"ask for {nodes * data}, so that one plays all nodes; "
                    + _remedy(nodes * data),
                    stacklevel=2,
                )
        present = 1 if emulate else nodes
        _require_devices(len(devices), nodes, data, present)
        grid = np.asarray(devices[: data * present]).reshape(data, present)
        object.__setattr__(self, "nodes", int(nodes))
        object.__setattr__(self, "data", int(data))
        jax_mesh = Mesh(grid, (DATA, NODE), axis_types=(AxisType.Auto,) * 2)
        object.__setattr__(self, "jax_mesh", jax_mesh)

    @property
    def emulated(self) -> bool:
        """True when one device plays all nodes."""
        return self.jax_mesh.shape[NODE] < self.nodes

    @property
    def distributed(self) -> bool:
        """True when each of several nodes has a device of its own."""
        return self.jax_mesh.shape[NODE] > 1

    @property
    def overlaps(self) -> bool:
        """Whether a device computes while messages are under way, as accelerators do.

        A collective of XLA:CPU blocks the thread that computes.
        """
        real = isinstance(self.jax_mesh, Mesh)  # and not for tracing alone
        return real and self.distributed and self.jax_mesh.devices.flat[0].platform != "cpu"

    def abstract(self) -> NodeMesh:
        """The same nodes without devices and data axis: to trace what each of them does."""
        mesh = copy.copy(self)
        shape = AbstractMesh((1, self.nodes), (DATA, NODE), axis_types=(AxisType.Auto,) * 2)
        object.__setattr__(mesh, "data", 1)
        object.__setattr__(mesh, "jax_mesh", shape)
        return mesh

    def sharding(self, *spec: str | None) -> NamedSharding:
        """The placement on this mesh of an array whose axes are split as ``spec`` says."""
        return NamedSharding(self.jax_mesh, PartitionSpec(*spec))

    def put(self, value: jax.typing.ArrayLike, *spec: str | None) -> jax.Array:
        """Places an array on this mesh, its axes split as ``spec`` says.

        On several hosts each places its own part of the value that it holds; nothing is sent, so
        all must hold the same.
        """
        sharding = self.sharding(*spec)
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        # Here device_put would send the whole value round to compare it.
        local = np.asarray(value)
        return jax.make_array_from_callback(local.shape, sharding, lambda part: local[part])

    def replicate(self, tree: Any) -> Any:
        """Inside ``jax.jit``: every device gets all of every array."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.sharding()), tree)

    def __repr__(self) -> str:
        where = "emulated" if self.emulated else self.jax_mesh.devices.flat[0].platform
        return f"NodeMesh(nodes={self.nodes}, data={self.data}, {where})"


def _remedy(count: int) -> str:
    return (
        f"set JAX_NUM_CPU_DEVICES={count} before Python starts, or create the NodeMesh before the "
        "first JAX computation"
    )


def _fake_cpu_devices(count: int) -> bool:
    """Asks for ``count`` CPU devices where nobody chose a number; False if it is too late."""
    config: Any = jax.config
    chosen = (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or "JAX_NUM_CPU_DEVICES" in os.environ
        or config.jax_num_cpu_devices > 0
    )
    if chosen or count == 1:
        return True
    try:
        config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX is already running with the devices it has
        return jax.default_backend() != "cpu"
    return True


def _require_devices(found: int, nodes: int, data: int, present: int) -> None:
    if found >= data * present:
        return
    needed = data * present
    remedy = _remedy(needed)
    if nodes > 1 and present > 1:
        remedy += ", or pass emulate=True to play all nodes on one device"
    raise DiscoError(
        f"`nodes` (={nodes}) x `data` (={data}) needs {needed} devices, but JAX has {found}; "
        f"{remedy}"
    )
