"""Odd things that authors do: each must give the same numbers, or say what is wrong."""

from __future__ import annotations

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close

import disco_jax as dj

TOKENS = jax.random.normal(jax.random.key(0), (2, 6, 12))


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "disco_jax")


class Net(nnx.Module):
    """Layers of some widths, and a function of them."""

    def __init__(self, call, *widths, norm=None):
        rngs = nnx.Rngs(0)
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.norm = None if norm is None else nnx.LayerNorm(norm, rngs=rngs)
        self.bare = nnx.LayerNorm(11, use_scale=False, use_bias=False, rngs=rngs)
        self.weights = nnx.Param(jax.random.normal(rngs.params(), (11,)))
        self.call = call

    def __call__(self, x):
        return self.call(self, x)


def rotary(net, x):
    q = net.layers[0](x)
    a, b = q[..., ::2], q[..., 1::2]
    return net.layers[1](jnp.concatenate([-b, a], -1) * q)


def by_class(net, x):
    for layer in net.layers:
        x = layer(x)
        x = nnx.relu(x) if isinstance(layer, nnx.Linear) else x
    return x


@nnx.remat
def again(net, x):
    return net.layers[1](nnx.relu(net.layers[0](x)))


def masked(net, x):
    y = net.layers[0](x)
    return net.layers[1](jnp.where(x[..., :1] > 0, nnx.relu(y), 0.0))


def two_ranks(net, x):
    y = net.layers[0](x)
    return net.layers[1](y) + net.layers[1](y.mean(1))[:, None]


ODD = {
    "rotary": (rotary, (12, 16, 4)),
    "every other": (lambda net, x: net.layers[0](x)[..., ::2], (12, 10)),
    "bare norm": (lambda net, x: (net.bare(net.layers[0](x)) * net.weights[...]).sum(-1), (12, 11)),
    "isinstance": (by_class, (12, 8, 6)),
    "booleans": (lambda net, x: (net.layers[0](x) > 9).max(-1), (12, 5)),
    "some": (lambda net, x: (net.layers[0](x) > 0).any(-1), (12, 5)),
    "remat": (again, (12, 8, 6)),
    "scalar": (lambda net, x: (net.layers[0](x), jnp.mean(net.layers[0](x) ** 2)), (12, 8)),
    "flat": (lambda net, x: net.layers[0](x).ravel(), (12, 8)),
    "masked": (masked, (12, 8, 6)),
    "two ranks": (two_ranks, (12, 8, 6)),
}


@pytest.mark.parametrize("mesh", [(2, False), (3, True)], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_the_same_numbers(name, mesh):
    call, widths = ODD[name]
    model = Net(call, *widths)
    split = dj.distribute(model, dj.NodeMesh(mesh[0], emulate=mesh[1]), TOKENS)
    found = jax.tree.leaves(dj.plan.Program(split)(TOKENS))
    for ours, theirs in zip(found, jax.tree.leaves(model(TOKENS)), strict=True):
        close(np.float32(ours), np.float32(theirs), 1e-5)


def test_a_mask_made_of_the_input_is_no_communication():
    model = dj.distribute(Net(masked, 12, 8, 6), dj.NodeMesh(2), TOKENS)
    dj.verify(dj.freeze(model, TOKENS), TOKENS)


TRAINED = {
    "sum": (lambda net, x: net.layers[1](nnx.relu(net.layers[0](x))).sum(-1), (12, 7, 5)),
    "mean": (lambda net, x: (net.norm(net.layers[0](x)) ** 3).mean(-1), (12, 7)),
    "root": (lambda net, x: net.layers[1](jnp.sqrt(jnp.abs(net.layers[0](x)))), (12, 7, 5)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_dead_channels_learn_nothing(name):
    call, widths = TRAINED[name]
    model = Net(call, *widths, norm=7)
    split = dj.distribute(model, dj.NodeMesh(2, emulate=True), TOKENS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    close(losses(split, tx), losses(model, tx), 1e-4)


def losses(model, tx):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(TOKENS) - 1) ** 2))(model)
        optimizer.update(model, gradients)
        return value

    return np.stack([step(model, optimizer) for _ in range(4)])


class Dropping(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(12, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.never = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, train, rngs=None):
        x = self.dropout(self.norm(self.first(x), not train), deterministic=not train, rngs=rngs)
        return self.spectral(x, update_stats=train)


def test_flags_and_wrapped_layers():
    model = Dropping()
    split = dj.distribute(model, dj.NodeMesh(2, emulate=True), (TOKENS, False))
    close(split(TOKENS, False), model(TOKENS, False), 1e-5)
    close(split(TOKENS, True), model(TOKENS, True), 1e-5)
    close(split(TOKENS, train=False), model(TOKENS, False), 1e-5)
    assert split.report.whole["never"] == "it is not called"
    assert "SpectralNorm" in split.report.whole["spectral.layer_instance"]


def test_state_in_arguments_is_refused():
    split = dj.distribute(Dropping(), dj.NodeMesh(2, emulate=True), (TOKENS, False))
    with pytest.raises(dj.DiscoError, match=r"argument .* is a Rngs, whose changes would be lost"):
        split(TOKENS, True, rngs=nnx.Rngs(0))


def test_a_layer_without_the_model_says_so():
    split = dj.distribute(Net(by_class, 12, 8, 6), dj.NodeMesh(2, emulate=True), TOKENS)
    with pytest.raises(Exception, match="only when the distributed model itself is called"):
        split.model.layers[0](TOKENS)


def test_random_numbers_move_to_another_mesh():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a, self.b = nnx.Linear(12, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.b(self.dropout(nnx.relu(self.a(x))))

    model = dj.distribute(Model(), dj.NodeMesh(2, emulate=True), TOKENS)
    frozen = dj.freeze(model, TOKENS, mesh=dj.NodeMesh(2))
    model.eval()
    close(frozen(TOKENS), model(TOKENS), 1e-5)
    assert np.isfinite(dj.plan.share(frozen, 0)(TOKENS)).all()
