"""Masks and weights from a few unlabelled images: layer-wise least squares, no training.

For a layer with patches ``X`` (``[examples · positions, features]``) and kernel ``W``, node ``d``
shall read a set ``S`` of channels and compute ``X_S W'`` instead of ``X W_d``. The best ``W'`` has
a closed form, and its error says what ``S`` is worth. Channels are removed one by one, the cheapest
first, then swapped while that helps, as OSSCAR does for the input channels of a layer (Meng,
Ibrahim, Behdin, Hazimeh, Ponomareva & Mazumder, ICML 2024, arXiv 2403.12983); the update at each
removal is Optimal Brain Surgeon's (Hassibi & Stork 1992) for groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from disco_jax.layers.conv import _windows, pad_input
from disco_jax.partition import owned
from disco_jax.sparsify.budget import Budget, uniform
from disco_jax.sparsify.calibrate import Statistics, observe, outputs
from disco_jax.sparsify.choice import Choice, Rules
from disco_jax.trace import exchanges, readers, trace

Images = Iterable[Float[Array | np.ndarray, "b ..."]]
Gram = Float[np.ndarray, "features features"]
DAMPING = 1e-3  # of the mean of the Gram matrix's diagonal


@dataclasses.dataclass(frozen=True)
class Problem:
    """Least squares for one reader of an exchange.

    Features are ordered channel by channel; each has ``features / channels`` of them.

    Attributes:
      gram: ``X̂ᵀX̂`` of what the model sees.
      cross: ``X̂ᵀX`` with what the dense model sees.
      weights: the kernel as a matrix.
    """

    gram: Gram
    cross: Gram
    weights: Float[np.ndarray, "features outputs"]

    @property
    def ridge(self) -> Gram:
        """A little of the identity: pulls towards the weights that were there."""
        scale = DAMPING * np.trace(self.gram) / len(self.gram) + 1e-12
        return scale * np.eye(len(self.gram))


def patches(layer: Any, x: Float[Array, "b ... c"]) -> Float[Array, "m features"]:
    """What a layer's kernel is multiplied with: rows of ``c · window`` features."""
    if not hasattr(layer, "kernel_size"):
        return jnp.reshape(x, (-1, x.shape[-1]))
    rank = len(layer.kernel_size)
    dilation = _windows(layer.kernel_dilation, rank)
    x, padding = pad_input(x, layer.padding, layer.kernel_size, dilation)
    spatial = "DHW"[-rank:]
    found = lax.conv_general_dilated_patches(
        x,
        layer.kernel_size,
        _windows(layer.strides, rank),
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    return jnp.reshape(found, (-1, found.shape[-1]))


def as_matrix(kernel: Float[Array, "... c_in c_out"]) -> Float[np.ndarray, "features c_out"]:
    """A kernel with its features in the order of :func:`patches`."""
    value = np.asarray(kernel, np.float64)
    return np.moveaxis(value, -2, 0).reshape(-1, value.shape[-1])


def as_kernel(matrix: Float[np.ndarray, "features c_out"], shape: Sequence[int]) -> np.ndarray:
    """The inverse of :func:`as_matrix`.

    >>> kernel = np.arange(24.).reshape(3, 4, 2)
    >>> bool((as_kernel(as_matrix(kernel), kernel.shape) == kernel).all())
    True
    """
    *window, c_in, c_out = shape
    return np.moveaxis(matrix.reshape(c_in, *window, c_out), 0, -2)


def reconstruction_scores(
    model: nnx.Module, images: Images, *, probe: float = 0.2
) -> dict[str, Float[Array, "node channel"]]:
    """What removing a pair does to the model's output, comparable over all exchanges.

    Within an exchange: the growth of its readers' output error when pairs are removed greedily, so
    that of two channels that say the same one is worth nothing. Between exchanges: that error
    times the sensitivity of the model to it, measured with this exchange alone thinned.

    Args:
      model: a trained masked model whose masks are full.
      images: batches; a few hundred images in all.
      probe: share of the remote pairs that is left when the sensitivity is measured.
    """
    grams = _Grams(model, images)
    problems = grams.every(model)
    return _comparable(problems, model, grams.images, probe)


def _comparable(
    problems: Mapping[str, list[Problem]],
    model: nnx.Module,
    images: Sequence[Float[Array | np.ndarray, "b ..."]],
    probe: float,
) -> dict[str, Array]:
    run = outputs(model)
    right = [run(model, batch) for batch in images]
    found = {}
    for path, group in problems.items():
        exchange = exchanges(model)[path]
        shares = eliminate(group, exchange.mesh.nodes, exchange.channels)
        mask = np.asarray(uniform({path: jnp.asarray(shares)}, {path: 1.0}, {path: probe})[path])
        thinned = nnx.clone(model)
        exchanges(thinned)[path].set_mask(jnp.asarray(mask))
        _solve_weights(thinned, path, group)
        harm = np.mean([_distance(run(thinned, x), y) for x, y in zip(images, right, strict=True)])
        lost = np.sum(shares[~mask])
        found[path] = jnp.asarray(shares * harm / max(lost, 1e-9), jnp.float32)
    return found


def _distance(output: Any, right: Any) -> float:
    """Squared difference as a share of the right output's energy."""
    pairs = list(zip(jax.tree.leaves(output), jax.tree.leaves(right), strict=True))
    return float(
        sum(jnp.sum(jnp.square(a - b)) for a, b in pairs)
        / sum(jnp.sum(jnp.square(b)) for _, b in pairs)
    )


def eliminate(
    problems: Sequence[Problem], nodes: int, channels: int
) -> Float[np.ndarray, "node channel"]:
    """Removes every node's remote channels greedily; what each removal costs, never falling."""
    scores = np.zeros((nodes, channels))
    for node, own in enumerate(owned(channels, nodes)):
        state = [
            (np.linalg.inv(p.gram + p.ridge), _columns(p, node, nodes).copy()) for p in problems
        ]
        energy = sum(
            float(np.sum(w * (p.gram @ w))) for p, (_, w) in zip(problems, state, strict=True)
        )
        left, reached = np.flatnonzero(~own).tolist(), 0.0
        while left:
            costs = np.sum([_removal_costs(*s, channels, left) for s in state], axis=0)
            best = int(np.argmin(costs))
            reached = max(reached, float(costs[best]))
            channel = left.pop(best)
            scores[node, channel] = reached / max(energy, 1e-30)
            state = [_removed(inverse, w, channels, channel) for inverse, w in state]
    return scores


def swap(
    problems: Sequence[Problem], mask: Bool[np.ndarray, "node channel"], rounds: int = 2
) -> Bool[np.ndarray, "node channel"]:
    """Local search: exchanges a kept for a dropped channel of the same owner while errors fall."""
    nodes, channels = mask.shape
    mask, block = mask.copy(), channels // nodes
    for node in range(nodes):
        error = _error(problems, mask[node], node, nodes)
        for owner in [o for o in range(nodes) if o != node] * rounds:
            here = np.arange(owner * block, (owner + 1) * block)
            for out in here[mask[node, here]]:
                trials = []
                for new in here[~mask[node, here]]:
                    trial = mask[node].copy()
                    trial[[out, new]] = False, True
                    trials.append((_error(problems, trial, node, nodes), int(new)))
                if trials and min(trials)[0] < error * (1 - 1e-9):
                    error, new = min(trials)
                    mask[node, [out, new]] = False, True
    return mask


def post_training(
    model: nnx.Module,
    images: Sequence[Float[Array, "b ..."]],
    density: float,
    *,
    local_search: bool = True,
    budget: str | Budget = "uniform",
    costs: Mapping[str, float] | None = None,
    rules: Rules = (),
    **options: Any,
) -> None:
    """Masks, weights and statistics of a trained model from unlabelled images, in place.

    Reconstruction scores choose the masks under the budget, swaps improve them, then layer by
    layer the weights that are left are solved for what the dense layer gave, from what the layers
    before now give, and the means of batch norms are taken anew. Their variances stay: least
    squares shrinks what it is unsure of, and a norm would blow it up again.

    Args:
      model: a trained masked model whose masks are full.
      images: batches; a few hundred images in all.
      density: share of the remote pairs that is kept.
      local_search: whether to swap.
      budget, costs, rules, **options: see :class:`Choice`.
    """
    dense, grams, statistics = nnx.clone(model), _Grams(model, images), Statistics(model)
    problems = grams.every(model)
    scores = _comparable(problems, model, grams.images, density)
    choice = Choice(density, scores, budget, costs, tuple(rules), options=options)
    masks = choice.masks(scores)
    for path, mask in masks.items():
        better = swap(problems[path], np.asarray(mask)) if local_search else mask
        exchanges(model)[path].set_mask(jnp.asarray(better))
    for path in masks:
        _solve_weights(model, path, grams(path, model, dense))
        statistics(model, grams.images, means_only=True)


def _solve_weights(model: nnx.Module, path: str, problems: Sequence[Problem]) -> None:
    """The closed form for all readers of one exchange: ``(X̂ᵀX̂)_SS W' = (X̂ᵀX)_S W``."""
    exchange = exchanges(model)[path]
    mask, nodes = np.asarray(exchange.mask[...]), exchange.mesh.nodes
    for (_, layer), problem in zip(readers(model)[path], problems, strict=True):
        weights, matrix = problem.weights.copy(), problem.gram + problem.ridge
        width = weights.shape[1] // nodes
        for node in range(nodes):
            rows = np.flatnonzero(np.repeat(mask[node], len(weights) // mask.shape[1]))
            columns = slice(node * width, (node + 1) * width)
            aim = (problem.cross + problem.ridge) @ problem.weights[:, columns]
            weights[rows, columns] = np.linalg.solve(matrix[np.ix_(rows, rows)], aim[rows])
        value = layer.kernel[...]
        new = as_kernel(weights, value.shape).astype(value.dtype)
        layer.kernel.set_value(jax.device_put(new, value.sharding))


class _Grams:
    """The least-squares problems of the exchanges, one at a time, in the order of the calls.

    Every program is compiled once.
    """

    def __init__(self, model: nnx.Module, images: Images):
        self.images = list(images)
        self.see = observe(model, lambda inputs: inputs)
        reading = {p: [layer for _, layer in g] for p, g in readers(model).items() if g}
        called = [r.path for r in trace(model, self.images[0]).exchanges]
        self.reading = {path: reading[path] for path in dict.fromkeys(called) if path in reading}
        self.multiply = jax.jit(self._multiply, static_argnums=0)

    def __call__(self, path: str, model: nnx.Module, dense: nnx.Module) -> list[Problem]:
        """``X̂`` as ``model`` sees it, ``X`` as ``dense`` does; the kernels are ``model``'s."""
        found = [
            self._products(path, self.see(model, batch)[path], self.see(dense, batch)[path])
            for batch in self.images
        ]
        return self._problems(path, model, found)

    def every(self, model: nnx.Module) -> dict[str, list[Problem]]:
        """Of all exchanges, as the model sees its images now, which it goes through once."""
        found: dict[str, list[Any]] = {path: [] for path in self.reading}
        for batch in self.images:
            inputs = self.see(model, batch)
            for path, products in found.items():
                products.append(self._products(path, inputs[path], None))
        return {path: self._problems(path, model, products) for path, products in found.items()}

    def _problems(self, path: str, model: nnx.Module, found: list[Any]) -> list[Problem]:
        total = jax.tree.map(lambda *grams: sum(grams), *found)
        layers = [layer for _, layer in readers(model)[path]]
        return [
            Problem(gram, cross, as_matrix(layer.kernel[...]))
            for (gram, cross), layer in zip(total, layers, strict=True)
        ]

    def _products(self, path: str, ours: list[Array], theirs: list[Array] | None) -> Any:
        return jax.tree.map(np.float64, self.multiply(path, ours, theirs))

    def _multiply(self, path: str, ours: list[Array], theirs: list[Array] | None) -> Any:
        def products(layer: Any) -> tuple[Array, Array]:
            a = jnp.concatenate([patches(layer, x) for x in ours])
            gram = a.T @ a
            if theirs is None:
                return gram, gram
            return gram, a.T @ jnp.concatenate([patches(layer, x) for x in theirs])

        return [products(layer) for layer in self.reading[path]]


def _columns(problem: Problem, node: int, nodes: int) -> np.ndarray:
    width = problem.weights.shape[1] // nodes
    return problem.weights[:, node * width : (node + 1) * width]


def _groups(size: int, channels: int) -> np.ndarray:
    """Features of every channel, ``[channel, window]``."""
    return np.arange(size).reshape(channels, -1)


def _removal_costs(
    inverse: np.ndarray, weights: np.ndarray, channels: int, left: Sequence[int]
) -> np.ndarray:
    """``tr(W_gᵀ [(H⁻¹)_gg]⁻¹ W_g)`` for every channel that is left."""
    rows = _groups(len(weights), channels)[np.asarray(left)]
    blocks = inverse[rows[:, :, None], rows[:, None, :]]
    ours = weights[rows]
    return np.einsum("gio,gio->g", ours, np.linalg.solve(blocks, ours))


def _removed(
    inverse: np.ndarray, weights: np.ndarray, channels: int, channel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse and optimal weights without one channel; its rows become those of the identity."""
    rows = _groups(len(weights), channels)[channel]
    gain = np.linalg.solve(inverse[np.ix_(rows, rows)], inverse[rows]).T
    weights = weights - gain @ weights[rows]
    inverse = inverse - gain @ inverse[rows]
    inverse[rows], inverse[:, rows] = 0, 0
    inverse[rows, rows] = 1
    weights[rows] = 0
    return inverse, weights


def _error(
    problems: Sequence[Problem], row: Bool[np.ndarray, "channel"], node: int, nodes: int
) -> float:
    """Output error of a node that reads the channels of ``row``, with the best weights."""
    total = 0.0
    for p in problems:
        rows = np.flatnonzero(np.repeat(row, len(p.weights) // len(row)))
        matrix, w = p.gram + p.ridge, _columns(p, node, nodes)
        aim = matrix @ w
        best = np.linalg.solve(matrix[np.ix_(rows, rows)], aim[rows])
        total += float(np.sum(w * aim) - np.sum(best * aim[rows]))
    return total
