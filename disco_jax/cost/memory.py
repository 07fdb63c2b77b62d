"""Memory of one node, from a plan alone."""

from __future__ import annotations

import dataclasses

from disco_jax.errors import require
from disco_jax.plan.spec import CommunicationPlan


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one node needs.

    Attributes:
      weight_bytes: kernels and biases.
      activation_bytes: what is held at one time between the layers; neither the images nor what
        a convolution's own code allocates.
    """

    weight_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.weight_bytes + self.activation_bytes


def memory(plan: CommunicationPlan, examples: int = 1) -> Memory:
    """The memory of one node that runs a plan.

    Activations are counted by ``plan.liveness.peak_bytes`` when a model is frozen. For ResNet-50 at
    224x224 (1, 2 and 4 nodes, density 0.2 and 1) they are 0.78 to 1.21 times what XLA:CPU reserves
    for a node's program (``memory_analysis().temp_size_in_bytes`` of ``plan.share``). For maps of a
    few pixels XLA reserves much more: it rearranges the weights of those layers first.

    Args:
      plan: of ``dj.freeze``.
      examples: images that go through together.

    Raises:
      DiscoError: if ``examples`` is not positive.

    >>> plan = CommunicationPlan(2, (), (), peak_activation_bytes=100)
    >>> memory(plan, examples=3)
    Memory(weight_bytes=0, activation_bytes=300)
    """
    require(examples >= 1, f"`examples` (={examples}) must be at least 1; pass examples=1 for one")
    return Memory(plan.weight_bytes_per_node, examples * plan.peak_activation_bytes)
