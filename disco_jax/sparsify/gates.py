"""Gates: every (node, channel) pair learns by gradient whether it is open.

The masks are relaxed to numbers that an optimiser trains beside the weights, with the traffic in
the loss under a Lagrange multiplier; at the end :func:`close` makes masks of them that meet the
budget exactly::

    sparsify.gates.attach(model, "hard_concrete", costs)
    ... train loss + sparsify.gates.penalty(model, 0.2) with any optimiser of nnx.Param ...
    sparsify.gates.close(model, 0.2)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from disco_jax.errors import require
from disco_jax.exchange import Exchange
from disco_jax.partition import owned
from disco_jax.readable import expand_mask
from disco_jax.sparsify.choice import Choice
from disco_jax.sparsify.scores import l2
from disco_jax.trace import exchanges, readers

KINDS = ("hard_concrete", "straight_through")
# Louizos, Welling & Kingma 2018: temperature, and how far the concrete distribution is stretched.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class Draws(nnx.Variable):
    """``int32[]``: how often a gate has drawn; the noise follows from it and the seed."""


class Multiplier(nnx.Param):
    """``float32[]``: the Lagrange multiplier. Its gradient has the other sign, so it ascends."""


class Gate(nnx.Module):
    """``bool[node, channel] -> float[node, channel]``: 1 for own channels, 0 to 1 for others.

    ``"straight_through"``: open where ``σ(a) > 1/2``, with the gradient of ``σ(a)`` (Bengio et al.
    2013). ``"hard_concrete"``: ``clip(ζ' σ((log u - log(1-u) + a)/β) + γ, 0, 1)`` with
    ``ζ' = ζ - γ`` and ``u`` uniform while training, its noise-free value otherwise (Louizos et al.
    2018, arXiv 1712.01312).

    Args:
      kind: one of ``KINDS``.
      logits: ``a``, ``[node, channel]``.
      cost: bytes of a channel on a link.
      seed: of the noise.
    """

    def __init__(self, kind: str, logits: Float[Array, "n c"], *, cost: float, seed: int):
        self.kind, self.cost, self.seed = kind, cost, seed
        self.logits = nnx.Param(logits)
        self.draws = Draws(jnp.zeros((), jnp.int32))
        self.deterministic = False  # as nnx.Module.eval() sets it

    def __call__(self, mask: Bool[Array, "n c"]) -> Float[Array, "n c"]:
        a = self.logits[...]
        if self.kind == "straight_through":
            soft = jax.nn.sigmoid(a)
            z = jax.lax.stop_gradient((a > 0).astype(a.dtype) - soft) + soft
        else:
            if not self.deterministic:
                key = jax.random.fold_in(jax.random.key(self.seed), self.draws[...])
                u = jax.random.uniform(key, a.shape, minval=1e-6, maxval=1 - 1e-6)
                a = (a + jnp.log(u) - jnp.log1p(-u)) / BETA
                self.draws.set_value(self.draws[...] + 1)
            z = jnp.clip((ZETA - GAMMA) * jax.nn.sigmoid(a) + GAMMA, 0, 1)
        return jnp.where(owned(*z.shape[::-1]), 1.0, z) * mask

    def probability(self) -> Float[Array, "n c"]:
        """Of every pair to be open; hard-concrete: ``σ(a - β log(-γ/ζ))``."""
        shift = BETA * np.log(-GAMMA / ZETA) if self.kind == "hard_concrete" else 0.0
        return jax.nn.sigmoid(self.logits[...] - shift)


def attach(
    model: nnx.Module, kind: str, costs: Mapping[str, float], *, bias: float = 2.0, seed: int = 0
) -> None:
    """Gives every exchange a gate, in place, and the model a Lagrange multiplier.

    The logits start at ``bias`` plus the standard score of the pair's magnitude, so that what is
    strong closes last.

    Args:
      model: a masked model.
      kind: one of ``KINDS``.
      costs: from ``wire_costs``.
      bias: mean of the first logits; 2 is open with probability 0.88 and more.
      seed: of the noise.

    Raises:
      DiscoError: for an unknown kind.
    """
    require(
        kind in KINDS, f"`gates` (={kind!r}) must be one of {', '.join(KINDS)}; choose one of these"
    )
    for i, (path, exchange) in enumerate(_read(model).items()):
        kernels = [layer.kernel[...] for _, layer in readers(model)[path]]
        scores = l2(kernels, exchange.mesh.nodes)
        remote = ~owned(exchange.channels, exchange.mesh.nodes)
        mean, deviation = scores[remote].mean(), scores[remote].std()
        logits = bias + (scores - mean) / jnp.maximum(deviation, 1e-12)
        exchange.gate = Gate(kind, logits, cost=costs[path], seed=seed * 10_000 + i)
    model.multiplier = Multiplier(jnp.zeros(()))  # type: ignore[attr-defined]


def open_share(model: nnx.Module) -> Float[Array, ""]:
    """Expected traffic as a share of the dense split's."""
    expected, dense = jnp.zeros(()), 0.0
    for exchange in _gated(model).values():
        remote = exchange.full_mask() & ~owned(exchange.channels, exchange.mesh.nodes)
        gate: Any = exchange.gate
        expected += gate.cost * jnp.sum(gate.probability() * remote)
        dense += gate.cost * remote.sum()
    return expected / max(dense, 1e-30)


