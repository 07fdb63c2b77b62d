"""The planner: densities and wire dtypes that meet a latency at the least loss."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.cost import Link, plan_latency, planner, predict


def resnet(nodes):
    mesh = dj.NodeMesh(nodes, emulate=True)
    return dj.models.create("resnet8", mesh=mesh, num_classes=12, width=16, rngs=nnx.Rngs(0))


IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
GMACS = 5


def latency(model, link, **options):
    return predict(dj.freeze(model, IMAGES, **options).plan, link, gmacs=GMACS)


@pytest.mark.parametrize(("nodes", "mbit"), [(2, 5), (4, 20)])
def test_a_plan_meets_its_latency_and_the_packed_model_has_it(nodes, mbit):
    model, link = resnet(nodes), Link(mbit=mbit, ms=0.05)
    dense = latency(model, link, wire_dtype="float16").ms
    least = plan_latency(model, IMAGES, 1e6, link, gmacs=GMACS).fixed_ms
    kept = []
    for share in (0.05, 0.2, 0.6):
        wanted = least + share * (dense - least)
        planned = plan_latency(model, IMAGES, wanted, link, gmacs=GMACS)
        assert 0.9 * wanted < planned.ms <= wanted * 1.001
        pruned = nnx.clone(model)
        dj.sparsify.prune(pruned, 0.0, rules=planned.rules)
        found = latency(pruned, link, wire_dtype=planned.wire_rules)
        assert found.ms == pytest.approx(planned.ms, rel=0.03)
        kept.append(np.prod([c.kept for c in planned.choices.values()]))
    assert kept == sorted(kept)
    assert "latency" in str(planned)


@pytest.mark.parametrize("parts", [False, True])
def test_results_cost_what_they_travel_in(parts):
    """Of an enlarged image in float16, the parts of all nodes or the channels of each."""
    mesh, link = dj.NodeMesh(2, emulate=True), Link(mbit=8, ms=0)
    options = {"width": 8, "depth": 1, "parts": parts, "result_dtype": "float16"}
    model = dj.models.create("edsr", mesh=mesh, rngs=nnx.Rngs(0), **options)
    images = IMAGES[:, :8, :8]
    wanted = 1.001e-3 * dj.freeze(model, images, wire_dtype="int8").plan.traffic_bytes / 2
    planned = plan_latency(model, images, wanted, link, gmacs=1e9, wire_dtypes=("int8",))
    assert {c.density for c in planned.choices.values()} == {1.0}
    assert planned.ms == pytest.approx(wanted, rel=2e-3)


def test_time_for_everything_buys_everything_as_exactly_as_may_be():
    dtypes = ("int4", "float16")
    planned = plan_latency(resnet(2), IMAGES, 1e6, Link(mbit=10), gmacs=GMACS, wire_dtypes=dtypes)
    assert {c.density for c in planned.choices.values()} == {1.0}
    assert {c.wire_dtype for c in planned.choices.values()} == {"float16"}


def test_little_time_is_spent_on_coarse_numbers():
    model, link = resnet(2), Link(mbit=1, ms=0.05)
    least = plan_latency(model, IMAGES, 1e6, link, gmacs=GMACS).fixed_ms
    planned = plan_latency(model, IMAGES, least + 30, link, gmacs=GMACS)
    dtypes = [c.wire_dtype for c in planned.choices.values() if c.density > 0]
    assert dtypes.count("int4") > len(dtypes) / 2


def test_a_floor_keeps_every_layer_talking():
    model, link = resnet(2), Link(mbit=2, ms=0.05)
    least = plan_latency(model, IMAGES, 1e6, link, gmacs=GMACS).fixed_ms
    planned = plan_latency(model, IMAGES, least + 30, link, gmacs=GMACS, floor=0.1)
    assert all(c.density >= 0.1 for c in planned.choices.values())
    with pytest.raises(dj.DiscoError, match=r"`floor` \(=0.9\) takes"):
        plan_latency(model, IMAGES, least + 1, link, gmacs=GMACS, floor=0.9)


def test_too_little_time_is_refused():
    with pytest.raises(dj.DiscoError, match=r"`ms` \(=0.1\) must be more than the"):
        plan_latency(resnet(2), IMAGES, 0.1, Link(mbit=10), gmacs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_choices_are_close_to_the_best_of_all(seed):
    """Against every combination of a small problem."""
    rng = np.random.default_rng(seed)

    def option(dtype, size, noise):
        worth = np.concatenate([[0], np.cumsum(np.sort(rng.random(4))[::-1])])
        return planner._Option(
            dtype, np.arange(5), worth * (1 - noise), np.arange(5) * size + 0.3 * (np.arange(5) > 0)
        )

    options = {
        str(i): [option("int4", rng.uniform(0.5, 2), 0.1), option("int8", rng.uniform(1, 4), 0.0)]
        for i in range(3)
    }
    left = 6.0
    chosen = planner._fill(options, planner._solve(options, left), left)
    assert planner._seconds(chosen) <= left
    every = itertools.product(
        *[[(o, i) for o in each for i in range(5)] for each in options.values()]
    )
    best = max(
        sum(o.worth[i] for o, i in choice)
        for choice in every
        if sum(o.seconds[i] for o, i in choice) <= left
    )
    assert sum(o.worth[i] for o, i in chosen.values()) >= 0.9 * best


def test_rounding_costs_what_is_measured():
    model = resnet(2)
    noise = {d: planner._noise(model, jax.numpy.asarray(IMAGES), d) for d in ("int4", "int8")}
    assert all(0 < noise["int8"][p] < noise["int4"][p] < 0.1 for p in noise["int4"])
