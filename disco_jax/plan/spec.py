"""The communication plan: what crosses which link, frozen before anything runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from disco_jax import wire
from disco_jax.errors import DiscoError, require
from disco_jax.messages import Pairs, check_message_bytes, pieces, ring
from disco_jax.packed import Hop

VERSION = 4


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """One exchange of a model.

    Attributes:
      path: where it is in the model.
      consumers: paths of the layers that read it.
      positions: pixels or tokens per example, one entry for every call; where rows move, numbers of
        a row, and from rows to channels, pixels of a band.
      features: channels that the nodes own together, dead ones excluded.
      wire_dtype: what travels.
      hops: the messages of a packed exchange, one entry or more for each ring offset in use; what a
        node sends are channels, or rows where the split says so.
      gathered: numbers per position that every node sends to every other (an exchange without a
        mask: results, statistics); 0 for a packed exchange.
      split: ``"channels"``, ``"rows"``, ``"rows to channels"`` or ``"channels to rows"``.
      dense_numbers: what the dense split by channels would move of it per example, over all links.
    """

    path: str
    consumers: tuple[str, ...]
    positions: tuple[int, ...]
    features: int
    wire_dtype: str
    hops: tuple[Hop, ...] = ()
    gathered: int = 0
    split: str = "channels"
    dense_numbers: int = 0

    def kept(self, nodes: int) -> int:
        """(channel, link) pairs that travel, fill included."""
        return sum(width * len(pairs) for width, pairs in self._sent(nodes))

    def rounds(self, nodes: int) -> list[tuple[int, Pairs]]:
        """What travels at once, one round after another: bytes per example, links.

        Each is a message, or several where it is larger than one may be.
        """
        return [
            (wire.nbytes(positions * width, self.wire_dtype), pairs)
            for positions in self.positions
            for width, pairs in self._sent(nodes)
        ]

    def _sent(self, nodes: int) -> list[tuple[int, Pairs]]:
        """The same for one position, in numbers."""
        gathered = [(self.gathered, ring(nodes, offset)) for offset in range(1, nodes)]
        hops = [(hop.width, hop.pairs) for hop in self.hops]
        return hops + (gathered if self.gathered else [])

    def traffic_bytes(self, nodes: int) -> int:
        """Bytes per example over all directed links."""
        return sum(size * len(pairs) for size, pairs in self.rounds(nodes))

    @property
    def dense_traffic_bytes(self) -> int:
        """The same for the dense split by channels in float32: all nodes get all channels."""
        return 4 * self.dense_numbers

    def collectives(self, nodes: int, message_bytes: int | None) -> int:
        """Collectives that the compiled program has for it."""
        return sum(pieces(size, message_bytes) for size, _ in self.rounds(nodes))


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer with weights, or an attention, which has none and reads no exchange.

    Multiplications per example and bytes of weights: of one of the nodes, and of a single node
    that runs the dense network alone (without dead channels).
    """

    path: str
    exchange: str
    macs: int
    single_node_macs: int
    weight_bytes: int
    single_node_weight_bytes: int


@dataclasses.dataclass(frozen=True)
class CommunicationPlan:
    """The frozen, static schedule of a packed model.

    ``peak_activation_bytes`` is what one node holds at one time between layers, and
    ``message_bytes`` what a message has at most (None: any size), both per example.

    >>> plan = CommunicationPlan(2, (ExchangePlan("conv", (), (4,), 2, "float32", (
    ...     Hop(1, ((0,), (0,))),), dense_numbers=8),), ())
    >>> plan.traffic_bytes, plan == CommunicationPlan.from_json(plan.to_json())
    (32, True)
    """

    nodes: int
    exchanges: tuple[ExchangePlan, ...]
    layers: tuple[LayerPlan, ...]
    peak_activation_bytes: int = 0
    message_bytes: int | None = None
    version: int = VERSION

    @property
    def traffic_bytes(self) -> int:
        """Bytes per example, summed over directed links and exchanges."""
        return sum(e.traffic_bytes(self.nodes) for e in self.exchanges)

    @property
    def dense_traffic_bytes(self) -> int:
        """Bytes per example of the dense split in float32."""
        return sum(e.dense_traffic_bytes for e in self.exchanges)

    @property
    def macs_per_node(self) -> int:
        """Multiplications of one node per example, in layers with weights and attentions."""
        return sum(layer.macs for layer in self.layers)

    @property
    def single_node_macs(self) -> int:
        """Multiplications per example of the unsplit dense network."""
        return sum(layer.single_node_macs for layer in self.layers)

    @property
    def weight_bytes_per_node(self) -> int:
        """Bytes of kernels and biases that one node holds."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def single_node_weight_bytes(self) -> int:
        """Bytes of kernels and biases of the unsplit dense network."""
        return sum(layer.single_node_weight_bytes for layer in self.layers)

    @property
    def collectives(self) -> int:
        """Collectives that the compiled program has."""
        return sum(e.collectives(self.nodes, self.message_bytes) for e in self.exchanges)

    def to_json(self) -> str:
        """A JSON document that :meth:`from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> CommunicationPlan:
        """Reads a plan.

        Raises:
          DiscoError: if the text is not a plan of this version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DiscoError(
                f"`plan` is not a communication plan ({error!r}); write one with plan.to_json()"
            ) from None
        require(
            version == VERSION,
            f"`version` of the plan (={version!r}) must be {VERSION}; freeze the model again",
        )
        try:
            exchanges = tuple(_exchange(e) for e in content["exchanges"])
            layers = tuple(LayerPlan(**layer) for layer in content["layers"])
            most = check_message_bytes(content["message_bytes"])
            peak = content["peak_activation_bytes"]
            return cls(content["nodes"], exchanges, layers, peak, most)
        except (KeyError, TypeError) as error:
            raise DiscoError(
                f"`plan` lacks or misspells a field ({error}); freeze the model again"
            ) from None

    def __str__(self) -> str:
        table = Table("exchange", "features", "kept", "wire", "hops", "bytes", "of dense")
        for e in self.exchanges:
            dense, sent = e.dense_traffic_bytes, e.traffic_bytes(self.nodes)
            kept = f"{e.kept(self.nodes)}/{e.dense_numbers // max(1, sum(e.positions))}"
            kept = kept if e.split == "channels" else e.split
            hops = str(len(e.hops) or "all" * (e.gathered > 0) or "-")
            share = f"{sent / dense:.3f}" if dense else "-"
            table.add_row(e.path, str(e.features), kept, e.wire_dtype, hops, f"{sent:,}", share)
        table.add_section()
        total, dense = self.traffic_bytes, self.dense_traffic_bytes
        share = f"{total / dense:.3f}" if dense else "-"
        table.add_row(f"{self.nodes} nodes", "", "", "", "", f"{total:,}", share)
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def _exchange(content: dict[str, Any]) -> ExchangePlan:
    hops = tuple(
        Hop(hop["offset"], tuple(tuple(sent) for sent in hop["sends"])) for hop in content["hops"]
    )
    tuples = {name: tuple(content[name]) for name in ("consumers", "positions")}
    return ExchangePlan(**{**content, **tuples, "hops": hops})
