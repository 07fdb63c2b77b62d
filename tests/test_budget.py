"""Budgets of whole models: totals, floors, charges, links, rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import disco_jax as dj
from disco_jax.partition import owned
from disco_jax.plan.freeze import plan_hops
from disco_jax.sparsify import Choice, by_cost, per_link, relative, uniform

COSTS = {"early": 16.0, "middle": 4.0, "late": 1.0}


def some_scores(nodes, block, seed):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.random((nodes, nodes * block * k)), jnp.float32)
        for k, path in enumerate(COSTS, 1)
    }


def spent(masks, fill=False):
    """Bytes; with fill as a plan counts them."""
    total = 0.0
    for path, mask in masks.items():
        mask = np.asarray(mask)
        kept = (mask & ~owned(mask.shape[1], mask.shape[0])).sum()
        if fill:
            kept = sum(hop.width * len(hop.pairs) for hop in plan_hops(mask))
        total += COSTS[path] * kept
    return total


def dense(scores):
    return sum(COSTS[p] * (len(s) - 1) * s.shape[1] for p, s in scores.items())


@settings(max_examples=30, deadline=None)
@given(
    nodes=st.sampled_from([2, 3]),  # each pair of nodes and block is compiled anew
    block=st.sampled_from([1, 4]),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
    budget=st.sampled_from([uniform, by_cost]),
)
def test_the_total_is_met_and_never_passed(nodes, block, density, seed, budget):
    scores = some_scores(nodes, block, seed)
    masks = budget(scores, COSTS, dict.fromkeys(scores, density))
    total = density * dense(scores)
    assert spent(masks) <= total * (1 + 1e-4) + 1e-2
    assert spent(masks, fill=True) == spent(masks), "packing needs fill"
    # What is left does not buy the cheapest column.
    full = spent(masks) >= dense(scores) * (1 - 1e-6)
    if budget is by_cost and not full:
        assert total - spent(masks) < nodes * max(COSTS.values())
    if budget is uniform:  # within one column of the share of each exchange
        for path, mask in masks.items():
            kept = float(mask.sum()) - scores[path].shape[1]
            wanted = density * (nodes - 1) * scores[path].shape[1]
            assert abs(kept - wanted) <= nodes * (1 + 1e-3)


def test_uniform_gives_the_remainder_to_the_largest_shares_first():
    scores = {p: jnp.ones((2, 6)) for p in "abc"}
    masks = uniform(scores, dict.fromkeys("abc", 1.0), {"a": 0.5, "b": 0.6, "c": 0.4})
    # 1.5, 1.8 and 1.2 columns: one each, and 1.5 columns left: b first, nothing for half a column.
    assert {p: int(m.sum()) - 6 for p, m in masks.items()} == {"a": 2, "b": 4, "c": 2}


def test_uniform_without_costs_rounds_down():
    """What a channel costs is not known: spreading the rest could cost more than it left."""
    scores = {p: jnp.ones((2, 6)) for p in "abc"}
    masks = uniform(scores, None, {"a": 0.5, "b": 0.6, "c": 0.4})
    assert {p: int(m.sum()) - 6 for p, m in masks.items()} == {"a": 2, "b": 2, "c": 2}


def test_by_cost_is_the_best_choice_of_columns():
    """Against all subsets of a small problem in which greed is optimal (equal prices)."""
    rng = np.random.default_rng(0)
    scores = {p: jnp.asarray(rng.random((2, 4)), jnp.float32) for p in ("a", "b")}
    masks = by_cost(scores, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5})
    columns = []
    for path in scores:
        s = np.asarray(scores[path])
        columns += sorted(s[0, 2:], reverse=True) + np.zeros(0).tolist()
    worth = sorted(
        (a + b)
        for s in map(np.asarray, scores.values())
        for a, b in zip(sorted(s[0, 2:]), sorted(s[1, :2]), strict=True)
    )
    remote = ~owned(4, 2)
    got = sum(
        float((np.asarray(masks[p]) * remote * np.asarray(s)).sum()) for p, s in scores.items()
    )
    assert got == pytest.approx(sum(worth[-2:]), rel=1e-6)


def test_by_cost_floor_keeps_every_exchange_talking():
    scores = some_scores(2, 8, 0)
    scores["early"] *= 1e-3
    density = dict.fromkeys(scores, 0.25)
    silent = by_cost(scores, COSTS, density)
    talking = by_cost(scores, COSTS, density, floor=0.5)
    assert int(silent["early"].sum()) == scores["early"].shape[1]
    assert int(talking["early"].sum()) - scores["early"].shape[1] == 2  # an eighth of 8 columns
    assert spent(talking) <= 0.25 * dense(scores) * (1 + 1e-4)


def test_a_charge_makes_whole_exchanges_vanish():
    scores = {str(i): jnp.full((2, 8), 1.0 + (i < 3)) for i in range(6)}
    costs = dict.fromkeys(scores, 1.0)
    density = dict.fromkeys(scores, 0.5)
    masks = by_cost(scores, costs, density, charge=6.0)
    kept = {p: int(m.sum()) - 8 for p, m in masks.items()}
    # 24 bytes: three exchanges of 8, charges included 3 * (8 + 6) = 42 > 24; one whole and more.
    assert sum(k + 6.0 * (k > 0) for k in kept.values()) <= 24
    assert 0 < sum(k > 0 for k in kept.values()) <= 2
    free = by_cost(scores, costs, density)
    assert sum(int(m.sum()) - 8 > 0 for m in free.values()) >= 3


def test_pairs_are_cheaper_than_columns_but_need_fill():
    scores = some_scores(4, 3, 1)
    density = dict.fromkeys(scores, 0.3)
    pairs = by_cost(scores, COSTS, density, level=False)
    worth = {
        name: sum(
            float((m * s * ~owned(s.shape[1], 4)).sum())
            for (m, s) in zip(masks.values(), scores.values(), strict=True)
        )
        for name, masks in (("pairs", pairs), ("columns", by_cost(scores, COSTS, density)))
    }
    assert worth["pairs"] > worth["columns"]
    assert spent(pairs, fill=True) > spent(pairs)


def test_links_have_budgets_of_their_own():
    nodes, scores = 3, some_scores(3, 4, 2)
    links = np.array([[0, 0.5, 2.0], [1, 0, 1], [0, 1, 0]])
    masks = per_link(scores, COSTS, dict.fromkeys(scores, 0.5), links=links)
    for reader in range(nodes):
        for owner in set(range(nodes)) - {reader}:
            sent = whole = 0.0
            for path, mask in masks.items():
                block = mask.shape[1] // nodes
                sent += COSTS[path] * int(mask[reader, owner * block : (owner + 1) * block].sum())
                whole += COSTS[path] * block
            limit = min(1.0, 0.5 * links[reader, owner]) * whole
            assert limit - max(COSTS.values()) < sent <= limit * (1 + 1e-4) + 1e-3


def test_budgets_compile_once_for_all_densities():
    scores = some_scores(4, 2, 3)
    traces = []

    @jax.jit
    def masks(density):
        traces.append(1)
        return by_cost(scores, COSTS, dict.fromkeys(scores, density), floor=0.2, charge=1.0)

    kept = [spent(masks(jnp.float32(d))) for d in (0.1, 0.5, 1.0)]
    assert len(traces) == 1
    assert kept == sorted(kept)


def test_relative_shares_do_not_depend_on_a_layers_scale():
    scores = some_scores(2, 3, 4)
    scaled = {p: s * (i + 1) * 10 for i, (p, s) in enumerate(scores.items())}
    for path, share in relative(scores).items():
        np.testing.assert_allclose(share, relative(scaled)[path], rtol=1e-5)


def test_rules_the_first_match_wins():
    scores = some_scores(2, 10, 5)
    rules = ((r"^early$", {"density": 1.0}), (r"a|l", {"density": 0.0}))
    masks = Choice(0.5, rules=rules).masks(scores)
    kept = {p: int(m.sum()) - scores[p].shape[1] for p, m in masks.items()}
    assert kept == {"early": 20, "middle": 0, "late": 0}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("stem", {"density": 0.1})], "'stem' is not used"),
        ([("early", {"density": 0.1}), ("^early", {"density": 0.2})], r"'\^early' is not used"),
        ([("early", {"budget": "uniform"})], r"'early' overrides \['budget'\]"),
        ([("early", {"density": 2})], r"`density` \(=2\)"),
    ],
)
def test_rules_that_cannot_be_meant(rules, message):
    with pytest.raises(dj.DiscoError, match=message):
        Choice(0.5, rules=rules).masks(some_scores(2, 4, 6))
