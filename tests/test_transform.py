"""``sparse_exchange`` step by step by hand, and on a task whose cross-node channels are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.partition import owned
from disco_jax.sparsify import apply_masks, gates, sparse_exchange
from disco_jax.sparsify.schedules import SCHEDULES

# Node 0 computes output 0 and owns channels 0 and 1; node 1 output 1, and channels 2 and 3.
KERNEL = np.array([[1, 5], [2, 6], [3, 7], [4, 8.0]], np.float32)


def layer(kernel=KERNEL, nodes=2):
    mesh = dj.NodeMesh(nodes, emulate=True)
    model = dj.layers.Dense(*kernel.shape, mesh=mesh, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(kernel))
    dj.name_exchanges(model)
    return model


def like(params, value):
    return jax.tree.map(lambda p: jnp.asarray(value, p.dtype), params)


def remote(state):
    """The remote channels that nodes 0 and 1 read."""
    mask = np.asarray(state.masks["exchange"])
    return np.flatnonzero(mask[0, 2:]) + 2, np.flatnonzero(mask[1, :2])


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("cubic", [1, 27 / 64, 1 / 8, 1 / 64, 0, 0]),
        ("linear", [1, 3 / 4, 1 / 2, 1 / 4, 0, 0]),
        ("one_shot", [1, 1, 1, 1, 0, 0]),
        ("constant", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_schedules(name, left):
    got = [float(SCHEDULES[name](jnp.asarray(t / 4))) for t in range(6)]
    np.testing.assert_allclose(got, left, atol=1e-7)


def test_gradient_regrowth_by_hand():
    """In update 2 of 3, ``turnover (1 + cos π/2)/2`` = 1/2 of the budget goes to new pairs."""
    model = layer()
    dj.sparsify.allow_regrowth(model)
    params = nnx.state(model, nnx.Param)
    tx = sparse_exchange(
        optax.sgd(1.0),
        density=0.5,
        steps=3,
        every=1,
        schedule="constant",
        regrow="gradient",
        turnover=1.0,
    )
    state = tx.init(params)
    grads = like(params, [[0, 0], [0, 0], [9.0, 0], [0, 0]])
    kept, weights = [], []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(tuple(map(list, remote(state))))
        weights.append(float(params["kernel"][...][2, 0]))
    # Update 1, all of the budget turned over: none is dropped yet (masks start full), so the pairs
    # with the largest gradient win: channel 2 for node 0 and, with gradients 0, channel 0 for
    # node 1. Channel 2 is read, so it moves by 9 at once, and is worth |3 - 9| = 6 and more. At the
    # end nothing is turned over, and only what is open is compared: node 1 keeps channel 0,
    # although the dropped channel 1 has the larger weight.
    assert kept == [([2], [0]), ([2], [0]), ([2], [0])]
    assert weights == [-6.0, -15.0, -24.0]


@pytest.mark.parametrize("steps", [0, 1, 2, 25])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_choice_is_made_in_update_steps(schedule, steps):
    params = nnx.state(layer(), nnx.Param)
    tx = sparse_exchange(optax.sgd(1.0), density=0.5, steps=steps, every=10, schedule=schedule)
    state, kept = tx.init(params), []
    for _ in range(steps + 2):
        _, state = tx.update(like(params, np.zeros((4, 2))), state, params)
        kept.append(sum(map(len, remote(state))))
    last = max(steps, 1) - 1
    assert kept[last:] == [2] * (steps + 2 - last)
    assert schedule != "one_shot" or kept[:last] == [4] * last


def test_dropped_weights_without_regrowth_stay_where_they_are():
    model = layer()
    params = nnx.state(model, nnx.Param)
    tx = sparse_exchange(optax.sgd(1.0), density=0.5, steps=0)
    state = tx.init(params)
    _, state = tx.update(like(params, np.zeros((4, 2))), state, params)
    apply_masks(model, state)
    grads = nnx.grad(lambda m: m(jnp.ones((1, 4))).sum())(model)
    # Node 0 drops channel 2 (3 < 4), node 1 channel 0 (5 < 6).
    assert np.asarray(grads["kernel"][...]).tolist() == [[1, 0], [1, 1], [0, 1], [1, 1]]
    dj.sparsify.allow_regrowth(model)
    value, grads = nnx.value_and_grad(lambda m: m(jnp.ones((1, 4))).sum())(model)
    assert float(value) == 1 + 2 + 4 + 6 + 7 + 8
    assert np.asarray(grads["kernel"][...]).tolist() == [[1, 1]] * 4


def test_feedback_lets_a_dropped_pair_return():
    model = layer()
    dj.sparsify.allow_regrowth(model)
    params = nnx.state(model, nnx.Param)
    tx = sparse_exchange(
        optax.sgd(1.0), density=0.5, steps=4, every=1, schedule="constant", regrow="feedback"
    )
    state, kept = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(like(params, [[0, 0], [0, 0], [-0.6, 0], [0, 0]]), state, params)
        params = optax.apply_updates(params, updates)
        kept.append(remote(state)[0].tolist())
    # Masks are chosen by the weights before the update: 3, 3.6, 4.2, 4.8 against 4.
    assert kept == [[3], [3], [2], [2]]


def test_growing_lasso_by_hand():
    """``lasso · t/T · w / ‖w‖`` on remote weights, until the masks are final."""
    params = nnx.state(layer(), nnx.Param)
    tx = sparse_exchange(optax.sgd(1.0), density=1.0, steps=3, every=1, lasso=0.5)
    state, zeros = tx.init(params), like(params, np.zeros((4, 2)))
    steps = []
    for _ in range(4):
        updates, state = tx.update(zeros, state, params)
        steps.append(np.asarray(updates["kernel"][...]))
    pull = -0.25 * np.array([[0, 1], [0, 1], [1, 0], [1, 0]])  # w / ‖w‖ = 1 here
    np.testing.assert_allclose(steps, [0 * pull, pull, 0 * pull, 0 * pull], atol=1e-6)


def test_taylor_scores_are_running_means():
    params = nnx.state(layer(), nnx.Param)
    tx = sparse_exchange(optax.sgd(0.0), density=0.5, steps=3, every=1, score="taylor")
    state = tx.init(params)
    first = np.array([[0, 0], [0, 1.0], [2.0, 0], [1.0, 0]], np.float32)
    second = np.array([[0, 3.0], [0, 0], [0, 0], [-8.0, 0]], np.float32)
    mean = np.zeros((2, 4), np.float32)
    for grads in (first, second):
        _, state = tx.update(like(params, grads), state, params)
        mean = 0.9 * mean + 0.1 * np.abs(KERNEL * grads).T
        np.testing.assert_allclose(state.scores["exchange"], mean, rtol=1e-5)


def test_multi_transform_and_frozen_parameters():
    class Two(nnx.Module):
        def __init__(self):
            mesh = dj.NodeMesh(2, emulate=True)
            self.a = dj.layers.Dense(4, 4, mesh=mesh, rngs=nnx.Rngs(0))
            self.b = dj.layers.Dense(4, 4, mesh=mesh, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.b(self.a(x))

    model = Two()
    dj.name_exchanges(model)
    tx = sparse_exchange(
        optax.multi_transform(
            {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()},
            lambda params: jax.tree.map_with_path(
                lambda path, _: "train" if "'b'" in jax.tree_util.keystr(path) else "freeze",
                params,
            ),
        ),
        density=0.5,
        steps=optax.linear_schedule(0, 3, 3)(3).astype(int).item(),
        every=1,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.a.kernel[...])
    for _ in range(4):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))(model)
        optimizer.update(model, grads)
        apply_masks(model, optimizer.opt_state)
    np.testing.assert_array_equal(model.a.kernel[...], before)
    assert int(model.a.exchange.mask[...].sum()) == 4 + 2


# --- a task whose cross-node channels are known ---------------------------------------------------

NODES, WIDTH, DENSITY = 4, 32, 0.25


def planted(seed):
    """Inputs, targets, and the mask behind them: 2 of 8 channels from every node to every other.

    Inputs are correlated within and across nodes, so that a wrong channel helps a little.
    """
    rng = np.random.default_rng(seed)
    block = WIDTH // NODES
    mask = np.asarray(owned(WIDTH, NODES)).copy()
    for reader in range(NODES):
        for owner in set(range(NODES)) - {reader}:
            mask[reader, owner * block + rng.choice(block, 2, replace=False)] = True
    kernel = rng.normal(size=(WIDTH, WIDTH)) * np.repeat(mask, block, axis=0).T
    mix = np.eye(WIDTH) + 0.3 * rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
    x = rng.normal(size=(2048, WIDTH)) @ mix
    y = np.maximum(x @ kernel, 0) + 0.5 * rng.normal(size=(2048, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), mask


def recall(found, true):
    distant = ~np.asarray(owned(WIDTH, NODES))
    assert (np.asarray(found) & distant).sum() == (true & distant).sum()
    return (np.asarray(found) & true & distant).sum() / (true & distant).sum()


def train(model, tx, x, y, loss, steps=400):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        grads = nnx.grad(lambda m: loss(m, x, y))(model)
        optimizer.update(model, grads)
        apply_masks(model, optimizer.opt_state)

    for i in range(steps):
        rows = np.random.default_rng(i).integers(0, len(x), 128)
        step(model, optimizer, x[rows], y[rows])


def squares(model, x, y):
    return jnp.mean((nnx.relu(model(x)) - y) ** 2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "l1", "schedule": "linear"},
        {"score": "taylor"},
        {"regrow": "gradient"},
        {"regrow": "feedback"},
        {"lasso": 1e-3},
        {"budget": "by_cost", "costs": {"exchange": 4.0}, "level": False},
    ],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_planted_support_is_found(options, seed):
    x, y, true = planted(seed)
    model = layer(np.random.default_rng(seed + 9).normal(size=(WIDTH, WIDTH)) / 20, NODES)
    if "regrow" in options:
        dj.sparsify.allow_regrowth(model)
    tx = sparse_exchange(optax.adam(2e-2), density=DENSITY, steps=300, every=10, **options)
    train(model, tx, x, y, squares)
    assert recall(model.exchange.mask[...], true) >= 0.95


@pytest.mark.parametrize("kind", gates.KINDS)
def test_gates_find_the_planted_support(kind):
    x, y, true = planted(0)
    model = layer(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)) / 20, NODES)
    gates.attach(model, kind, {"exchange": 4.0})
    tx = optax.multi_transform(
        {"weights": optax.adam(1e-2), "gates": optax.adam(2e-2)}, gates.is_gate
    )
    model.train()
    train(model, tx, x, y, lambda m, x, y: squares(m, x, y) + gates.penalty(m, DENSITY), 800)
    gates.close(model, DENSITY, level=False)
    assert recall(model.exchange.mask[...], true) >= 0.95


def test_chance_does_not_find_it():
    x, y, true = planted(0)
    model = layer(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)) / 20, NODES)
    tx = sparse_exchange(optax.adam(1e-2), density=DENSITY, steps=10, score="random")
    train(model, tx, x, y, squares, steps=20)
    assert recall(model.exchange.mask[...], true) < 0.6
