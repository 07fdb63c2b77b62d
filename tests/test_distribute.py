"""Models that their authors wrote for one device: the same numbers, no hidden communication."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close
from strangers import MODELS, Transformer

import disco_jax as dj
from disco_jax.trace import exchanges

IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "disco_jax")


def original(name):
    model = MODELS[name](rngs=nnx.Rngs(0))
    for path, statistic in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        noise = jax.random.uniform(jax.random.key(len(path)), statistic.shape)
        statistic.set_value(statistic[...] + noise)
    model.eval()
    return model


def run(model, *inputs):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *inputs)


@pytest.mark.parametrize("mesh", [(2, True), (2, False), (4, False), (4, True)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name, mesh):
    nodes, emulate = mesh
    model = original(name)
    split = dj.distribute(model, dj.NodeMesh(nodes, emulate=emulate), IMAGES)
    close(run(split, IMAGES), run(model, IMAGES), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_frozen_it_communicates_what_the_plan_says(name):
    model = dj.distribute(original(name), dj.NodeMesh(2), IMAGES)
    dj.sparsify.prune(model, density=0.5, score="l2")
    frozen = dj.freeze(model, IMAGES)
    close(frozen(IMAGES), run(model, IMAGES), 1e-5)
    assert dj.verify(frozen, IMAGES)
    kept = [e for e in frozen.plan.exchanges if not e.gathered]
    assert sum(e.traffic_bytes(2) for e in kept) < 0.6 * sum(e.dense_traffic_bytes for e in kept)


@pytest.mark.parametrize("name", MODELS)
def test_training_takes_the_same_steps(name):
    """Gradients, running statistics and random numbers are those of the original."""
    model = original(name)
    split = dj.distribute(model, dj.NodeMesh(2, emulate=name != "fused"), IMAGES)
    close(losses(split), losses(model), 1e-4)


def losses(model, tx=None, steps=3):
    model.train()
    optimizer = nnx.Optimizer(model, tx or optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(IMAGES) - 1) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return jnp.stack([step(model, optimizer) for _ in range(steps)])


def test_masks_are_learned_in_the_authors_own_loop():
    model = dj.distribute(original("transformer"), dj.NodeMesh(2, emulate=True), IMAGES)
    tx = dj.sparsify.sparse_exchange(optax.sgd(0.01), density=0.25, steps=4)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.mean(model(IMAGES) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(6):
        step(model, optimizer)
    dj.sparsify.apply_masks(model, optimizer.opt_state)
    for exchange in exchanges(model).values():
        remote = np.asarray(exchange.mask[...]).sum() - exchange.channels
        assert remote == pytest.approx(0.25 * exchange.features, abs=1)


def test_readers_of_one_tensor_share_its_exchange():
    model = dj.distribute(original("transformer"), dj.NodeMesh(2, emulate=True), IMAGES)
    frozen = dj.freeze(model, IMAGES)
    consumers = [e.consumers for e in frozen.plan.exchanges if not e.gathered]
    assert [len(readers) for readers in consumers] == [3, 1, 1, 1, 3, 1, 1, 1, 1]
    assert all("attention" in path for path in consumers[0])


def test_a_data_axis_and_nodes():
    model = original("densenet")
    split = dj.distribute(model, dj.NodeMesh(2, data=2, emulate=False), IMAGES)
    close(run(split, IMAGES), run(model, IMAGES), 1e-5)


def test_it_is_saved_and_loaded(tmp_path):
    def build(mesh):
        return dj.distribute(original("fused"), mesh, IMAGES)

    frozen = dj.freeze(build(dj.NodeMesh(2)), IMAGES)
    frozen.save(tmp_path / "packed")
    loaded = dj.load(tmp_path / "packed", build=build)
    close(loaded(IMAGES), frozen(IMAGES), 0)


def test_one_nodes_share_runs_alone():
    model = dj.distribute(original("fused"), dj.NodeMesh(2, emulate=True), IMAGES)
    alone = dj.plan.share(dj.freeze(model, IMAGES), 1)
    assert np.isfinite(alone(IMAGES[:1])).all()


def test_channels_can_be_assigned_to_nodes():
    model = dj.distribute(original("mobilenet"), dj.NodeMesh(2, emulate=True), IMAGES)
    before = run(model, IMAGES)
    dj.sparsify.assign(model, IMAGES)
    close(run(model, IMAGES), before, 1e-5)


class Odd(nnx.Module):
    """Operations that mix channels, or that nobody has heard of."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (2, 2), (2, 2), rngs=rngs)
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.up(jnp.sort(self.conv(self.stem(x)), axis=-1))
        x = self.dense(x).mean((1, 2))
        x = jnp.cumsum(x / jnp.max(jnp.abs(x), -1, keepdims=True), axis=-1)
        x = jax.lax.scan(lambda c, _: (c * 0.9 + jnp.roll(c, 1, -1), ()), x, None, 3)[0]
        return self.last(x)