def penalty(model: nnx.Module, density: float, *, damping: float = 10.0) -> Float[Array, ""]:
    """``λ (traffic - density) + damping/2 (traffic - density)²``, to be added to the loss.

    The modified differential method of multipliers (Platt & Barr 1987; for L0 gates, Gallego-Posada
    et al. 2022): weights and gates descend, ``λ`` ascends, with the same optimiser.
    """
    multiplier: Any = model.multiplier  # type: ignore[attr-defined]
    value = multiplier[...]
    excess = open_share(model) - density
    ascending = 2 * jax.lax.stop_gradient(value) - value
    return ascending * excess + damping / 2 * excess**2


def close(model: nnx.Module, density: float, *, level: bool = True) -> None:
    """Makes masks of the gates, in place: the likeliest pairs that the budget buys.

    What the kept gates multiplied is folded into the kernels, and the gates are removed.

    Args:
      model: a model with gates.
      density: share of the dense split's traffic.
      level: see ``sparsify.budget``.
    """
    gated = _gated(model)
    require(
        bool(gated), "`model` has no gates; call sparsify.gates.attach(model, ...) and train first"
    )
    model.eval()
    costs = {path: exchange.gate.cost for path, exchange in gated.items()}
    worth = {p: e.gate.probability() * costs[p] for p, e in gated.items()}
    alive = {p: jnp.where(e.full_mask().any(0), worth[p], -jnp.inf) for p, e in gated.items()}
    choice = Choice(density, alive, "by_cost", costs, options={"level": level})
    masks = choice.masks(alive)
    for path, exchange in gated.items():
        z = exchange.gate(exchange.mask[...])
        for _, layer in readers(model)[path]:
            kernel = layer.kernel[...]
            wide = expand_mask(z, kernel.shape[-1]).astype(kernel.dtype)
            layer.kernel.set_value(jnp.where(wide > 0, kernel * wide, kernel))
        exchange.gate = None
        exchange.set_mask(masks[path])
    del model.multiplier  # type: ignore[attr-defined]


def is_gate(params: Any) -> Any:
    """``"gates"`` for logits and multiplier, ``"weights"`` for all else: labels for optax."""

    def label(path: Any, _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return "gates" if name.endswith("gate.logits") or name == "multiplier" else "weights"

    return jax.tree.map_with_path(label, params)


def _read(model: nnx.Module) -> dict[str, Exchange]:
    reading = readers(model)
    return {p: e for p, e in exchanges(model).items() if reading[p] and e.mesh.nodes > 1}


def _gated(model: nnx.Module) -> dict[str, Any]:
    return {path: e for path, e in _read(model).items() if e.gate is not None}
