"""What the nodes can read, and the local operations that read it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Shaped

from disco_jax.bands import Interpolation, Reads, Window
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.partition import activation_spec, batch_spec, check_batch, kernel_spec, row_spec

Compute = Callable[[Float[Array, "b ... r"], Float[Array, "... r o"]], Float[Array, "b ... o"]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a layer computes on a node, which is blind to where it runs.

    Attributes:
      run: ``[b, ..., r]`` and a kernel ``[..., r, o]`` to ``[b, ..., o]``.
      window: what it reads along the first spatial axis, given that axis's length.
      of_rows: ``run`` for an input that has its rows of padding; None: the same.
    """

    run: Compute
    window: Callable[[int], Window | Interpolation]
    of_rows: Compute | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Readable:
    """The result of an exchange: for every node the channels it may read.

    Attributes:
      values: ``[b, ..., n*r]``, one block of ``r`` readable channels for each node; where
        ``split`` is False, ``[b, ..., r]`` that every node holds.
      mesh: the nodes.
      received: ``[b, ..., n*m]``, where ``values`` are own channels alone: what the other nodes
        have sent. The product with own channels need not wait for it.
      gate: ``[n, r]``, what each node's weights are multiplied by, channel by channel: a mask, or
        numbers between 0 and 1 while gates are learned; None reads all. It may be several times as
        wide as the kernel, for several versions of each channel, of which a node reads one.
      split: whether ``values`` holds a block for each node.
      reach: ``[n, r]``, weights that get the gradient that they would have if they were read; None:
        those that are read.
      packed: whether the kernels that read this have a leading node axis ``[n, ..., r, o]``.
      repeated: whether every node computes all outputs, with the whole kernel.
      source: identity of the exchange that made it; its mask is the one that counts.
    """

    values: Float[Array, "b ... c"]
    mesh: NodeMesh = dataclasses.field(metadata={"static": True})
    received: Float[Array, "b ... m"] | None = None
    gate: Float[Array, "n r"] | Bool[Array, "n r"] | None = None
    split: bool = dataclasses.field(default=True, metadata={"static": True})
    reach: Bool[Array, "n r"] | None = None
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    repeated: bool = dataclasses.field(default=False, metadata={"static": True})
    source: int = dataclasses.field(default=0, metadata={"static": True})

    def replace(self, values: Float[Array, "b ... c"]) -> Readable:
        """The same with other ``values`` (another dtype, say)."""
        received = None if self.received is None else self.received.astype(values.dtype)
        return dataclasses.replace(self, values=values, received=received)

    def apply(self, op: Operation, kernel: Float[Array, "..."]) -> Float[Array, "b ... c_out"]:
        """The local operation: every node computes its ``c_out/n`` outputs from what it reads.

        Returns owned channels ``[b, ..., n*o]``.
        """
        if self.mesh.distributed:
            return self._apply_on_nodes(op.run, kernel)
        if self.packed:
            return self._apply_stacked(op.run, kernel)
        return op.run(self.values, _gated(kernel, self.gate, self.reach))

    def _apply_on_nodes(self, op: Compute, kernel: Array) -> Array:
        check_batch(self.values, self.mesh)
        ndim = self.values.ndim
        owned, whole = activation_spec(ndim, self.mesh), batch_spec(ndim, self.mesh)

        def on_node(x: Array, received: Array | None, kernel: Array, *gates: Any) -> Array:
            kernel = _gated(kernel[0] if self.packed else kernel, *gates)
            if received is None:
                return op(x, kernel)
            own = x.shape[-1]
            return op(x, kernel[..., :own, :]) + op(received, kernel[..., own:, :])

        return jax.shard_map(
            on_node,
            mesh=self.mesh.jax_mesh,
            in_specs=(
                owned if self.split else whole,  # [b/data, ..., r]
                owned,  # [b/data, ..., m]
                self._kernel_spec(kernel.ndim),  # [(1,) ..., r, c_out/n], repeated [..., r, c_out]
                P(NODE),  # [1, r]
                P(NODE),  # [1, r]
            ),
            out_specs=whole if self.repeated else owned,  # [b/data, ..., c_out/n] or all of them
        )(self.values, self.received, kernel, self.gate, self.reach)

    def _kernel_spec(self, ndim: int) -> P:
        if self.repeated:
            return P()
        return P(NODE) if self.packed else kernel_spec(ndim)

    def _apply_stacked(self, op: Compute, kernel: Array) -> Array:
        # One call a node: a vmapped convolution is a grouped one, for which CPUs have no fast code.
        blocks = jnp.split(self.values, self.mesh.nodes, axis=-1)
        return jnp.concatenate([op(x, k) for x, k in zip(blocks, kernel, strict=True)], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadableRows(Readable):
    """The result of an exchange of rows: for every node a block of them, with all channels.

    Attributes:
      values: ``[b, n*count, ..., c]``.
      height: rows of the map.
      reads: which of them each node has.
      node: the only one whose block there is; None: all of them.
    """

    height: int = dataclasses.field(default=0, metadata={"static": True})
    reads: Reads = dataclasses.field(default=Reads((), 0, ()), metadata={"static": True})
    node: int | None = dataclasses.field(default=None, metadata={"static": True})

    def apply(
        self, op: Operation, kernel: Any, *, per_node: bool = False
    ) -> Float[Array, "b rows ... c_out"]:
        """Every node computes its band of the output, ``[b, n*band, ..., c_out]`` together.

        ``per_node`` says that ``kernel`` is ``[n, ...]``, one for each.
        """
        wanted = op.window(self.height).reads(self.height, len(self.reads.first))
        starts = np.subtract(wanted.first, self.reads.first)
        run = op.of_rows or op.run

        def on_node(x: Array, start: Array, kernel: Any) -> Array:
            block = lax.dynamic_slice_in_dim(x, start[0], wanted.count, 1)
            return run(block, kernel[0] if per_node else kernel)

        def of(node: int) -> Any:
            return kernel[node : node + 1] if per_node else kernel

        if self.mesh.distributed:
            spec = row_spec(self.values.ndim, self.mesh)
            return jax.shard_map(
                on_node,
                mesh=self.mesh.jax_mesh,
                # [b/data, count, ..., c], [1], the node's kernel or all of it
                in_specs=(spec, P(NODE), P(NODE) if per_node else P()),
                out_specs=spec,  # [b/data, band, ..., c_out]
            )(self.values, jnp.asarray(starts), kernel)
        if self.node is not None:
            return on_node(self.values, jnp.asarray(starts[self.node :]), of(self.node))
        blocks = jnp.split(self.values, self.mesh.nodes, axis=1)
        found = [
            on_node(x, start, of(node))
            for node, (x, start) in enumerate(zip(blocks, starts[:, None], strict=True))
        ]
        return jnp.concatenate(found, axis=1)


def _gated(kernel: Array, gate: Array | None, reach: Array | None) -> Array:
    """``kernel [..., c, o]`` times ``gate [n, r]``; ``o`` is shared by the gate's nodes."""
    if gate is None:
        return kernel
    kernel = jnp.concatenate([kernel] * (gate.shape[-1] // kernel.shape[-2]), -2)
    wide = expand_mask(gate, kernel.shape[-1]).astype(kernel.dtype)
    if reach is None:
        return wide * kernel
    still = lax.stop_gradient(kernel)  # the sum is 0; only its gradient counts
    return wide * still + expand_mask(reach, kernel.shape[-1]).astype(kernel.dtype) * (
        kernel - still
    )


def expand_mask(mask: Shaped[Array, "n c_in"], c_out: int) -> Shaped[Array, "c_in c_out"]:
    """The weight mask ``[c_in, c_out]`` of a node mask: column ``o`` is the row of o's owner.

    >>> expand_mask(jnp.array([[True, False], [True, True]]), 4).astype(int).tolist()
    [[1, 1, 1, 1], [0, 0, 1, 1]]
    """
    return jnp.repeat(mask.T, c_out // mask.shape[0], axis=1)


_events: contextvars.ContextVar[list[tuple[Any, Array]] | None] = contextvars.ContextVar(
    "disco_jax_events", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, Array]]]:
    """Collects what exchanges and layers :func:`note` while a model is called."""
    events: list[tuple[Any, Array]] = []
    token = _events.set(events)
    try:
        yield events
    finally:
        _events.reset(token)


def note(module: Any, value: Array) -> None:
    """Tells whoever is :func:`recording` that ``module`` moved, or computed, ``value``.

    The same value through the same exchange is one event: the compiler merges such exchanges.
    """
    events = _events.get()
    if events is not None and not any(m is module and v is value for m, v in events):
        events.append((module, value))
