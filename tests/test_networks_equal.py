"""Whole networks in float64: masked on N devices = emulated = plain Flax; packed = masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import carry_over, close, cut_kernel, meshes, random_masks, randomize
from plain_resnet import PlainResNet

import disco_jax as dj
from disco_jax.trace import exchanges, modules

FLOAT64 = 1e-10
CLASSES = 10


def loss_and_grads(model, images):
    """A loss of logits and batch statistics in training mode, and its gradients."""
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    probe = np.random.default_rng(5).normal(size=(len(images), CLASSES))

    def loss(params):
        merged = nnx.merge(graphdef, params, rest, copy=True)
        value = jnp.sum(merged(images) * probe)
        return value, nnx.state(merged, nnx.BatchStat)

    (value, stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    model.eval()
    return value, dict(nnx.to_flat_state(grads)), dict(nnx.to_flat_state(stats))


def logits(model, images):
    model.eval()
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, images)


def cut_plain(plain, model):
    """Multiplies the plain model's kernels by the expanded masks of the distributed one."""
    layers = {path: m for path, m in modules(model) if hasattr(m, "kernel")}
    for path, layer in modules(plain):
        if path in layers:
            target = layers[path]
            cut = cut_kernel(layer.kernel[...], target.exchange, target.kernel.shape[-1])
            layer.kernel.set_value(jnp.asarray(cut))


QUICK = [("resnet18", 16, 3), ("resnet8", 8, 8)]
SLOW = {
    (name, width, nodes)
    for name, width in (("resnet18", 64), ("resnet50", 8), ("resnet50", 16))
    for nodes in (1, 2, 3, 4, 8)
}


@pytest.mark.parametrize(
    ("name", "width", "nodes"),
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW)],
)
def test_network(name, width, nodes, x64):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64, 64, 3)))
    plain = PlainResNet(name, CLASSES, width=width, dtype=jnp.float64, rngs=nnx.Rngs(0))
    randomize(plain)
    lives = []
    for mesh in meshes(nodes):
        model = dj.models.create(
            name,
            mesh=mesh,
            num_classes=CLASSES,
            width=width,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        carry_over(plain, model)
        random_masks(model, 0.4)
        lives.append(model)
    cut_plain(plain, lives[0])
    expected = logits(plain, images)
    value, plain_grads, plain_stats = loss_and_grads(plain, images)
    for model in lives:
        close(logits(model, images), expected, FLOAT64)
        got, grads, stats = loss_and_grads(model, images)
        close(got, value, FLOAT64)
        compare_gradients(model, grads, plain_grads)
        for path, stat in stats.items():
            features = plain_stats[path].shape[0]
            close(np.asarray(stat[...])[:features], plain_stats[path][...], FLOAT64)
        frozen = dj.freeze(model, images)
        close(frozen(images), expected, FLOAT64)
        if not frozen.mesh.emulated:
            dj.verify(frozen, images)


def compare_gradients(model, grads, plain_grads):
    """Every gradient, relative to the largest of all; masked weights have none."""
    largest = max(np.abs(g[...]).max() for g in plain_grads.values())
    readers = {path: m.exchange for path, m in modules(model) if hasattr(m, "kernel")}
    assert exchanges(model)
    for path, grad in grads.items():
        expected = np.asarray(plain_grads[path][...])
        layer = ".".join(map(str, path[:-1]))
        if path[-1] == "kernel":
            expected = cut_kernel(expected, readers[layer], grad.shape[-1])
        got = np.asarray(grad[...])
        alive = tuple(map(slice, expected.shape))
        difference = np.abs(got[alive] - expected).max() / largest
        assert difference <= FLOAT64, f"{layer} {path[-1]}: {difference:.1e}"
        dead = got.copy()
        dead[alive] = 0
        assert not dead.any(), f"{layer}: a dead channel has a gradient"
