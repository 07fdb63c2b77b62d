"""The command line: ``python -m disco_jax.main --config=configs/resnet50.py``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from disco_jax import job
from disco_jax.errors import DiscoError
from disco_jax.train.progress import console

MODES = ("all", "train", "eval", "freeze", "infer", "report")
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/resnet50.py:smoke.")
flags.DEFINE_enum(
    "mode", "all", MODES, "all: train, learn the masks, evaluate, freeze, run packed, report."
)
flags.DEFINE_string("workdir", None, "Checkpoints, metrics and reports; default runs/NAME.")


def parse(argv: list[str]) -> None:
    """Parses the command line.

    Raises:
      DiscoError: for anything absl or ml_collections does not like.
    """
    try:
        rest = FLAGS(argv)[1:]
        name = FLAGS.config and FLAGS.config.name  # a file that does not load fails here
    except Exception as error:  # a config file can raise anything
        raise DiscoError(f"`command line`: {_reason(error)}; see --help and the config") from None
    if rest:
        raise DiscoError(f"`{rest[0]}` is not a flag; write --name=value, and see --help")
    if name is None:
        raise DiscoError("`--config` is missing; pass one, such as --config=configs/resnet50.py")


def _reason(error: Exception) -> str:
    """The message in one line; of a traceback within it, what was raised."""
    text = str(error).strip().strip("'\"")
    if "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return " ".join(text.split())


def dispatch() -> None:
    """Runs the chosen mode."""
    workdir = Path(FLAGS.workdir or Path("runs") / FLAGS.config.name)
    if FLAGS.mode == "report":
        job.print_report(workdir)
    else:
        getattr(job.Job(FLAGS.config, workdir), f"run_{FLAGS.mode}")()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after wrong use or bad input, 130 when interrupted."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        parse(sys.argv if argv is None else argv)
        dispatch()
    except DiscoError as error:
        console.print(f"[bold red]error[/]: {error}", markup=True, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the newest checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
