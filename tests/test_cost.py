"""Predicted latency: hand-computed cases of the α-β model, and the profile that feeds it."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from strangers import MODELS

import disco_jax as dj
from disco_jax.cost import Link, Links, predict
from disco_jax.packed import Hop
from disco_jax.plan import CommunicationPlan, ExchangePlan, LayerPlan
from disco_jax.trace import exchanges


def exchange(path, positions, width, wire="int8", nodes=2, **more):
    sends = tuple(tuple(range(width)) for _ in range(nodes))
    hops = tuple(Hop(k, sends) for k in range(1, nodes))
    return ExchangePlan(path, (), positions, 64, wire, hops, **more)


def layer(path, reads, macs):
    return LayerPlan(path, reads, macs, 2 * macs, 0, 0)


def plan(*exchanges, layers=(), nodes=2):
    return CommunicationPlan(nodes, exchanges, tuple(layers))


def test_bytes_and_rounds_and_computation_add_up():
    one = plan(exchange("a", (100, 25), 10, "float32"), layers=[layer("x", "a", 4_000_000)])
    found = predict(one, Link(mbit=8, ms=0.5), gmacs=2)
    assert found.compute_ms == pytest.approx(2.0)
    assert found.link_ms == pytest.approx(2 * 0.5 + 1250 * 4 / 1000)  # 1000 bytes a ms
    assert found.ms == pytest.approx(8.0)
    again = predict(one, Link(mbit=8, ms=0.5), compute_ms=2, examples=3)
    assert again.link_ms == pytest.approx(2 * 0.5 + 3 * 5)


def test_every_piece_of_a_message_waits_for_the_link():
    cut = dataclasses.replace(plan(exchange("a", (100, 40), 10)), message_bytes=400)
    found = predict(cut, Link(mbit=8, ms=0.5), compute_ms=0)
    assert cut.collectives == 3 + 1
    assert found.link_ms == pytest.approx(4 * 0.5 + 1.4)


def test_the_slowest_link_of_a_round_counts():
    one = plan(exchange("a", (100,), 10, nodes=3), nodes=3)
    links = Links(Link(mbit=80, ms=0), {(0, 1): Link(mbit=8, ms=0)})
    # One hop holds 0 > 1 (1000 bytes in 1 ms), the other does not (0.1 ms).
    assert predict(one, links, compute_ms=0).link_ms == pytest.approx(1.1)


def test_gathers_go_round_the_ring():
    gathered = ExchangePlan("g", (), (10,), 40, "float32", (), gathered=10)
    found = predict(plan(gathered, nodes=4), Link(mbit=8, ms=0.1), compute_ms=0)
    assert found.link_ms == pytest.approx(3 * (0.1 + 0.4))


def test_a_bucket_swallows_what_it_holds_and_fills_while_nodes_compute():
    link = Link(mbit=8, ms=0, burst=1000)
    two = (exchange("a", (100,), 10), exchange("b", (100,), 10))
    busy = plan(*two, layers=[layer("x", "a", 0), layer("y", "b", 0)])
    # The image before has left the bucket empty.
    assert predict(busy, link, compute_ms=0).link_ms == pytest.approx(2.0)
    half = plan(*two, layers=[layer("x", "a", 100), layer("y", "b", 0)])
    found = predict(half, link, compute_ms=0.5)
    assert [e.ms for e in found.exchanges] == pytest.approx([1, 0.5])
    ends = plan(*two, layers=[layer("x", "a", 50), layer("y", "b", 50)])
    assert predict(ends, link, compute_ms=2).link_ms == pytest.approx(0)


def test_a_burst_travels_at_the_peak_rate_and_the_rest_waits_for_tokens():
    link = Link(mbit=8, ms=0, burst=400, peak_mbit=80)
    one = plan(exchange("a", (100,), 10), layers=[layer("x", "a", 100)])
    # 600 of 1000 bytes wait for tokens, 1000 a ms; the bucket is full again after 0.4 ms.
    assert predict(one, link, compute_ms=0.4).link_ms == pytest.approx(0.6)
    large = dataclasses.replace(link, burst=1000)  # all at once, 10,000 a ms
    assert predict(one, large, compute_ms=1).link_ms == pytest.approx(0.1)
    slower = dataclasses.replace(large, peak_mbit=4)  # than the rate: there is no burst
    assert predict(one, slower, compute_ms=9).link_ms == pytest.approx(1)


def test_nodes_wait_for_the_slower_one():
    """A tenth of what lies before a message, and nothing for what comes after the last."""
    hop = Hop(1, ((0,), (1,)))
    path = ("a", "b")
    exchanges = tuple(ExchangePlan(p, (p,), (1,), 4, "int8", (hop,)) for p in path)
    layers = tuple(LayerPlan(p, p, 10, 20, 0, 0) for p in path)
    plan = CommunicationPlan(2, exchanges, layers)
    found = predict(plan, Link(mbit=8000, ms=1, jitter=0.1), compute_ms=10)
    assert [e.ms for e in found.exchanges] == pytest.approx([1, 1.5], rel=1e-4)
    assert predict(plan, Link(mbit=8000, ms=1), compute_ms=10).ms == pytest.approx(12, rel=1e-4)


@pytest.mark.parametrize("given", [{}, {"compute_ms": 1.0, "gmacs": 1.0}])
def test_one_measure_of_computation_is_needed(given):
    with pytest.raises(dj.DiscoError, match="exactly one of `compute_ms`"):
        predict(plan(), Link(mbit=8), **given)


def test_a_link_without_a_rate_is_refused():
    with pytest.raises(dj.DiscoError, match="must have positive rates"):
        Link(mbit=0)
    with pytest.raises(dj.DiscoError, match="no negative latency"):
        Link(mbit=1, jitter=-0.1)


def frozen(nodes, emulate, wire_dtype):
    mesh = dj.NodeMesh(nodes, emulate=emulate)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, 0.5)
    images = np.zeros((1, 32, 32, 3), np.float32)
    return dj.freeze(model, images, wire_dtype=wire_dtype), images


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize(("nodes", "wire_dtype"), [(2, "int8"), (4, "float32")])
def test_the_share_of_a_node_computes_what_the_plan_says(nodes, wire_dtype, emulate):
    model, images = frozen(nodes, emulate, wire_dtype)
    for node in range(nodes):
        alone = dj.plan.share(model, node)
        lowered = alone.lower(images)
        assert dj.plan.collectives(lowered.compile()) == ()
        convolutions = lowered.cost_analysis()["flops"] / 2
        assert convolutions == pytest.approx(model.plan.macs_per_node, rel=0.25)
        assert alone(images).shape[0] == 1


@pytest.mark.parametrize("name", ["edsr", "mobilenet"])
def test_a_share_reads_its_own_channels(name):
    """Depthwise layers, and one that computes parts of an image."""
    mesh, images = dj.NodeMesh(2, emulate=True), np.zeros((1, 16, 16, 3), np.float32)
    if name == "edsr":
        options = {"width": 8, "depth": 1, "parts": True}
        model = dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **options)
    else:
        model = dj.distribute(MODELS[name](rngs=nnx.Rngs(0)), mesh, images)
    frozen = dj.freeze(model, images)
    flops = dj.plan.share(frozen, 0).lower(images).cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(frozen.plan.macs_per_node, rel=0.3)


def test_profile_measures_every_link_and_exchange():
    model, images = frozen(2, False, "int8")
    found = dj.runtime.profile(model, images, iterations=3)
    assert set(found.links.pairs) == {(0, 1), (1, 0)}
    assert set(found.exchanges_ms) == {e.path for e in model.plan.exchanges if e.hops}
    assert all(ms > 0 for ms in found.exchanges_ms.values())
    assert found.measured_ms > 0
    # On a busy machine a small message may add nothing that can be measured.
    assert 0 < found.compute_ms <= found.predicted.ms
    assert all(link.mbit > 0 and link.ms >= 0 for link in found.links.pairs.values())
    assert "rate (Mbit/s)" in str(found)


def test_profile_of_an_emulated_model_is_refused():
    model, images = frozen(2, True, "float32")
    with pytest.raises(dj.DiscoError, match="has no links"):
        dj.runtime.profile(model, images)


@pytest.mark.parametrize(("nodes", "mbit"), [(2, 2), (2, 20), (4, 5)])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_latency_budget_is_met_and_spent(nodes, mbit, share):
    mesh = dj.NodeMesh(nodes, emulate=True)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=12, width=16, rngs=nnx.Rngs(0))
    images = np.zeros((2, 32, 32, 3), np.float32)
    link = Link(mbit=mbit, ms=0.05)

    def latency():
        plan = dj.freeze(model, images, wire_dtype="int8").plan
        return predict(plan, link, gmacs=5, examples=2).ms

    dense = latency()
    dj.sparsify.prune(model, 0.0)
    least = latency()
    wanted = least + share * (dense - least)
    budget = dj.cost.latency_budget(model, images, wanted, link, gmacs=5)
    dj.sparsify.prune(model, 0.0, "random", budget=budget)
    assert 0.9 * wanted < latency() <= wanted * 1.001


def test_time_for_everything_buys_everything():
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    images = np.zeros((1, 32, 32, 3), np.float32)
    budget = dj.cost.latency_budget(model, images, 1e6, Link(mbit=10), gmacs=5)
    dj.sparsify.prune(model, 0.0, budget=budget)
    assert all(e.mask[...].all() for e in exchanges(model).values())


def test_too_little_time_is_refused():
    model = dj.layers.Conv(8, 8, (3, 3), mesh=dj.NodeMesh(2, emulate=True), rngs=nnx.Rngs(0))
    images = np.zeros((1, 64, 64, 8), np.float32)
    with pytest.raises(dj.DiscoError, match=r"`ms` \(=0.1\) must be more than the"):
        dj.cost.latency_budget(model, images, 0.1, Link(mbit=10), gmacs=0.01)
