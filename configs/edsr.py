"""Super-resolution with EDSR, split over two nodes.

    python -m disco_jax.main --config=configs/edsr.py                 # two photographs, minutes
    python -m disco_jax.main --config=configs/edsr.py:smoke           # a few steps, to see it run
    python experiments/prepare_data.py --what photos --out=data
    python -m disco_jax.main --config=configs/edsr.py:photos          # wallpapers
    python -m disco_jax.main --config=configs/edsr.py:div2k           # the full recipe

The last is EDSR-baseline as in the paper (patches of 48, batch 16, 300,000 updates; of DIV2K's 800
training images a tenth validates); it needs
`tfds build div2k/bicubic_x2 --file_format=array_record`, and accelerators. Three or four times:
--config.model.scale=4 --config.task.scale=4. A folder of photographs will do as well:
--config.data.source=photos:ROOT. RCAN instead: --config.model.name=rcan
--config.model.depth=20, the blocks of one of its 10 groups.
"""

from disco_jax.config import defaults

VARIANTS = ("samples", "smoke", "photos", "div2k")


def get_config(variant: str = "samples"):
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    c = defaults()
    c.name = f"edsr_{variant}"
    c.task.update(name="super_resolution", scale=2)
    c.model.update(name="edsr", scale=2, width=16, depth=4, result_dtype="float16", parts=False)
    c.data.update(source="samples", size=24, eval_size=0, mean=(0.45,) * 3, std=(0.27,) * 3)
    c.data.train_transforms = ("random_patch", "dihedral", "degrade")
    c.data.eval_transforms = ("degrade",)
    c.batch_size, c.eval_batch_size = 16, 1
    c.optimizer.update(name="adamw", weight_decay=0.0, warmup_epochs=0.0)
    c.data.repeat = 800  # patches of each photograph in an epoch
    c.dense.update(epochs=10.0, learning_rate=2e-3)
    c.sparse.update(epochs=4.0, learning_rate=1e-3, every=20)
    c.checkpoint.every_epochs = 2.0
    if variant == "smoke":
        c.max_steps = 3
        c.sparse.every = 1
        c.batch_size = 2
    if variant == "photos":
        c.data.update(source="photos:data/photos", repeat=80)
    if variant == "div2k":
        c.model.update(width=64, depth=16)
        c.data.update(source="tfds_photos:div2k/bicubic_x2", size=48, repeat=22)
        c.dense.update(epochs=300.0, learning_rate=1e-4)
        c.sparse.update(epochs=75.0, learning_rate=5e-5, mask_share=0.5, every=100)
        c.sparse.calibration_images = 128  # patches, each of them four times the others' size
        c.checkpoint.every_epochs = 5.0
    return c
