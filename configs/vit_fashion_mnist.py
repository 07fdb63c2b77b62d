"""A small vision transformer on Fashion-MNIST, split over two nodes.

    python -m disco_jax.main --config=configs/vit_fashion_mnist.py
    python -m disco_jax.main --config=configs/vit_fashion_mnist.py --config.nodes=4
    python -m disco_jax.main --config=configs/vit_fashion_mnist.py:smoke
    python -m disco_jax.main --config=configs/vit_fashion_mnist.py:imagenet   # DeiT-S

Needs the Debian package dataset-fashion-mnist, or the four IDX files in a folder named with
--config.data.source=idx:FOLDER. The smoke variant takes the embedded digits instead. The ImageNet
recipe (DeiT-S without its teacher, 300 epochs, batch 1024; Touvron et al. 2021, arXiv 2012.12877)
needs `tfds build imagenet2012 --file_format=array_record`, and accelerators; to start from a
checkpoint of timm or Hugging Face instead, give it with --config.dense.weights=FILE.
"""

from disco_jax.config import defaults

VARIANTS = ("full", "smoke", "imagenet")


def get_config(variant: str = "full"):
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    c = defaults()
    c.name = "vit_fashion_mnist" + ("" if variant == "full" else f"_{variant}")
    c.model.update(name="vit_micro", image_size=28, in_channels=1)
    c.data.update(source="idx:/usr/share/datasets/fashion-mnist", size=28)
    c.data.update(mean=(0.286,), std=(0.353,), train_transforms=("random_crop", "flip"))
    c.batch_size, c.eval_batch_size = 128, 500
    c.optimizer.update(name="adamw", weight_decay=0.05, clip_norm=1.0)
    c.dense.update(epochs=10.0, learning_rate=1e-3)
    c.sparse.update(epochs=3.0, learning_rate=5e-4, every=50)
    if variant == "smoke":
        c.data.source = "digits"
        c.max_steps = 3
        c.sparse.every = 1
        c.batch_size, c.eval_batch_size = 32, 120
    if variant == "imagenet":
        c.model.update(name="deit_s", image_size=224, in_channels=3)
        c.model.drop_path, c.model.dtype = 0.1, "bfloat16"
        c.data.update(source="tfds:imagenet2012", size=224)
        c.data.train_transforms = ("rgb", "random_resized_crop", "flip")
        c.data.eval_transforms = ("rgb", "resize_center_crop")
        c.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        c.batch_size, c.eval_batch_size = 1024, 1024
        c.optimizer.update(warmup_epochs=5.0, label_smoothing=0.1)
        c.dense.update(epochs=300.0, learning_rate=1e-3)
        c.sparse.update(epochs=30.0, learning_rate=1e-4, every=100)
    return c
