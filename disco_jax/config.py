"""The fields that every config has, with defaults for classifying small images."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict


def defaults() -> ConfigDict:
    """All fields; name, model and data source are left empty."""
    c = ConfigDict()
    c.name = ""
    c.seed = 0
    c.nodes = 2
    c.data_parallel = 1  # copies of the node group, each working on its share of the batch
    c.emulate = config_dict.placeholder(bool)  # None: real devices where there are enough
    c.model = ConfigDict({"name": ""})
    c.task = ConfigDict({"name": "classification"})  # and its attributes, see disco_jax/tasks
    c.data = ConfigDict(
        {
            "source": "",
            "size": 32,
            "repeat": 1,  # how often an epoch takes each training image
            "eval_size": -1,  # -1: as `size`; 0: every image as it is, one at a time
            "max_objects": 100,  # boxes an image has at most
            "train_transforms": ("resize",),
            "eval_transforms": ("resize",),
            "mean": (0.5,),
            "std": (0.25,),
        }
    )
    c.batch_size = 64
    c.eval_batch_size = 120
    # Micro-batches that make up one batch. Objects and pixels are averaged over each of these, so
    # that the losses of detection and segmentation depend on it a little.
    c.accumulate = 1
    c.max_steps = 0  # 0: as many as the epochs take
    c.optimizer = ConfigDict(
        {
            "name": "sgd",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "clip_norm": 0.0,  # 0: none
            "warmup_epochs": 1.0,
            "schedule": "cosine",  # or poly, of the power 0.9, or constant
            "label_smoothing": 0.0,
            "ema_decay": 0.0,  # 0: none
        }
    )
    # Files of interop.pretrained. weights: of the model, which is not trained then; backbone: a
    # classifier's, from which a detector or a segmentation starts.
    c.dense = ConfigDict({"epochs": 6.0, "learning_rate": 0.05})
    c.dense.weights = config_dict.placeholder(str)
    c.dense.backbone = config_dict.placeholder(str)
    c.sparse = ConfigDict(
        {
            "epochs": 3.0,
            "learning_rate": 0.02,
            "density": 0.2,
            "score": "l2",
            "budget": "uniform",
            "floor": 0.0,  # by_cost: share of its density that every exchange keeps
            "charge": 0.0,  # by_cost: bytes that an exchange costs if anything of it survives
            "level": True,  # by_cost: equal counts for all readers, so that packing needs no fill
            "links": (),  # per_link: for every reader a row, what it may read from every owner
            "rules": (),  # (pattern of exchange paths, {"density": ..., "score": ...})
            "schedule": "cubic",
            "regrow": "none",
            "turnover": 0.3,
            "lasso": 0.0,
            "mask_share": 0.5,  # share of the updates after which the masks are final
            "every": 10,  # updates between two choices of masks
            "gates": "none",  # or hard_concrete, straight_through: trained for mask_share
            "gate_learning_rate": 0.05,
            "post_training": False,  # least squares on the calibration images, no training
            "assignment": "none",  # "local": strong connections within a node, before any mask
            "calibration_images": 512,
            "quantise": False,  # round in training what the wire rounds, from the first mask on
        }
    )
    # Of the dense model, while masks are learned: weight 0 and features 0 do without.
    c.sparse.distill = ConfigDict({"weight": 0.0, "temperature": 4.0, "features": 0.0})
    c.wire_dtype = config_dict.placeholder(str)  # None: send what is computed
    c.wire_rules = ()  # (pattern of exchange paths, wire dtype), before wire_dtype
    # What a message of the packed model has at most, per example; 100_000 for several hosts.
    c.message_bytes = config_dict.placeholder(int)
    # Patterns of the layers that are split by rows and not by channels, and what rows travel in.
    c.rows = ()
    c.row_dtype = config_dict.placeholder(str)  # None: what is computed
    # Chooses rows, densities and wire dtypes once the dense model is trained, if a limit is given:
    # of the latency, then the least memory is sought; of the memory, then the least latency; of
    # both, then the least loss. Every exchange keeps at least what `sparse.density` would.
    c.plan = ConfigDict(
        {
            "latency_ms": config_dict.placeholder(float),
            "memory": config_dict.placeholder(float),  # share of a single node's weights
            "mbit": 100.0,  # of every link
            "link_ms": 0.2,  # what an empty message takes
            "gmacs": 40.0,  # 10^9 multiplications per second of a node
            "wire_dtypes": ("int4", "int8"),
            "row_dtype": "float16",
        }
    )
    c.checkpoint = ConfigDict({"keep": 2, "every_epochs": 1.0})
    return c


def filled(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A config as a checkpoint has it; fields from after its time get their defaults.

    >>> filled({"dense": {"epochs": 2.0}})["dense"]["learning_rate"]
    0.05
    """
    return _merged(defaults().to_dict(), saved)


def _merged(known: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k for k, v in known.items() if isinstance(v, Mapping) and k in saved}
    return {**known, **saved, **{k: _merged(known[k], saved[k]) for k in nested}}
