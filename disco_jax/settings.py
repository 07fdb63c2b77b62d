"""What a config says, checked before anything is loaded."""

from __future__ import annotations

from ml_collections import ConfigDict

from disco_jax import recipe, wire
from disco_jax.errors import require
from disco_jax.messages import check_message_bytes
from disco_jax.sparsify.quantise import WireDtype


def check(config: ConfigDict) -> None:
    """Refuses sizes that cannot work together, before anything is loaded."""
    for name in ("batch_size", "eval_batch_size", "accumulate", "nodes", "data_parallel"):
        require(
            isinstance(config[name], int) and config[name] >= 1,
            f"`{name}` (={config[name]!r}) must be a positive integer; set --config.{name}=1",
        )
    step = config.accumulate * config.data_parallel
    require(
        config.batch_size % step == 0,
        f"`batch_size` (={config.batch_size}) must be divisible by `accumulate` "
        f"(={config.accumulate}) x `data_parallel` (={config.data_parallel}); choose a multiple of "
        f"{step}",
    )
    for name in ("dense", "sparse"):
        require(
            config[name].epochs > 0,
            f"`{name}.epochs` (={config[name].epochs}) must be positive; 0.1 is a tenth of one",
        )
    require(
        not (config.dense.weights and config.dense.backbone),
        f"`dense.backbone` (={config.dense.backbone}) is for training, which `dense.weights` "
        f"(={config.dense.weights}) takes the place of; set one of them",
    )
    require(
        config.max_steps >= 0,
        f"`max_steps` (={config.max_steps}) must be 0 (all that the epochs take) or more",
    )
    require(
        0 <= config.sparse.mask_share < 1,
        f"`sparse.mask_share` (={config.sparse.mask_share}) must be at least 0 and below 1: the "
        "share of the updates after which the masks are final; choose one, such as 0.5",
    )
    require(
        config.eval_batch_size % config.data_parallel == 0,
        f"`eval_batch_size` (={config.eval_batch_size}) must be divisible by `data_parallel` "
        f"(={config.data_parallel}); choose a multiple",
    )
    require(
        config.data.eval_size != 0 or config.eval_batch_size == 1,
        f"`eval_batch_size` (={config.eval_batch_size}) must be 1 where `data.eval_size` is 0: "
        "images of different sizes make no batch; set it, and `data_parallel`, to 1",
    )
    require(
        not (planned(config) and (config.rows or config.wire_dtype or config.wire_rules)),
        "`plan` chooses `rows`, `wire_dtype` and `wire_rules` itself; set either plan.latency_ms "
        "and plan.memory, or these",
    )
    for wire_dtype in (config.wire_dtype, *(dtype for _, dtype in config.wire_rules)):
        if wire_dtype is not None:
            wire.check_wire_dtype(wire_dtype)
    check_message_bytes(config.message_bytes)
    recipe.check(config.sparse)
    require(
        len(config.data.mean) == len(config.data.std) and all(s > 0 for s in config.data.std),
        f"`data.mean` (={tuple(config.data.mean)}) and `data.std` (={tuple(config.data.std)}) must "
        "have one entry for each channel, and std must be positive; correct the config",
    )


def planned(config: ConfigDict) -> bool:
    """Whether the planner chooses what the config leaves open."""
    return config.plan.latency_ms is not None or config.plan.memory is not None


def wire_dtype(config: ConfigDict) -> WireDtype:
    """What a config says travels: its rules, then its ``wire_dtype`` for all else."""
    rules = tuple(config.wire_rules)
    if planned(config) and not rules:  # so long as nothing is chosen
        return config.plan.wire_dtypes[0]
    if config.wire_dtype is not None:
        rules = (*rules, ("", config.wire_dtype))
    return rules or None
