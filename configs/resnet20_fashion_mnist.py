"""ResNet-20 on Fashion-MNIST, split over two nodes.

    python -m disco_jax.main --config=configs/resnet20_fashion_mnist.py
    python -m disco_jax.main --config=configs/resnet20_fashion_mnist.py --config.nodes=4
    python -m disco_jax.main --config=configs/resnet20_fashion_mnist.py:smoke

Needs the Debian package dataset-fashion-mnist, or the four IDX files in a folder named with
--config.data.source=idx:FOLDER. The smoke variant takes the embedded digits instead.
"""

from disco_jax.config import defaults

VARIANTS = ("full", "smoke")


def get_config(variant: str = "full"):
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    c = defaults()
    c.name = "resnet20_fashion_mnist" + ("_smoke" if variant == "smoke" else "")
    c.model.update(name="resnet20", width=16, in_channels=1)
    c.data.update(source="idx:/usr/share/datasets/fashion-mnist", size=28)
    c.data.update(mean=(0.286,), std=(0.353,), train_transforms=("random_crop", "flip"))
    c.batch_size, c.eval_batch_size = 128, 500
    c.dense.update(epochs=10.0, learning_rate=0.1)
    c.sparse.update(epochs=3.0, learning_rate=0.02, every=50)
    if variant == "smoke":
        c.data.source = "digits"
        c.max_steps = 3
        c.sparse.every = 1
        c.batch_size, c.eval_batch_size = 32, 120
    return c
