"""Optimisers and learning rates from a config."""

from __future__ import annotations

from typing import Any

import jax
import optax

from disco_jax.errors import require

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "poly", "constant")


def learning_rate(
    peak: float, warmup_steps: int, steps: int, schedule: str = "cosine"
) -> optax.Schedule:
    """Linear warm-up from 0 to ``peak``, then a cosine to 0 at ``steps``.

    Or ``"poly"``, ``peak · (1 - t)^0.9`` as segmentation has it (Chen et al. 2017, arXiv
    1606.00915), or ``"constant"``.
    """
    warmup = min(warmup_steps, steps - 1)
    left = steps - warmup
    after = {
        "cosine": optax.cosine_decay_schedule(peak, left),
        "poly": optax.polynomial_schedule(peak, 0.0, 0.9, left),
        "constant": optax.constant_schedule(peak),
    }
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, after[schedule]], [warmup])


def make(
    config: Any, peak: float, steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
    """The optimiser that ``config`` (a config's ``optimizer``) describes.

    Weight decay is for kernels alone.

    Raises:
      DiscoError: for an unknown name or a learning rate that is not positive.
    """
    require(
        config.name in OPTIMIZERS,
        f"`optimizer.name` (={config.name!r}) must be one of {', '.join(OPTIMIZERS)}; "
        "choose one of these",
    )
    require(
        config.schedule in SCHEDULES,
        f"`optimizer.schedule` (={config.schedule!r}) must be one of {', '.join(SCHEDULES)}; "
        "choose one of these",
    )
    require(peak > 0, f"`learning_rate` (={peak}) must be positive; 0.1 is usual for SGD")
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rate = learning_rate(peak, warmup, steps, config.schedule)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adamw":
        adamw = optax.adamw(
            rate, b1=config.momentum, weight_decay=config.weight_decay, mask=is_kernel
        )
        return optax.chain(clip, adamw)
    decay = optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
    return optax.chain(clip, decay, optax.sgd(rate, config.momentum, nesterov=config.nesterov))


def is_kernel(params: Any) -> Any:
    """True for kernels; not for biases, scales, tokens and position embeddings."""
    return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
