"""The one exception that a user of the library is meant to read."""


class DiscoError(ValueError):
    """Wrong use or bad input: names the thing, its value, the rule and the remedy.

    The command line prints the message alone, without a traceback, and exits with ``exit_code``.
    """

    exit_code = 2


def require(condition: bool, message: str) -> None:
    """Raises :class:`DiscoError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise DiscoError(message)
