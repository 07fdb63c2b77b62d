"""What every reading of a map costs, and is worth, by what lies on its two sides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from flax import nnx

from disco_jax import wire
from disco_jax.bands import Bands, Reads, row_messages
from disco_jax.cost.link import Links
from disco_jax.cost.units import Reading, Units
from disco_jax.cost.worth import Worth
from disco_jax.gather import AllGather
from disco_jax.layers import GlobalPool, MaxPool, Resize
from disco_jax.layers.weights import dense_kernel
from disco_jax.plan.split import CHANNELS, ROWS
from disco_jax.trace import Images, modules, trace

LEVELS = 64  # densities of an exchange that are tried
NOTHING = np.zeros(2)  # messages, and bytes of them all


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be chosen for a reading, given what its map and its layers are split along.

    Attributes:
      counts: columns, channels for every node, that are sent; nothing is chosen where rows are.
      dtypes: what they travel in.
      steps: ``float[3, option]``: messages, bytes of them all, seconds of computation.
      weights: ``float[option]``: bytes of weights on a node.
      loss: ``float[option]``: the logarithm of the share of energy that is read, negated.
    """

    counts: np.ndarray
    dtypes: tuple[str, ...]
    steps: np.ndarray
    weights: np.ndarray
    loss: np.ndarray

    @classmethod
    def one(cls, sent: np.ndarray, computing: float, weights: float) -> Options:
        """No choice, and no loss."""
        steps = np.array([[*sent, computing]]).T
        return cls(np.zeros(1, int), ("",), steps, np.array([weights]), np.zeros(1))


