"""The planner: splits, densities and wire dtypes that are best under limits."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.cost import Link, plan_splits, predict, worth
from disco_jax.cost.search import LOSS, SECONDS, WEIGHTS, Edge, Search
from disco_jax.models.convnext import ConvNeXt
from disco_jax.trace import exchanges, name_exchanges

IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
SHAPE = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
GMACS = 5


def resnet(nodes):
    mesh = dj.NodeMesh(nodes, emulate=True)
    return dj.models.create("resnet8", mesh=mesh, num_classes=12, width=16, rngs=nnx.Rngs(0))


def frozen_plan(model, images, planned):
    """What becomes of a model that is split, pruned and frozen as planned."""
    model = nnx.clone(model)
    dj.split(model, images, planned.rows, wire_dtype=planned.row_dtype)
    if planned.rules:  # else all is split by rows
        dj.sparsify.prune(model, 0.0, rules=planned.rules)
    return dj.freeze(model, images, wire_dtype=planned.wire_rules).plan


def channels(model, link, **options):
    return plan_splits(model, SHAPE, link, gmacs=GMACS, rows=False, **options)


@pytest.mark.parametrize(("nodes", "mbit"), [(2, 5), (4, 20)])
def test_a_plan_by_channels_meets_its_latency_and_the_packed_model_has_it(nodes, mbit):
    model, link = resnet(nodes), Link(mbit=mbit, ms=0.05)
    dense = predict(dj.freeze(model, IMAGES, wire_dtype="float16").plan, link, gmacs=GMACS).ms
    least = channels(model, link).ms
    kept = []
    for share in (0.05, 0.2, 0.6):
        wanted = least + share * (dense - least)
        planned = channels(model, link, minimise="loss", ms=wanted)
        assert 0.9 * wanted < planned.ms <= wanted * 1.001
        found = predict(frozen_plan(model, IMAGES, planned), link, gmacs=GMACS)
        assert found.ms == pytest.approx(planned.ms, rel=0.03)
        kept.append(planned.kept)
    assert kept == sorted(kept)
    assert "latency" in str(planned)


NETWORKS = {
    "resnet20": ({"width": 16}, (32, 32)),
    "mobilenet_v2": (
        {"stages": ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 2, 2)), "num_classes": 5},
        (96, 64),
    ),
    "deeplabv3_resnet18": ({"width": 8, "head_width": 16}, (65, 48)),
    "lraspp_resnet18": ({"width": 8}, (65, 48)),
    "edsr": ({"width": 8, "depth": 2, "parts": True}, (24, 16)),
    "rcan": ({"width": 16, "groups": 1, "depth": 2, "reduction": 4}, (24, 16)),
    "ssd_resnet18": ({"width": 8, "num_classes": 3}, (320, 320)),
    "convnext": ({"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32), "num_classes": 4}, (32, 32)),
    "vit_micro": ({"image_size": 16}, (16, 16)),
}


QUICK = ("resnet20", "mobilenet_v2", "lraspp_resnet18", "edsr")
CASES = [
    pytest.param(name, nodes, marks=[pytest.mark.slow] * (name not in QUICK or nodes > 2))
    for name in NETWORKS
    for nodes in (2, 3)
]


@pytest.mark.parametrize(("name", "nodes"), CASES)
def test_what_is_planned_is_what_freezes(name, nodes):
    """Latency and memory of every kind of split, on links where each has its place."""
    options, size = NETWORKS[name]
    make = ConvNeXt if name == "convnext" else partial(dj.models.create, name)
    model = make(mesh=dj.NodeMesh(nodes, emulate=True), rngs=nnx.Rngs(0), **options)
    name_exchanges(model)
    model.eval()
    images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    kinds = set()
    for mbit, alpha, memory, density, dtypes in (
        (3, 0.05, 1.1, 0.8, ("float16",)),
        (3, 0.05, 0.7, 0.3, ("int4", "int8")),
        (1000, 1e-4, 0.55, 0.5, ("int8", "float32")),
    ):
        link, wanted = Link(mbit=mbit, ms=alpha), {"density": density, "wire_dtypes": dtypes}
        least = plan_splits(model, shape, link, gmacs=2, minimise="memory", **wanted).memory
        most = max(memory, 1.05 * least)
        planned = plan_splits(model, shape, link, gmacs=2, memory=most, **wanted)
        plan = frozen_plan(model, images, planned)
        kinds |= {e.split for e in plan.exchanges if e.hops}
        predicted = predict(plan, link, gmacs=2)
        assert planned.ms == pytest.approx(predicted.ms, rel=0.05)
        weights = plan.weight_bytes_per_node / plan.single_node_weight_bytes
        assert planned.memory == pytest.approx(weights, rel=0.03)
        assert planned.memory <= most
        for kind in {"channels only", "rows where there are any"} & planned.alternatives.keys():
            other = planned.alternatives[kind]
            assert planned.ms <= other.ms * 1.002 or planned.memory < other.memory
        assert list(planned.front) == sorted(planned.front, key=lambda p: p.memory)
    by_rows = name not in ("convnext", "vit_micro")
    assert ("rows" in kinds) == by_rows


def test_rows_come_first_where_maps_are_large_and_weights_few():
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("resnet50", mesh=mesh, rngs=nnx.Rngs(0))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    wanted = {"memory": 0.45, "density": 0.2, "wire_dtypes": ("int8",)}
    planned = plan_splits(model, images, Link(100, 0.2), gmacs=45, **wanted)
    assert {"conv", "blocks.0.conv1", "blocks.3.conv2"} <= set(planned.layers)
    assert not any(path.startswith(("blocks.14", "blocks.15")) for path in planned.layers)
    only = planned.alternatives["channels only"]
    assert planned.ms < 0.8 * only.ms
    assert planned.memory <= 0.45
    assert planned.kept > only.kept


def test_one_node_alone_is_what_the_plan_of_one_node_takes():
    link = Link(mbit=5, ms=0.05, jitter=0.1)
    alone = plan_splits(resnet(2), IMAGES, link, gmacs=GMACS).alternatives["one node alone"]
    found = predict(dj.freeze(resnet(1), IMAGES).plan, link, gmacs=GMACS).ms
    assert alone.ms == pytest.approx(found, rel=0.01)


def test_each_total_is_minimised_under_limits_of_the_others():
    model, link = resnet(2), Link(mbit=5, ms=0.05)
    fast = plan_splits(model, IMAGES, link, gmacs=GMACS, density=0.3)
    small = plan_splits(
        model, IMAGES, link, gmacs=GMACS, density=0.3, minimise="memory", ms=1.3 * fast.ms
    )
    good = plan_splits(
        model, IMAGES, link, gmacs=GMACS, minimise="loss", ms=1.3 * fast.ms, memory=small.memory
    )
    assert small.memory < fast.memory
    assert small.ms <= 1.3 * fast.ms
    assert good.memory <= small.memory * 1.0001


def test_time_for_everything_buys_everything_as_exactly_as_may_be():
    planned = channels(
        resnet(2), Link(mbit=10), minimise="loss", ms=1e6, wire_dtypes=("int4", "float16")
    )
    assert {c.density for c in planned.choices.values()} == {1.0}
    assert {c.wire_dtype for c in planned.choices.values()} == {"float16"}


def test_little_time_is_spent_on_coarse_numbers():
    model, link = resnet(2), Link(mbit=1, ms=0.05)
    planned = channels(model, link, minimise="loss", ms=channels(model, link).ms + 30)
    dtypes = [c.wire_dtype for c in planned.choices.values() if c.density > 0]
    assert dtypes.count("int4") > len(dtypes) / 2


def test_a_density_keeps_every_layer_talking():
    model, link = resnet(2), Link(mbit=2, ms=0.05)
    least = channels(model, link, density=0.1).ms
    planned = channels(model, link, minimise="loss", ms=least + 30, density=0.1)
    assert all(c.density >= 0.1 for c in planned.choices.values())
    with pytest.raises(dj.DiscoError, match=r"`ms` \(=.*\) cannot be met: the least possible is"):
        channels(model, link, minimise="loss", ms=least + 1, density=0.9)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"ms": 0.1}, r"`ms` \(=0.1\) cannot be met: the least possible is \d"),
        ({"memory": 0.2}, r"`memory` \(=0.2\) cannot be met: the least possible is 0.25\d of the"),
        ({"ms": -1}, r"`ms` \(=-1\) must be positive"),
        ({"density": 2}, r"`density` \(=2\) must be between 0 and 1"),
        ({"minimise": "bytes"}, r"`minimise` \(='bytes'\) must be one of ms, memory, loss"),
    ],
)
def test_what_cannot_be_met_is_refused(limits, message):
    limits = {"minimise": "loss"} | limits
    with pytest.raises(dj.DiscoError, match=message):
        plan_splits(resnet(2), IMAGES, Link(mbit=10), gmacs=0.05, **limits)


def test_a_model_that_is_split_already_is_refused():
    model = resnet(2)
    dj.split(model, IMAGES, ["^conv$", r"blocks\.0"])
    with pytest.raises(dj.DiscoError, match="is split by rows already; plan for the model before"):
        plan_splits(model, IMAGES, Link(mbit=10), gmacs=GMACS)


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_close_to_the_best_of_all(seed):
    """Against every combination of a small problem: units that fork and join again."""
    rng = np.random.default_rng(seed)
    pairs = [(0, 1), (1, 1), (1, 2), (2, 1), (1, 3), (3, 4)]
    splits = [(1,), (0, 1), (0, 1), (0, 1), (0,)]

    def options():
        found = rng.uniform(0.1, 1, (3, 4))
        found[2] = np.sort(found[2])
        found[0] = np.sort(found[0])[::-1]  # what keeps more takes longer
        return found

    edges = []
    for a, b in pairs:
        both = itertools.product(splits[a], splits[b])
        edges.append(Edge(a, b, {p: options() for p in both if a != b or p[0] == p[1]}))
    every = []
    for chosen in itertools.product(*splits):
        each = [e.options[chosen[e.source], chosen[e.target]].T for e in edges]
        every += [sum(picked) for picked in itertools.product(*each)]
    every = np.array(every)
    limits = {WEIGHTS: np.quantile(every[:, 1], 0.2), LOSS: np.quantile(every[:, 2], 0.2)}
    met = (every[:, 1] <= limits[WEIGHTS]) & (every[:, 2] <= limits[LOSS])
    best = every[met, 0].min()
    found = Search(splits, edges).least(SECONDS, limits)
    assert all(found.totals[which] <= most for which, most in limits.items())
    again = sum(
        e.options[found.splits[e.source], found.splits[e.target]][:, i]
        for e, i in zip(edges, found.chosen, strict=True)
    )
    np.testing.assert_allclose(found.totals, again)
    assert best <= found.totals[0] + 1e-9 <= 1.15 * best + 1e-9
    alone = Search(splits, edges).least(SECONDS, {})
    assert alone.totals[0] == pytest.approx(every[:, 0].min())


def test_rounding_costs_what_is_measured():
    model = resnet(2)
    noise = worth.rounding_noise(model, jnp.asarray(IMAGES), ("int4", "int8"))
    assert noise.keys() == exchanges(model).keys()
    assert all(0 < of["int8"] < of["int4"] < 0.1 for of in noise.values())
