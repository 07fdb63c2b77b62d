"""The packed model as a compiled function, and programs that can be inspected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import DiscoError
from disco_jax.mesh import NodeMesh
from disco_jax.messages import limited
from disco_jax.partition import batch_spec, check_batch
from disco_jax.plan import artifact, export
from disco_jax.plan.spec import CommunicationPlan
from disco_jax.trace import Images, modules


class Program:
    """A model in evaluation mode as a compiled function of its images.

    ``message_bytes`` is what a message has at most per example; None: any size.
    """

    def __init__(self, model: nnx.Module, message_bytes: int | None = None):
        self.mesh = mesh_of(model)
        model = nnx.clone(model, variables=False)
        model.eval()
        graphdef, state = nnx.split(model)
        data = self.mesh.data  # not self: in a cycle the weights would outlive the program
        tree: Any
        # A flat list: JAX flattens it in C++ at each call, an nnx.State in Python.
        self._leaves, tree = jax.tree.flatten(state)

        def run(leaves: Any, images: Array) -> Array:
            with limited(message_bytes, len(images) // data):
                return nnx.merge(graphdef, tree.unflatten(leaves))(images)

        self._jit = jax.jit(run)

    def refresh(self, model: nnx.Module) -> None:
        """Takes over the numbers of a model of the same structure, without compiling again."""
        self._leaves = jax.tree.leaves(nnx.state(model))

    def __call__(self, images: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        check_batch(images, self.mesh)
        return self._jit(self._leaves, self.mesh.put(images, *batch_spec(images.ndim, self.mesh)))

    def lower(self, images: Images) -> jax.stages.Lowered:
        """The program for images of this shape, as JAX lowers it."""
        check_batch(images, self.mesh)
        sharding = self.mesh.sharding(*batch_spec(len(images.shape), self.mesh))
        spec = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=sharding)
        return self._jit.lower(self._leaves, spec)


class Frozen:
    """A packed model with its plan; calling it runs the compiled program.

    Attributes:
      model: the packed NNX model; in a program of one's own it sends messages of any size.
      plan: what crosses the links.
    """

    def __init__(self, model: nnx.Module, plan: CommunicationPlan):
        self.model = model
        self.plan = plan
        self._program = Program(model, plan.message_bytes)

    @property
    def mesh(self) -> NodeMesh:
        """Where it runs."""
        return self._program.mesh

    def __call__(self, images: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Runs the packed model. The batch must divide by the mesh's ``data``."""
        return self._program(images)

    def lower(self, images: Images) -> jax.stages.Lowered:
        """The program that runs."""
        return self._program.lower(images)

    def save(self, directory: Path | str, *, replace: bool = False) -> None:
        """Writes the model to a directory for ``disco_jax.load``.

        A node needs of it ``plan.json``, ``manifest.json`` and the weights in its own file.

        Args:
          directory: appears when all of it is there.
          replace: takes the place of an older packed model.

        Raises:
          DiscoError: if the directory exists and is neither empty nor to be replaced, or cannot be
            written.
        """
        artifact.write(self.model, self.plan, directory, replace=replace)

    def export(self, directory: Path | str, images: Images) -> None:
        """Writes the program for images of this shape, which runs with jax alone.

        See ``disco_jax.plan.export`` for what is written, and docs/hosts.md for what runs it.

        Args:
          directory: a new one; a node needs of it all but the other nodes' weights.
          images: an example input (or its ``jax.ShapeDtypeStruct``); only shape and dtype count.

        Raises:
          DiscoError: if the directory exists and is not empty or cannot be written, the nodes are
            emulated or spread over several hosts, or the batch does not divide by ``data``.
        """
        check_batch(images, self.mesh)
        export.write(self.model, self.plan, self.mesh, directory, images)


def lower(model: nnx.Module, images: Images) -> jax.stages.Lowered:
    """The evaluation program of a masked model, for inspection.

    >>> import disco_jax as dj
    >>> from flax import nnx
    >>> mesh = dj.NodeMesh(nodes=2, emulate=True)
    >>> layer = dj.layers.Dense(4, 4, mesh=mesh, rngs=nnx.Rngs(0))
    >>> "dot" in dj.lower(layer, jax.ShapeDtypeStruct((1, 4), "float32")).as_text()
    True
    """
    return Program(model).lower(images)


def mesh_of(model: nnx.Module) -> NodeMesh:
    """The mesh that the layers of a model were built with."""
    for _, module in modules(model):
        mesh: Any = getattr(module, "mesh", None)
        if isinstance(mesh, NodeMesh):
            return mesh
    raise DiscoError(
        f"`model` (={type(model).__name__}) has no layer with a NodeMesh; build it with "
        "disco_jax layers or disco_jax.models.create"
    )
