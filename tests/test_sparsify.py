"""Masks: budgets, schedules, and the optax transform step by step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import disco_jax as dj
from disco_jax.partition import owned
from disco_jax.sparsify import SparseExchangeState, by_cost, uniform


@given(
    nodes=st.sampled_from([1, 2, 3, 4, 8]),
    block=st.integers(1, 9),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_uniform_budget(nodes, block, density, seed):
    """A ceiling, the same for every node, level over the hops, best scores first."""
    scores = np.random.default_rng(seed).random((nodes, nodes * block))
    scores_of = {"a": jnp.asarray(scores, jnp.float32)}
    mask = np.asarray(uniform(scores_of, {"a": 1.0}, {"a": density})["a"])
    own = owned(nodes * block, nodes)
    assert mask[own].all()
    remote = (mask & ~own).sum(1)
    assert set(remote) == {int(np.floor(density * (nodes - 1) * block + 1e-3))}
    blocks = mask.reshape(nodes, nodes, block)
    for offset in range(1, nodes):
        counts = {int(blocks[(s + offset) % nodes, s].sum()) for s in range(nodes)}
        assert len(counts) == 1, "packing this hop needs fill"
    for reader in range(nodes):
        for owner in set(range(nodes)) - {reader}:
            kept = blocks[reader, owner]
            block_scores = scores.reshape(nodes, nodes, block)[reader, owner]
            if kept.any() and not kept.all():
                assert block_scores[kept].min() >= block_scores[~kept].max()


def test_dead_channels_are_never_read():
    exchange = dj.Exchange(10, mesh=dj.NodeMesh(4), pad=True)
    scores = jnp.where(np.arange(12) < 10, jnp.ones((4, 12)), -jnp.inf)
    for budget in (uniform, by_cost):
        mask = budget({"a": scores}, {"a": 1.0}, {"a": 1.0})["a"]
        np.testing.assert_array_equal(mask, exchange.full_mask())
    exchange.set_mask(jnp.ones((4, 12), bool))
    np.testing.assert_array_equal(exchange.mask[...], exchange.full_mask())


def test_the_transform_leaves_dead_channels_out():
    layer = dj.layers.Dense(10, 8, mesh=dj.NodeMesh(4), pad=True, rngs=nnx.Rngs(0))
    dj.name_exchanges(layer)
    tx = dj.sparsify.sparse_exchange(optax.sgd(0.1), density=1.0, steps=1, score="random")
    masks = tx.init(nnx.state(layer, nnx.Param)).masks
    np.testing.assert_array_equal(masks["exchange"], layer.exchange.full_mask())


def two_layers(mesh):
    class Two(nnx.Module):
        def __init__(self):
            self.exchange = dj.Exchange(8, mesh=mesh)
            self.a = dj.layers.Dense(8, 4, exchange=self.exchange, rngs=nnx.Rngs(0))
            self.b = dj.layers.Dense(8, 4, exchange=self.exchange, rngs=nnx.Rngs(1))
            self.c = dj.layers.Dense(4, 2, mesh=mesh, rngs=nnx.Rngs(2))

        def __call__(self, x):
            readable = self.exchange(x)
            return self.c(self.a(readable) * self.b(readable))

    model = Two()
    dj.name_exchanges(model)
    return model


def test_scores_sum_over_all_readers():
    model = two_layers(dj.NodeMesh(2))
    dj.sparsify.prune(model, 0.5)
    a, b = np.asarray(model.a.kernel[...]), np.asarray(model.b.kernel[...])
    norms = np.stack([(a[:, s] ** 2 + b[:, s] ** 2).sum(1) for s in (slice(0, 2), slice(2, 4))])
    for node, remote in ((0, slice(4, 8)), (1, slice(0, 4))):
        best = np.argsort(-norms[node, remote])[:2]
        assert np.flatnonzero(model.exchange.mask[...][node, remote]).tolist() == sorted(best)


def test_transform_follows_the_schedule_by_hand():
    """Density 1 - (1 - s)(1 - (1 - t)^3) in updates 1, 3, 5 of 5; nothing changes in between."""
    model = two_layers(dj.NodeMesh(2))
    params = nnx.state(model, nnx.Param)
    tx = dj.sparsify.sparse_exchange(optax.sgd(0.0), density=0.0, steps=5, every=2)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    # Twice: at first the state is not placed on the mesh yet. Never because the density falls.
    update = jax.jit(chex.assert_max_traces(tx.update, n=2))
    kept = []
    for _ in range(6):
        _, state = update(zeros, state, params)
        kept.append(int(state.masks["exchange"].sum()) - 8)
    # Of 4 remote channels a node: t=0 all; t=1/2: (1 - 1/2)^3 = 1/8 of 4 -> 0; t=1 none.
    assert kept == [8, 8, 0, 0, 0, 0]
    tx = dj.sparsify.sparse_exchange(optax.sgd(0.0), density=0.25, steps=5, every=1)
    state, kept = tx.init(params), []
    for _ in range(6):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        kept.append(int(state.masks["exchange"].sum()) - 8)
    # 1/4 + 3/4 (1 - t/4)^3 = 1, .566, .344, .262, .25, ... of 4 channels, rounded down, two nodes
    assert kept == [8, 4, 2, 2, 2, 2]


@pytest.mark.parametrize("wrap", ["plain", "chain", "multi_steps"])
def test_transform_inside_other_transforms(wrap):
    """Masks reach the model from wherever the state is."""
    model = two_layers(dj.NodeMesh(2))
    tx = dj.sparsify.sparse_exchange(optax.adam(1e-2), density=0.5, steps=0, schedule="one_shot")
    if wrap == "chain":
        tx = optax.chain(optax.clip(1.0), tx)
    if wrap == "multi_steps":
        tx = optax.MultiSteps(tx, 2).gradient_transformation()
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    dj.sparsify.apply_masks(model, state)
    assert int(model.exchange.mask[...].sum()) == 8 + 4
    assert int(model.c.exchange.mask[...].sum()) == 4 + 2


def test_two_lines_in_a_users_own_loop():
    model = two_layers(dj.NodeMesh(2))
    tx = dj.sparsify.sparse_exchange(optax.adam(3e-2), density=0.5, steps=20)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.stack([x[:, 0] * x[:, 5], x[:, 1] * x[:, 2]], -1)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        dj.sparsify.apply_masks(model, optimizer.opt_state)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    assert int(model.exchange.mask[...].sum()) == 8 + 4


def test_state_is_documented_and_typed():
    model = two_layers(dj.NodeMesh(2))
    tx = dj.sparsify.sparse_exchange(optax.sgd(0.1), density=0.5, steps=1)
    state = tx.init(nnx.state(model, nnx.Param))
    assert isinstance(state, SparseExchangeState)
    assert state.step.dtype == jnp.int32
    assert {k: (v.dtype, v.shape) for k, v in state.masks.items()} == {
        "exchange": (jnp.bool_, (2, 8)),
        "c.exchange": (jnp.bool_, (2, 4)),
    }


def test_random_score_depends_on_the_seed_alone():
    kernels = [jnp.zeros((3, 3, 8, 4))]
    first, again, other = (dj.sparsify.random(kernels, 2, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
