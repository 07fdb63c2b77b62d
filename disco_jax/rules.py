"""Rules: what holds for the exchanges whose path a regular expression finds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from disco_jax.errors import require

Value = TypeVar("Value")


def first_match(
    rules: Sequence[tuple[str, Value]], paths: Sequence[str], name: str = "rules"
) -> dict[str, Value]:
    """For each path the value of the first rule whose pattern is found in it.

    An error says what the rules are called: their ``name``.

    Raises:
      DiscoError: if a rule matches first for no path.

    >>> first_match([("0", "a"), ("s", "b")], ["blocks.0", "blocks.1", "head"])
    {'blocks.0': 'a', 'blocks.1': 'b'}
    """
    used: set[int] = set()
    found: dict[str, Value] = {}
    for path in paths:
        for i, (pattern, value) in enumerate(rules):
            if re.search(pattern, path):
                used.add(i)
                found[path] = value
                break
    # Where no exchange has a mask, for all layers are split by rows say, "" is true of all of none.
    unused = [rule[0] for i, rule in enumerate(rules) if i not in used and (paths or rule[0])]
    require(
        not unused,
        f"`{name}` entry {unused[0] if unused else ''!r} is not used: no exchange matches it "
        f"first; the exchanges are {', '.join(list(paths)[:6])}, ...; correct or remove it",
    )
    return found
