"""The command line: ``python -m disco_jax.main --config=configs/resnet50.py``."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from disco_jax import report, serving
from disco_jax.errors import DiscoError, require
from disco_jax.train.progress import console

MODES = ("all", "train", "eval", "freeze", "infer", "serve", "profile", "report")
TRAINED = ("eval", "freeze", "infer")  # modes that need what was trained before
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/resnet50.py:smoke.")
flags.DEFINE_enum(
    "mode", "all", MODES, "all: train, learn the masks, evaluate, freeze, run packed, report."
)
flags.DEFINE_string("workdir", None, "Checkpoints, metrics and reports; default runs/NAME.")
flags.DEFINE_string("coordinator", None, "Several hosts: HOST:PORT of node 0, a free port.")
flags.DEFINE_integer("num_nodes", None, "Several hosts: how many, as many as the plan has nodes.")
flags.DEFINE_integer("node_id", None, "Several hosts: which of them this is, from 0.")
flags.DEFINE_string("interface", None, "Several hosts: the network interface to talk through.")
flags.DEFINE_float("timeout", 60, "Several hosts: seconds after which a silent one is lost.", 1)
flags.DEFINE_string("images", None, "serve: a folder, or - for a path on each line of stdin.")
flags.DEFINE_integer("batch_size", 1, "serve: images at a time.", 1)
flags.DEFINE_string("output", None, "serve: a folder for masks or enlarged images.")
flags.DEFINE_boolean("overwrite", True, "serve: whether pictures may replace older ones.")
flags.DEFINE_boolean("supervise", False, "serve: start again when a node is lost.")
flags.DEFINE_integer("restarts", 10, "supervise: how often.", 0)

HOSTS = ("coordinator", "num_nodes", "node_id", "interface", "timeout")
FILES = ("images", "output", "overwrite")
FOR_MODES = {
    **dict.fromkeys(HOSTS, ("serve", "profile")),
    **dict.fromkeys((*FILES, "batch_size", "supervise", "restarts"), ("serve",)),
}


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
    _check_combination()


def _check_combination() -> None:
    for flag, modes in FOR_MODES.items():
        require(
            not FLAGS[flag].present or FLAGS.mode in modes,
            f"`--{flag}` (={FLAGS[flag].value}) is for --mode={' and --mode='.join(modes)}; remove "
            f"it from --mode={FLAGS.mode}, which runs on one host",
        )
    require(
        FLAGS.supervise or not (FLAGS["restarts"].present and FLAGS.restarts),
        f"`--restarts` (={FLAGS.restarts}) is for --supervise; add that, or remove it",
    )


def _reason(error: Exception) -> str:
    """The message in one line; of a traceback within it, what was raised."""
    text = str(error).replace("\\n", "\n").replace("\\'", "'").strip()
    if text[:1] == text[-1:] and text[:1] in "'\"":  # as a KeyError shows what it was given
        text = text[1:-1]
    missing = re.search(r"No such file or directory: '(.+?)'", text)
    if missing:  # ml_collections would name itself as well
        return f"there is no file {missing.group(1)}"
    if "Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return " ".join(text.split())


def _values(names: Iterable[str]) -> dict[str, Any]:
    return {name: FLAGS[name].value for name in names}


def dispatch(argv: list[str]) -> int:
    """Runs the chosen mode, and returns the exit code."""
    workdir = Path(FLAGS.workdir or Path("runs") / FLAGS.config.name)
    hosts = _values(HOSTS)
    if FLAGS.supervise:
        return serving.supervise(argv, FLAGS.images, hosts, FLAGS.restarts, FLAGS.batch_size)
    if FLAGS.mode == "serve":
        return serving.serve(FLAGS.config, workdir, hosts, FLAGS.batch_size, **_values(FILES))
    if FLAGS.mode == "profile":
        return serving.profile(FLAGS.config, workdir, hosts)
    if FLAGS.mode == "report":
        report.print_again(workdir)
    else:
        learnt = workdir / "checkpoints" / "sparse"
        require(
            FLAGS.mode not in TRAINED or learnt.is_dir(),
            f"`workdir` has no checkpoint in {learnt}; train first (--mode=train)",
        )
        from disco_jax import job  # what serves has no need of training code

        getattr(job.Job(FLAGS.config, workdir), f"run_{FLAGS.mode}")()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code.

    0; 2 after wrong use or bad input; 3 when another node was lost; 130 when interrupted.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    argv = sys.argv if argv is None else argv
    try:
        parse(argv)
        return dispatch(argv)
    except DiscoError as error:
        console.print(f"[bold red]error[/]: {error}", markup=True, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on, training from the newest checkpoint")
        return 130


if __name__ == "__main__":
    sys.exit(main())