class Prices:
    """Seconds and bytes of everything that a model may do, on given links and nodes.

    Args:
      model: masked.
      images: their shape, the first axis the images that go through together.
      links: in a hop the slowest counts.
      gmacs: multiplications per second of a node in 10⁹.
      row_dtype: what rows travel in; None: as computed.
    """

    def __init__(
        self,
        model: nnx.Module,
        images: Images,
        links: Links,
        gmacs: float,
        row_dtype: str | None = None,
    ):
        self.found: dict[str, Any] = dict(modules(model))
        self.nodes = next(m.mesh.nodes for m in self.found.values() if hasattr(m, "mesh"))
        pairs = [links[a, b] for a in range(self.nodes) for b in range(self.nodes) if a != b]
        pairs = pairs or [links.default]
        self.alpha = max(link.ms for link in pairs) / 1e3
        self.rate = min(link.bytes_per_second for link in pairs)
        self.peak = min(link.peak_bytes_per_second for link in pairs)
        self.burst = min(link.burst for link in pairs)
        self.gmacs = gmacs / (1 + links.jitter)  # each node waits for the slower
        self.jitter = links.jitter
        self.row_dtype, self.examples = row_dtype, images.shape[0]
        traced = trace(model, images)
        self.macs: dict[str, float] = {}  # of all nodes together, by layer
        self.positions: dict[str, list[int]] = {}  # of every call, by exchange
        for layer in traced.layers:
            sharers = 1 if layer.exchange and self.found[layer.exchange].repeats else self.nodes
            self.macs[layer.path] = self.macs.get(layer.path, 0) + layer.macs * sharers
        with_weights = (path for path in self.macs if hasattr(self.found[path], "kernel"))
        self.dense = {path: dense_kernel(self.found[path]) for path in with_weights}
        self.gathered: dict[str, list[tuple[int, str]]] = {}  # numbers of a node, and their dtype
        for record in traced.exchanges:
            self.positions.setdefault(record.path, []).append(record.positions)
            module = self.found[record.path]
            if isinstance(module, AllGather):
                call = record.positions * module.width, record.dtype
                self.gathered.setdefault(record.path, []).append(call)

    @property
    def alone(self) -> float:
        """Seconds of a single node, which has no dead channels and waits for none."""
        alive = {path: self.dense[path] / self.found[path].kernel.size for path in self.dense}
        macs = sum(macs * alive.get(path, 1.0) for path, macs in self.macs.items())
        return self.compute(macs) / (1 + self.jitter)

    def fixed(self, units: Units) -> float:
        """Seconds of statistics, attentions and layers that nothing splits."""
        read = {path for r in units.readings for path in (r.path, *r.layers)}
        others = sum(macs for path, macs in self.macs.items() if path not in read)
        sent = (self.everywhere(path) for path in self.gathered if path not in read)
        return self.seconds([*sum(sent, start=NOTHING), self.compute(others / self.nodes)])

    def options(
        self,
        reading: Reading,
        source: str,
        target: str,
        worth: Worth | None,
        density: float,
    ) -> Options | None:
        """What may be chosen; None where such sides do not go together."""
        if not reading.layers:
            sent = self._alone(reading, source)
            return Options.one(sent, 0.0, 0.0) if source == target else None
        if target == ROWS:
            sent = NOTHING if reading.held else self._rows(reading, source)
            macs = sum(self._of_band(path, reading) for path in reading.layers)
            return Options.one(sent, self.compute(macs), self._weights(reading.layers))
        held = source == ROWS and reading.held
        if worth is None or held or self.nodes == 1:
            macs = sum(self.macs[path] for path in reading.layers) / self.nodes
            kernels, biases = self._sizes(reading.layers)
            weights = (kernels + biases) / self.nodes
            return Options.one(NOTHING, self.compute(macs), weights)
        return self._masked(reading, source, worth, density)

    def _masked(self, reading: Reading, source: str, worth: Worth, density: float) -> Options:
        """Channels behind a mask, of a map that is split by channels, or by rows."""
        total, hops = len(worth.columns), self.nodes - 1
        first = round(density * total)
        counts = np.unique(np.linspace(first, total, min(LEVELS, total - first) + 1).astype(int))
        own = total // hops
        readable = (own + counts) / (own + total)
        macs = self.compute(sum(self.macs[p] for p in reading.layers) / self.nodes)
        kernels, biases = self._sizes(reading.layers)
        weights = (kernels * readable + biases) / self.nodes
        steps, losses = [], []
        for dtype in worth.noise:
            size = self.examples * wire.BITS[dtype] / 8
            messages, sent = np.zeros(len(counts)), np.zeros(len(counts))
            for positions in self.positions[reading.path]:
                if source == ROWS:  # a band's rows of all readable channels from every other node
                    band = Bands.equal(reading.shape[1], self.nodes).size
                    pixels = band * (positions // reading.shape[1])
                    messages, sent = messages + hops, sent + hops * (own + counts) * pixels * size
                else:
                    messages = messages + np.minimum(counts, hops)
                    sent = sent + counts * positions * size
            packing = self.compute(wire.PACKING_MACS.get(dtype, 0)) / self.examples  # of a byte
            steps.append(np.stack([messages, sent, macs * readable + packing * sent]))
            losses.append(worth.loss(counts, dtype, rounds_own=source == ROWS))
        loss, many = np.concatenate(losses), len(worth.noise)
        # Coarse numbers need more columns for as much; if all are not enough, the best has to do.
        good = loss <= max(worth.uniform_loss(density) + 1e-9, loss.min())
        return Options(
            np.tile(counts, many)[good],
            tuple(np.repeat(list(worth.noise), len(counts))[good].tolist()),
            np.concatenate(steps, 1)[:, good],
            np.tile(weights, many)[good],
            loss[good],
        )

    def _rows(self, reading: Reading, source: str) -> np.ndarray:
        """Messages and bytes that bring every node the rows that the layers, or the pool, read."""
        height = reading.shape[1]
        readers = [self.found[path] for path in reading.layers] or [reading.module]
        reads = Reads.union(r.rows(height).reads(height, self.nodes) for r in readers)
        numbers = math.prod(reading.shape[2:])
        if source == CHANNELS:
            most = max(map(len, reads.needed))
            return (self.nodes - 1) * self._message(most * numbers // self.nodes, self._row_dtype)
        bands = Bands.equal(height, self.nodes)
        offsets = range(1, self.nodes)
        widths = [max(map(len, row_messages(bands, reads, offset))) for offset in offsets]
        hops = (self._message(width * numbers, self._row_dtype) for width in widths if width)
        return sum(hops, start=NOTHING)

    def _alone(self, reading: Reading, source: str) -> np.ndarray:
        """Messages and bytes of a module without weights."""
        module, by_rows = reading.module, source == ROWS and not reading.held
        numbers = math.prod(reading.shape[2:])  # of a row
        if reading.path in self.gathered:
            if not by_rows:
                return self.everywhere(reading.path)
            (_, dtype), *_ = self.gathered[reading.path]
            return self._to_all(Bands.equal(reading.shape[1], self.nodes).size * numbers, dtype)
        if not by_rows:
            return NOTHING
        if isinstance(module, MaxPool):
            return self._rows(reading, ROWS)
        if isinstance(module, Resize):  # a row from each neighbour
            return min(2, self.nodes - 1) * self._message(numbers, self._row_dtype)
        if isinstance(module, GlobalPool):
            return self._to_all(reading.shape[-1], "float32")
        return NOTHING

    def everywhere(self, path: str) -> np.ndarray:
        """Messages and bytes of an exchange without a mask, of a map that is split by channels."""
        return sum((self._to_all(*call) for call in self.gathered[path]), start=NOTHING)

    def _to_all(self, numbers: float, dtype: str) -> np.ndarray:
        """Messages and bytes that give what each node has to all others."""
        return (self.nodes - 1) * self._message(numbers, dtype)

    def _of_band(self, path: str, reading: Reading) -> float:
        """Multiplications of the node that computes the largest band."""
        if reading.repeats:
            return self.macs[path]
        height = self.found[path].rows(reading.shape[1]).outputs(reading.shape[1])
        return self.macs[path] * Bands.equal(height, self.nodes).size / height

    def _message(self, numbers: float, dtype: str) -> np.ndarray:
        return np.array([1.0, wire.nbytes(int(numbers * self.examples), dtype)])

    def seconds(self, steps: Any, waits: float = 1.0) -> Any:
        """Of messages, bytes and computation, if so much of the bytes waits for the link's rate."""
        messages, size, computing = steps
        return messages * self.alpha + waits * size / self.rate + computing

    def latency(self, steps: Sequence[np.ndarray]) -> float:
        """Seconds of all steps after each other, behind a token bucket, as ``predict`` counts."""
        spent, total = 0.0, 0.0
        for _ in range(2):  # the second time finds the bucket as the first has left it
            total = 0.0
            for messages, size, computing in steps:
                for _ in range(round(messages)):
                    spent += size / messages
                    waiting = max(0.0, spent - self.burst) / self.rate
                    took = self.alpha + max(waiting, size / messages / self.peak)
                    spent, total = max(0.0, spent - took * self.rate), total + took
                spent, total = max(0.0, spent - computing * self.rate), total + computing
        return total

    def compute(self, macs: float) -> float:
        """Seconds of so many multiplications of one node, for every image."""
        return self.examples * macs / self.gmacs / 1e9

    def _sizes(self, layers: Sequence[str]) -> tuple[float, float]:
        """Bytes of kernels and biases, those that norms leave behind included."""
        found = [self.found[path] for path in layers]
        item = [layer.kernel[...].dtype.itemsize for layer in found]
        kernels = sum(m.kernel.size * i for m, i in zip(found, item, strict=True))
        return kernels, sum(m.kernel.shape[-1] * i for m, i in zip(found, item, strict=True))

    def _weights(self, layers: Sequence[str]) -> float:
        return sum(self._sizes(layers))

    @cached_property
    def weights(self) -> float:
        """Bytes of a single node's weights."""
        sizes = {p: size + self.found[p].out_features for p, size in self.dense.items()}
        return sum(n * self.found[p].kernel[...].dtype.itemsize for p, n in sizes.items())

    @cached_property
    def _row_dtype(self) -> str:
        return self.row_dtype or "float32"
