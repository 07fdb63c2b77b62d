"""The ways of choosing what to send that ``accuracy_vs_traffic.py`` compares."""

from typing import Any

ASSIGN = {"assignment": "local"}
BY_COST = {"budget": "by_cost", "floor": 0.3}
DISTILL = {"distill.weight": 0.9, "distill.features": 1.0}
GATES = {"gates": "hard_concrete"}
REGROW = {"regrow": "gradient"}
ALL = {**ASSIGN, **BY_COST, **DISTILL}
INT8 = {"wire_dtype": "int8"}  # four times the channels for the same bytes
FLOAT16 = {"wire_dtype": "float16", "row_dtype": "float16"}
INT4 = {"wire_dtype": "int4", "quantise": True}  # eight times, with rounding in training
PARTS = {"model.parts": True}  # of results, exact, instead of what the last layer reads
ROWS = {"rows": ("",)}  # all layers that have rows
EARLY = {"rows": (r"^conv$", r"^blocks\.[0-5]\.")}  # ResNet-20's stem and first two stages
# What each method changes in the `sparse` section of the config, in `model`, or `rows`.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "none": {"score": "none"},
    "random": {"score": "random", "schedule": "constant"},
    "uniform l2": {},
    "best": {**ASSIGN, **BY_COST, **INT8, "distill.weight": 0.5},
    # What each part adds, alone and together.
    "all": ALL,
    "assigned": ASSIGN,
    "by cost": BY_COST,
    "gates": GATES,
    "regrown": REGROW,
    "distilled": DISTILL,
    "int8": INT8,
    "int8 + assigned + by cost": {**ASSIGN, **BY_COST, **INT8},
    "all + int8": {**ALL, **INT8},
    "int8 in training": {**INT8, "quantise": True},
    "int4": INT4,
    # Densities and wire dtypes as `cost.plan_splits` chooses them.
    "planned": {**ASSIGN, "quantise": True, "distill.weight": 0.5, "planned": True},
    "best int4": {**ASSIGN, **BY_COST, **INT4, "distill.weight": 0.5},
    "in training": {**ASSIGN, **BY_COST, **INT8, "quantise": True},
    "best in training": {**ASSIGN, **BY_COST, **INT8, "quantise": True, "distill.weight": 0.5},
    "all but assigned": {**BY_COST, **DISTILL},
    "all but by cost": {**ASSIGN, **DISTILL},
    "all but distilled": {**ASSIGN, **BY_COST},
    "all + regrown": {**ALL, **REGROW},
    "all + gates": {**ASSIGN, **DISTILL, **GATES},
    # Without labels or training.
    "one-shot": {"trained": False},
    "post-training": {"post_training": True, **ASSIGN, **BY_COST},
    "best post-training": {"post_training": True, **ASSIGN, **BY_COST, **INT8},
    # Other choices.
    "uniform l1": {"score": "l1"},
    "taylor": {"score": "taylor"},
    "activation": {"score": "activation"},
    "reconstruction": {"score": "reconstruction"},
    "feedback": {"regrow": "feedback"},
    "lasso": {"lasso": 1e-3},
    "straight through": {"gates": "straight_through"},
    # Split by rows: exact, without masks. Where rows come first, only what is behind has masks.
    "rows": ROWS,
    "rows early": {**EARLY, **ASSIGN, **INT8, "quantise": True, "row_dtype": "float16"},
    "rows early, exact": {**EARLY, **FLOAT16, "trained": False},
    # For models whose last layer has few outputs.
    "parts in training": {**ASSIGN, **BY_COST, **INT8, **PARTS, "quantise": True},
}
