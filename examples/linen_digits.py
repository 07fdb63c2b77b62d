"""A Linen model whose convolutions are shared by two nodes, in a plain optax loop.

    python examples/linen_digits.py

Handwritten digits of 8x8 pixels (scikit-learn). What is not Linen as ever: the layers
``DiscoConv`` and ``DiscoDense``, ``sparse_exchange`` around the optimiser, and ``apply_masks``.
Expect a test accuracy of about 0.91 with a quarter of the traffic, after half a minute.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import disco_jax as dj
from disco_jax.interop.linen import DiscoConv, DiscoDense, apply_masks

MESH = dj.NodeMesh(nodes=2, emulate=True)  # to train, one device plays both nodes
STEPS, BATCH = 600, 64


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Every node has the whole image and computes the first layer, so that nothing is sent.
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(DiscoConv(16, 32, (3, 3), strides=2, mesh=MESH, name="conv1")(x))
        x = nn.relu(DiscoConv(32, 32, (3, 3), mesh=MESH, name="conv2")(x))
        return DiscoDense(32, 10, mesh=MESH, name="head")(x.mean((1, 2)))


def data():
    """Training and test images, the labels beside them."""
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16.0, jnp.float32)
    labels = jnp.asarray(digits.target)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


@jax.jit
def train_step(state, masks, images, labels):
    def loss(params):
        logits = state.apply_fn({"params": params, "Mask": masks}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    return state, apply_masks(masks, state.opt_state)


def main(steps=STEPS, density=0.25):
    """Trains, and returns test accuracy and the share of remote channels that are still read."""
    (images, labels), (test_images, test_labels) = data()
    model = Network()
    variables = model.init(jax.random.key(0), images[:1])
    tx = dj.sparsify.sparse_exchange(optax.adam(3e-3), density=density, steps=steps * 2 // 3)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    masks = variables["Mask"]
    key = jax.random.key(1)
    for step in range(steps):
        chosen = jax.random.choice(jax.random.fold_in(key, step), len(images), (BATCH,))
        state, masks = train_step(state, masks, images[chosen], labels[chosen])
    logits = jax.jit(model.apply)({"params": state.params, "Mask": masks}, test_images)
    accuracy = float((logits.argmax(-1) == test_labels).mean())
    remote = [(m.sum() - m.shape[1]) / m.shape[1] for m in jax.tree.leaves(masks)]
    kept = float(sum(remote) / len(remote))
    print(f"test accuracy {accuracy:.3f} with {kept:.2f} of the remote channels")
    return accuracy, kept


if __name__ == "__main__":
    main()
