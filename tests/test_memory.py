"""Memory from a plan against what XLA reserves for a node's own program."""

import numpy as np
import pytest
from flax import nnx

import disco_jax as dj

TOLERANCE = 1 / 3  # XLA hoists and splits what the walk over the program does not know of


def frozen(nodes, density, wire_dtype=None, emulate=True):
    mesh = dj.NodeMesh(nodes, emulate=emulate)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, density, "random")
    return dj.freeze(model, images(2), wire_dtype=wire_dtype)


def images(examples):
    return np.zeros((examples, 32, 32, 3), np.float32)


@pytest.mark.parametrize(
    ("nodes", "density", "wire_dtype"),
    [(1, 1.0, None), (2, 0.2, None), (2, 1.0, None), (4, 0.3, None), (4, 0.5, "int8")],
)
def test_memory_is_what_xla_reserves(nodes, density, wire_dtype):
    model = frozen(nodes, density, wire_dtype)
    for examples in (1, 3):
        compiled = dj.plan.share(model, 0).lower(images(examples)).compile()
        reserved = compiled.memory_analysis().temp_size_in_bytes
        memory = dj.cost.memory(model.plan, examples)
        assert memory.activation_bytes == pytest.approx(reserved, rel=TOLERANCE)
        assert memory.total_bytes == memory.activation_bytes + model.plan.weight_bytes_per_node


def test_it_is_the_same_for_emulated_nodes_and_shrinks_with_their_number():
    two, real = frozen(2, 0.5).plan, frozen(2, 0.5, emulate=False).plan
    assert two == real
    assert frozen(4, 0.5).plan.peak_activation_bytes < two.peak_activation_bytes
    assert two.peak_activation_bytes < frozen(1, 0.5).plan.peak_activation_bytes


def test_no_example_is_refused():
    with pytest.raises(dj.DiscoError, match=r"`examples` \(=0\)"):
        dj.cost.memory(dj.plan.CommunicationPlan(2, (), ()), 0)
