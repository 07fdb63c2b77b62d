"""Somebody's NNX model and training loop, and the three lines that split it over two nodes.

    python examples/nnx_digits.py

Handwritten digits of 8x8 pixels (scikit-learn). The lines marked ``# disco`` are all there is to
add; what follows the loop freezes the model and runs it on two devices. Expect a test accuracy of
about 0.95 with a fifth of the traffic, after half a minute.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import disco_jax as dj

STEPS, BATCH = 600, 64


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.relu(self.norm(self.conv2(x)))
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(x)


def data():
    """Training and test images, the labels beside them."""
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16.0, jnp.float32)
    labels = jnp.asarray(digits.target)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))
    dj.sparsify.apply_masks(model, optimizer.opt_state)  # disco


def main(steps=STEPS, density=0.2):
    """Trains and freezes; returns the test accuracy of the frozen model and the model."""
    nodes = dj.NodeMesh(nodes=2)  # first, so that JAX starts with two devices
    (images, labels), (test_images, test_labels) = data()
    model = Network(nnx.Rngs(0))
    model = dj.distribute(model, dj.NodeMesh(nodes=2, emulate=True), images[:1])  # disco
    tx = optax.adam(3e-3)
    tx = dj.sparsify.sparse_exchange(tx, density=density, steps=steps * 2 // 3)  # disco
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    key = jax.random.key(1)
    model.train()
    for step in range(steps):
        chosen = jax.random.choice(jax.random.fold_in(key, step), len(images), (BATCH,))
        train_step(model, optimizer, images[chosen], labels[chosen])

    frozen = dj.freeze(model, test_images, mesh=nodes)
    accuracy = float((frozen(test_images).argmax(-1) == test_labels).mean())
    print(frozen.plan)
    print(f"test accuracy {accuracy:.3f}")
    return accuracy, frozen


if __name__ == "__main__":
    main()