@pytest.mark.parametrize("nodes", [2, 3])
def test_what_mixes_channels_is_gathered_and_reported(nodes):
    model = Odd(nnx.Rngs(0))
    split = dj.distribute(model, dj.NodeMesh(nodes), IMAGES)
    close(run(split, IMAGES), run(model, IMAGES), 1e-5)
    report = str(split.report)
    for operation in ("sort", "cumsum", "reduce_max", "test_distribute.py"):
        assert operation in report
    frozen = dj.freeze(split, IMAGES)
    dj.verify(frozen, IMAGES)
    close(frozen(IMAGES), run(model, IMAGES), 1e-5)


class Awkward(nnx.Module):
    """Layers that must stay as they are: tied, mapped, asked for their weights, of a stack."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.twin = nnx.Linear(8, 8, rngs=rngs)
        self.twin.kernel = self.tied.kernel
        self.mapped = nnx.Linear(8, 8, rngs=rngs)
        self.asked = nnx.Linear(8, 8, rngs=rngs)
        make = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.stack = make(jax.random.split(jax.random.key(0), 2))

    def __call__(self, x):
        x = self.twin(self.tied(self.first(x)))
        x = jax.vmap(self.mapped)(x) + x @ self.asked.kernel[...]
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.stack
        )


def test_layers_that_cannot_be_split_stay_whole():
    model = Awkward(nnx.Rngs(0))
    split = dj.distribute(model, dj.NodeMesh(2), IMAGES)
    close(run(split, IMAGES), run(model, IMAGES), 1e-5)
    assert split.report.split == ("first",)
    assert set(split.report.whole) == {"tied", "twin", "mapped", "asked", "stack"}


def test_a_layer_alone_and_heads_that_do_not_divide():
    layer = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 12))
    close(run(dj.distribute(layer, dj.NodeMesh(2), x), x), run(layer, x), 1e-5)


def test_the_size_of_the_images_is_guessed():
    model = Transformer(rngs=nnx.Rngs(0))
    model.eval()
    model = dj.distribute(model, dj.NodeMesh(2, emulate=True))
    assert model(IMAGES).shape == (2, 5)


def test_rules_leave_layers_whole_or_their_statistics_at_home():
    model = original("transformer")
    rules = [("mlp", "whole"), ("norm1", "node")]
    split = dj.distribute(model, dj.NodeMesh(2, emulate=True), IMAGES, rules=rules)
    assert all("mlp" not in path for path in split.report.split)
    plan = dj.freeze(split, IMAGES).plan
    assert not any("norm1" in e.path for e in plan.exchanges)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("nothing", "whole")], "`rules` entry 'nothing' is not used"),
        ([("head", "half")], "must say 'whole' or 'node'"),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(dj.DiscoError, match=message):
        dj.distribute(original("transformer"), dj.NodeMesh(2, emulate=True), IMAGES, rules=rules)


def test_models_that_cannot_be_split():
    mesh = dj.NodeMesh(2, emulate=True)
    with pytest.raises(dj.DiscoError, match="no layer that can be split"):
        dj.distribute(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), mesh, IMAGES)
    with pytest.raises(dj.DiscoError, match="cannot be guessed"):
        dj.distribute(nnx.Conv(7, 8, (3, 3), rngs=nnx.Rngs(0)), mesh)
