"""Gates: gradients, noise, the traffic constraint, and what is left when they close."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import meshes, randomize

import disco_jax as dj
from disco_jax.partition import owned
from disco_jax.sparsify import gates
from disco_jax.trace import exchanges


class Two(nnx.Module):
    def __init__(self, mesh, width=16):
        self.a = dj.layers.Dense(width, width, mesh=mesh, rngs=nnx.Rngs(0))
        self.b = dj.layers.Dense(width, 4, mesh=mesh, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def gated(mesh, kind="straight_through", **options):
    model = Two(mesh)
    dj.name_exchanges(model)
    randomize(model)
    images = jax.random.normal(jax.random.key(0), (64, 16))
    gates.attach(model, kind, dj.sparsify.wire_costs(model, images), **options)
    return model, images


@pytest.mark.parametrize("kind", gates.KINDS)
def test_distributed_is_emulated(kind):
    results = []
    for mesh in meshes(2):
        model, images = gated(mesh, kind)
        model.train()

        @nnx.jit
        def grads(model, images=images):
            return nnx.grad(lambda m: jnp.sum(m(images) ** 2) + gates.penalty(m, 0.2))(model)

        results.append(jax.tree.map(np.asarray, nnx.to_pure_dict(grads(model))))
    chex_like = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), *results)
    assert max(jax.tree.leaves(chex_like)) < 1e-5


def test_straight_through_gradient_by_hand():
    """Forward 0 or 1, backward the gradient of the sigmoid; weights behind 0 get none."""
    mesh = dj.NodeMesh(2, emulate=True)
    layer = dj.layers.Dense(2, 2, mesh=mesh, use_bias=False, rngs=nnx.Rngs(0))
    dj.name_exchanges(layer)
    layer.kernel.set_value(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    gates.attach(layer, "straight_through", {"exchange": 1.0})
    layer.exchange.gate.logits.set_value(jnp.array([[0.0, -1.0], [1.0, 0.0]]))
    x = jnp.array([[1.0, 10.0]])
    # Node 0 reads channel 0 only; node 1 both.
    np.testing.assert_allclose(layer(x), [[1.0, 42.0]])
    grads = nnx.grad(lambda m: m(x).sum())(layer)
    slope = lambda a: jax.nn.sigmoid(a) * (1 - jax.nn.sigmoid(a))  # noqa: E731
    logits = grads.exchange.gate.logits[...]
    np.testing.assert_allclose(logits[0, 1], 3.0 * 10.0 * slope(-1.0), rtol=1e-6)
    np.testing.assert_allclose(logits[1, 0], 2.0 * 1.0 * slope(1.0), rtol=1e-6)
    np.testing.assert_allclose(grads.kernel[...], [[1.0, 1.0], [0.0, 10.0]])


def test_hard_concrete_follows_its_distribution():
    gate = gates.Gate("hard_concrete", jnp.full((2, 2000), 0.5), cost=1.0, seed=3)
    mask = jnp.ones((2, 2000), bool)
    first, second = gate(mask), gate(mask)
    assert not np.array_equal(first, second)
    remote = ~owned(2000, 2)
    share = float((np.asarray(first)[remote] > 0).mean())
    assert share == pytest.approx(float(gate.probability()[remote].mean()), abs=0.03)
    gate.eval()
    np.testing.assert_array_equal(gate(mask), gate(mask))
    assert gate.deterministic


@pytest.mark.parametrize("kind", gates.KINDS)
def test_traffic_meets_the_budget_and_the_task_is_learned(kind):
    model, x = gated(dj.NodeMesh(2, emulate=True), kind)
    y = jnp.stack([x[:, 0] + x[:, 9], x[:, 1], x[:, 2] + x[:, 15], x[:, 8]], -1)
    tx = optax.multi_transform(
        {"weights": optax.adam(1e-2), "gates": optax.adam(5e-2)}, gates.is_gate
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean((m(x) - y) ** 2) + gates.penalty(m, 0.25)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    model.train()
    for _ in range(1000):
        step(model, optimizer)
    assert float(gates.open_share(model)) == pytest.approx(0.25, abs=0.1)
    before = model.multiplier[...]
    assert jnp.isfinite(before)
    gates.close(model, 0.25)
    remote = sum(int(e.mask[...].sum()) - e.channels for e in exchanges(model).values())
    assert remote == 8  # a quarter of 2 * 16 pairs
    assert not hasattr(model, "multiplier")
    assert all(e.gate is None for e in exchanges(model).values())
    assert float(jnp.mean((model(x) - y) ** 2)) < 0.6 * float(jnp.mean(y**2))
    frozen = dj.freeze(model, x)
    np.testing.assert_allclose(frozen(x), model(x), rtol=1e-4, atol=1e-4)


def test_bad_gates():
    with pytest.raises(dj.DiscoError, match=r"`gates` \(='soft'\) must be one of hard_concrete"):
        gated(dj.NodeMesh(2, emulate=True), "soft")
    with pytest.raises(dj.DiscoError, match="`model` has no gates"):
        gates.close(Two(dj.NodeMesh(2, emulate=True)), 0.2)
