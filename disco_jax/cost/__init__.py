"""What a plan costs, from the plan alone. Traffic and multiplications it says itself."""

from disco_jax.cost.budget import Latency, latency_budget
from disco_jax.cost.latency import LinkTime, Prediction, predict
from disco_jax.cost.link import Link, Links
from disco_jax.cost.memory import Memory, memory
from disco_jax.cost.planned import Planned, Point
from disco_jax.cost.planner import plan_splits

__all__ = [
    "Latency",
    "Link",
    "LinkTime",
    "Links",
    "Memory",
    "Planned",
    "Point",
    "Prediction",
    "latency_budget",
    "memory",
    "plan_splits",
    "predict",
]
