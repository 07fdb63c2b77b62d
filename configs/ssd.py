"""Detection with SSD, split over two nodes.

    python -m disco_jax.main --config=configs/ssd.py                  # digits in scenes, minutes
    python -m disco_jax.main --config=configs/ssd.py:smoke            # a few steps, to see it run
    python experiments/prepare_data.py --what scenes --out=data
    python -m disco_jax.main --config=configs/ssd.py:stamps           # cut-outs on photographs
    python -m disco_jax.main --config=configs/ssd.py:voc              # the full recipe

The last is SSD300 on VGG-16, with the paper's loss and augmentations, for about 50,000 updates of
32 images; it needs `tfds build voc/2007 --file_format=array_record`, accelerators, and
torchvision's VGG-16 to start from: --config.dense.backbone=vgg16.pth (or its SSD300 instead of
training: --config.dense.weights). It learns from the 2,501 images of VOC2007's train split, for
validation is for choices; the paper takes VOC2012's as well. COCO's and VOC's own folders will do:
--config.data.source=coco:ROOT, or voc:VOCdevkit/VOC2007.
"""

from disco_jax.config import defaults

VARIANTS = ("scenes", "smoke", "stamps", "voc")
AUGMENTED = ("distort", "expand", "overlap_crop", "resize", "mirror")


def get_config(variant: str = "scenes"):
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    c = defaults()
    c.name = f"ssd_{variant}"
    c.task.name = "detection"
    c.model.update(name="ssd_resnet18", width=16, extra=3, result_dtype="float16")
    c.model.scales = (0.12, 0.3, 0.5, 0.75, 0.95)
    c.data.update(source="scenes", size=64, mean=(0.3,) * 3, std=(0.25,) * 3, max_objects=8)
    c.data.update(train_transforms=(), eval_transforms=())
    c.batch_size, c.eval_batch_size = 16, 40
    c.optimizer.update(name="adamw", weight_decay=0.01, warmup_epochs=0.5)
    c.dense.update(epochs=8.0, learning_rate=2e-3)
    c.sparse.update(epochs=3.0, learning_rate=1e-3, every=20)
    if variant == "smoke":
        c.max_steps = 3
        c.sparse.every = 1
        c.model.width = 8
        c.batch_size = 4
    if variant == "stamps":
        c.model.update(extra=4, scales=(0.1, 0.2, 0.37, 0.54, 0.71, 0.9))
        c.data.update(source="coco:data/scenes", size=160, train_transforms=AUGMENTED)
        c.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        c.data.eval_transforms = ("resize",)
        c.dense.update(epochs=14.0, learning_rate=2e-3)
        c.sparse.update(epochs=4.0, learning_rate=1e-3)
        c.checkpoint.every_epochs = 2.0
    if variant == "voc":
        c.model.update(name="ssd300", width=64, extra=4, dtype="bfloat16")
        c.model.scales = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
        c.data.update(source="tfds_objects:voc/2007", size=300)
        # The colours that VGG's weights were trained on, in units of 0 to 1.
        c.data.update(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255,) * 3)
        c.data.update(train_transforms=AUGMENTED, eval_transforms=("resize",))
        c.batch_size = 32
        c.optimizer.update(name="sgd", weight_decay=5e-4, warmup_epochs=2.0)
        c.dense.update(epochs=640.0, learning_rate=1e-3)
        c.sparse.update(epochs=200.0, learning_rate=2e-4, mask_share=0.5, every=100)
    return c
