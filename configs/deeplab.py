"""Segmentation with DeepLabV3, split over two nodes.

    python -m disco_jax.main --config=configs/deeplab.py              # digits in scenes, minutes
    python -m disco_jax.main --config=configs/deeplab.py:smoke        # a few steps, to see it run
    python experiments/prepare_data.py --what land --out=data
    python -m disco_jax.main --config=configs/deeplab.py:land         # land cover from space
    python -m disco_jax.main --config=configs/deeplab.py:pets         # the full recipe

The last is DeepLabV3 on a ResNet-50 (crops of 513, output stride 16, batch 16, 30,000 updates,
the paper's poly schedule; torchvision's auxiliary head, no multi-grid); it needs
`tfds build oxford_iiit_pet --file_format=array_record`, accelerators, and torchvision's ResNet-50
to start from: --config.dense.backbone=resnet50.pth (or its DeepLabV3 instead of training:
--config.dense.weights). Any images with masks will do: --config.data.source=masks:ROOT.
"""

from disco_jax.config import defaults

VARIANTS = ("scenes", "smoke", "land", "pets")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def get_config(variant: str = "scenes"):
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    c = defaults()
    c.name = f"deeplab_{variant}"
    c.task.name = "segmentation"
    c.model.update(
        name="deeplabv3_resnet18", width=16, head_width=32, dropout=0.1, result_dtype="float16"
    )
    c.data.update(source="segments", size=64, mean=(0.3,) * 3, std=(0.25,) * 3)
    c.data.update(train_transforms=(), eval_transforms=())
    c.batch_size, c.eval_batch_size = 16, 40
    c.optimizer.update(name="adamw", weight_decay=0.01, warmup_epochs=0.5)
    c.dense.update(epochs=4.0, learning_rate=2e-3)
    c.sparse.update(epochs=2.0, learning_rate=1e-3, every=20)
    if variant == "smoke":
        c.max_steps = 3
        c.sparse.every = 1
        c.model.update(width=8, head_width=8)
        c.batch_size = 4
    if variant == "land":
        c.data.update(source="masks:data/land", size=128, **IMAGENET)
        c.data.train_transforms = ("scale_crop", "mirror", "turn")
        c.data.eval_transforms = ("fit",)
        c.dense.update(epochs=25.0, learning_rate=2e-3)
        c.sparse.update(epochs=8.0, learning_rate=1e-3)
        c.checkpoint.every_epochs = 5.0
    if variant == "pets":
        c.model.update(name="deeplabv3_resnet50", width=64, head_width=256, dropout=0.5)
        c.model.update(output_stride=16, auxiliary=True, dtype="bfloat16")
        c.data.update(source="tfds_masks:oxford_iiit_pet#3", size=513, **IMAGENET)
        c.data.train_transforms = ("scale_crop", "mirror")
        c.data.eval_transforms = ("fit",)
        c.optimizer.update(name="sgd", weight_decay=1e-4, schedule="poly", warmup_epochs=0.0)
        c.dense.update(epochs=145.0, learning_rate=0.007)
        c.sparse.update(epochs=50.0, learning_rate=0.001, mask_share=0.5, every=100)
    return c
