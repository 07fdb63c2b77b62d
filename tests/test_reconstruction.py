"""Least squares from calibration images: scores, swaps, weights, statistics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomize

import disco_jax as dj
from disco_jax import sparsify
from disco_jax.sparsify.reconstruction import Problem, _error, as_matrix, eliminate, patches, swap


def problem(rng, channels, outputs, window=1):
    x = rng.normal(size=(400, channels * window)) @ rng.normal(size=(channels * window,) * 2)
    weights = rng.normal(size=(channels * window, outputs))
    return Problem(x.T @ x, x.T @ x, weights)


@pytest.mark.parametrize("window", [1, 3])
def test_the_first_removal_costs_the_least_squares_error(window):
    rng = np.random.default_rng(0)
    one = problem(rng, 6, 4, window)
    scores = eliminate([one], nodes=2, channels=6)
    for node in range(2):
        remote = np.arange(3) + 3 * (1 - node)
        errors = []
        for c in remote:
            row = np.ones(6, bool)
            row[c] = False
            errors.append(_error([one], row, node, 2))
        first = remote[np.argmin(errors)]
        own = one.weights[:, 2 * node : 2 * node + 2]
        energy = np.sum(own * (one.gram @ own))
        assert scores[node, first] == pytest.approx(min(errors) / energy, rel=1e-6)
        assert scores[node, remote].min() == scores[node, first]
        assert not scores[node, 3 * node : 3 * node + 3].any()


def test_a_channel_that_another_repeats_is_worth_nothing():
    x = np.random.default_rng(1).normal(size=(300, 4))
    x[:, 3] = x[:, 2]
    one = Problem(x.T @ x, x.T @ x, np.random.default_rng(2).normal(size=(4, 2)))
    scores = eliminate([one], nodes=2, channels=4)
    assert min(scores[0, 2:]) < 1e-2 * max(scores[0, 2:])


def test_swaps_reach_the_best_set_of_a_small_problem():
    rng = np.random.default_rng(3)
    one = problem(rng, 8, 4)
    start = np.kron(np.eye(2), np.ones((1, 4))).astype(bool)
    start[0, 4:6] = start[1, :2] = True
    found = swap([one], start, rounds=4)
    assert (found.sum(1) == start.sum(1)).all()
    for node in range(2):
        remote = np.arange(4) + 4 * (1 - node)
        best = min(
            _error(
                [one],
                start[node] & False | np.isin(np.arange(8), [*pair, *set(range(8)) - set(remote)]),
                node,
                2,
            )
            for pair in itertools.combinations(remote, 2)
        )
        assert _error([one], found[node], node, 2) <= 1.05 * best


def test_patches_are_what_the_kernel_meets():
    conv = dj.layers.Conv(
        3, 4, (3, 2), (2, 1), padding=1, kernel_dilation=(1, 2), use_bias=False,
        mesh=dj.NodeMesh(1, emulate=True), rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
    product = np.asarray(patches(conv, x)) @ as_matrix(conv.kernel[...])
    np.testing.assert_allclose(product, np.asarray(conv(x)).reshape(-1, 4), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained():
    model = dj.models.create(
        "resnet8", mesh=dj.NodeMesh(2, emulate=True), width=4, num_classes=4, rngs=nnx.Rngs(0)
    )
    randomize(model)
    images = jax.random.normal(jax.random.key(0), (64, 16, 16, 3))
    sparsify.reestimate_statistics(model, [images])
    model.eval()
    return model, images


def test_post_training_beats_magnitude_on_new_images(trained):
    model, images = trained
    new = jax.random.normal(jax.random.key(1), (64, 16, 16, 3))
    wanted = model(new)
    errors = {}
    for name in ("magnitude", "post_training"):
        pruned = nnx.clone(model)
        if name == "magnitude":
            sparsify.prune(pruned, 0.5)
            sparsify.reestimate_statistics(pruned, [images])
        else:
            sparsify.post_training(pruned, [images], 0.5)
        pruned.eval()
        errors[name] = float(jnp.mean((pruned(new) - wanted) ** 2) / jnp.var(wanted))
    assert errors["post_training"] < 0.7 * errors["magnitude"], errors


def test_nothing_changes_at_density_1(trained):
    model, images = trained
    same = nnx.clone(model)
    sparsify.post_training(same, [images], 1.0, local_search=False)
    same.eval()
    np.testing.assert_allclose(same(images), model(images), rtol=2e-2, atol=2e-2)


def test_channel_norms_are_root_mean_squares():
    layer = dj.layers.Dense(4, 4, mesh=dj.NodeMesh(2, emulate=True), rngs=nnx.Rngs(0))
    x = jnp.array([[1.0, 2.0, 0.0, 3.0], [1.0, 0.0, 0.0, 4.0]])
    norms = sparsify.channel_norms(layer, [x, x])["exchange"]
    np.testing.assert_allclose(norms, np.sqrt([1.0, 2.0, 0.0, 12.5]), rtol=1e-6)
    dj.name_exchanges(layer)
    sparsify.prune(layer, 0.5, "activation", norms={"exchange": norms})
    assert not layer.exchange.mask[0, 2]
    with pytest.raises(dj.DiscoError, match=r"`score` 'activation' needs \['norms'\]"):
        sparsify.prune(layer, 0.5, "activation")
