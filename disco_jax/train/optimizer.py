"""Optimisers and learning rates from a config."""

from __future__ import annotations

from typing import Any

import jax
import optax

from disco_jax.errors import require

OPTIMIZERS = ("sgd", "adamw")


def learning_rate(peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to ``peak``, then a cosine to 0 at ``steps``."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup_steps, steps - 1), steps)


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
    require(peak > 0, f"`learning_rate` (={peak}) must be positive; 0.1 is usual for SGD")
    rate = learning_rate(peak, round(config.warmup_epochs * steps_per_epoch), steps)
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
