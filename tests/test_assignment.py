"""Renumbering channels changes nothing but who computes what."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import error, meshes, randomize

import disco_jax as dj
from disco_jax.sparsify.channels import channel_orders
from disco_jax.trace import exchanges, readers


def local_share(model):
    """Mean share of a layer's squared weights within nodes, layers behind the images left out."""
    shares = []
    for layers in readers(model).values():
        for _, layer in layers:
            kernel = np.asarray(layer.kernel[...]) ** 2
            rows = np.arange(kernel.shape[-2]) * layer.mesh.nodes // kernel.shape[-2]
            columns = np.arange(kernel.shape[-1]) * layer.mesh.nodes // kernel.shape[-1]
            shares.append(kernel[..., rows[:, None] == columns].sum() / kernel.sum())
    return np.mean(shares)


@pytest.mark.parametrize("name", ["resnet8", "resnet50"])
def test_the_networks_function_is_unchanged(name, x64):
    mesh = dj.NodeMesh(4, emulate=True)
    model = dj.models.create(
        name, mesh=mesh, width=8, num_classes=10, rngs=nnx.Rngs(0), param_dtype="float64"
    )
    randomize(model)
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3), "float64")
    model.eval()
    before, share = model(images), local_share(model)
    kernels = [np.asarray(layer.kernel[...]) for g in readers(model).values() for _, layer in g]
    dj.sparsify.assign(model, images, restarts=1)
    after = [np.asarray(layer.kernel[...]) for g in readers(model).values() for _, layer in g]
    assert error(model(images), before) < 1e-12
    assert sum(not np.array_equal(a, b) for a, b in zip(kernels, after, strict=True)) > 5
    assert local_share(model) > 1.1 * share


def test_on_devices_of_their_own():
    distributed, emulated = (
        dj.models.create("resnet8", mesh=m, width=8, num_classes=10, rngs=nnx.Rngs(0))
        for m in meshes(2)
    )
    images = jnp.ones((2, 32, 32, 3))
    for model in (distributed, emulated):
        model.eval()
        dj.sparsify.assign(model, images, restarts=0)
    kernel = distributed.blocks[1].conv1.kernel[...]
    assert len(kernel.sharding.device_set) == 2
    np.testing.assert_array_equal(kernel, emulated.blocks[1].conv1.kernel[...])


class Chain(nnx.Module):
    """Two modules of connected channels, shuffled: a partition without remote weights exists."""

    def __init__(self, mesh, shuffled):
        rngs = nnx.Rngs(0)
        self.stem = dj.layers.Dense(
            3, 8, exchange=dj.Replicated(3, mesh=mesh), mesh=mesh, rngs=rngs
        )
        self.layers = nnx.List(
            [dj.layers.Dense(8, 8, mesh=mesh, rngs=rngs) for _ in range(len(shuffled) - 1)]
        )
        blocks = np.kron(np.eye(2), np.ones((4, 4)))
        for layer, (rows, columns) in zip(self.layers, pairwise(shuffled), strict=True):
            layer.kernel.set_value(layer.kernel[...] * blocks[rows][:, columns])
        self.head = dj.layers.Dense(8, 2, mesh=mesh, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def test_a_hidden_partition_is_found():
    rng = np.random.default_rng(0)
    model = Chain(dj.NodeMesh(2, emulate=True), [rng.permutation(8) for _ in range(4)])
    x = jax.random.normal(jax.random.key(1), (4, 3))
    before = model(x)
    dj.sparsify.assign(model, x)
    np.testing.assert_allclose(model(x), before, rtol=1e-5, atol=1e-6)
    for layer in model.layers:
        remote = np.kron(1 - np.eye(2), np.ones((4, 4)))
        assert np.abs(layer.kernel[...] * remote).max() == 0


def test_orders_stop_at_what_is_not_understood():
    """Inputs, outputs and a sort over channels fix the order; a norm between layers does not."""

    class Sorts(nnx.Module):
        def __init__(self, mesh):
            self.a = dj.layers.Dense(4, 8, mesh=mesh, rngs=nnx.Rngs(0))
            self.norm = dj.layers.LayerNorm(8, mesh=mesh, rngs=nnx.Rngs(0))
            self.b = dj.layers.Dense(8, 8, mesh=mesh, rngs=nnx.Rngs(0))
            self.c = dj.layers.Dense(8, 2, mesh=mesh, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.c(jnp.sort(self.b(self.norm(self.a(x))), axis=-1))

    orders = channel_orders(Sorts(dj.NodeMesh(2, emulate=True)), jnp.ones((2, 4)))
    names = [{name for name, _ in order.axes} for order in orders]
    found = [n for n in names if "a.kernel" in n]
    assert found == [{"a.kernel", "a.bias", "norm.scale", "norm.bias", "b.kernel"}]
    assert not any("c.kernel" in n for n in names)


def test_a_norm_over_a_nodes_own_channels_fixes_their_order():
    class Normed(nnx.Module):
        def __init__(self, mesh, scope):
            rngs = nnx.Rngs(0)
            self.a = dj.layers.Dense(4, 8, mesh=mesh, rngs=rngs)
            self.norm = dj.layers.LayerNorm(8, mesh=mesh, scope=scope, rngs=rngs)
            self.b = dj.layers.Dense(8, 2, mesh=mesh, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(self.a(x)))

    mesh, x = dj.NodeMesh(2, emulate=True), jnp.ones((2, 4))
    for scope, moves in (("all", True), ("node", False)):
        axes = [axis for o in channel_orders(Normed(mesh, scope), x) for axis in o.axes]
        assert (("a.kernel", 1) in axes) == moves
        assert (("norm.scale", 0) in axes) == moves


def test_masks_must_be_full():
    model = Chain(dj.NodeMesh(2, emulate=True), [np.arange(8)] * 3)
    dj.sparsify.prune(model, 0.5)
    with pytest.raises(dj.DiscoError, match="is not full; assign channels before masks"):
        dj.sparsify.assign(model, jnp.ones((2, 3)))
    assert exchanges(model)
