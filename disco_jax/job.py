"""One experiment from a config: train, learn masks, evaluate, freeze, run, report."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from disco_jax import models, pictures, plan, planning, settings, tasks, wire
from disco_jax import recipe as recipes
from disco_jax import report as reports
from disco_jax.data import preprocess, sources
from disco_jax.data.images import Repeated
from disco_jax.data.pipeline import evaluation_batches, training_batches
from disco_jax.errors import require
from disco_jax.interop import pretrained
from disco_jax.mesh import NodeMesh
from disco_jax.plan import artifact
from disco_jax.tasks import shown
from disco_jax.tasks.super_resolution import self_ensemble
from disco_jax.train import optimizer
from disco_jax.train.checkpoint import Checkpoints, check_writable
from disco_jax.train.loop import Phase, evaluate, fit
from disco_jax.train.progress import console
from disco_jax.train.step import TrainState


class Job:
    """A config at work in a directory. Everything it learns is in checkpoints there.

    Args:
      config: see ``configs/``.
      workdir: where checkpoints, metrics and reports go.

    Raises:
      DiscoError: if the config is wrong, the directory cannot be written, data are missing, or
        devices are too few.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        check_writable(workdir)
        settings.check(config)
        config = config.copy_and_resolve_references()  # a planner fills in the rest
        self.config, self.workdir = config, workdir
        self.mesh = NodeMesh(config.nodes, config.data_parallel, emulate=config.emulate)
        console.print(f"{config.name}: {config.model.name} on {self.mesh}")
        data = config.data
        self.train_set = Repeated(sources.load(data.source, "train"), data.repeat)
        self.train_preprocess = preprocess.training(config)
        self.eval_preprocess = preprocess.evaluation(config)
        classes = self.train_set.num_classes
        self.task = tasks.of(config, classes)
        options = config.model.to_dict() | ({"num_classes": classes} if classes else {})
        self.model = models.create(
            options.pop("name"), mesh=self.mesh, rngs=nnx.Rngs(config.seed), **options
        )
        self.images = jax.ShapeDtypeStruct(
            (config.data_parallel, data.size, data.size, len(data.mean)), np.float32
        )
        self._split()
        self.phase("dense"), self.phase("sparse")  # what is wrong there is said now
        for split in sources.SPLITS:
            sources.load(data.source, split)

    def _split(self) -> None:
        """Splits the model as the config says."""
        config = self.config
        plan.split(self.model, self.images, config.rows, wire_dtype=config.row_dtype)
        self.recipe = recipes.Recipe(
            config.sparse, self.model, self.images, settings.wire_dtype(config)
        )

    def _take_plan(self) -> None:
        """Splits the model as a planner has chosen, if there is one; once."""
        if settings.planned(self.config) and not (self.config.rows or self.config.wire_rules):
            planning.fill_in(self.config, self.workdir)
            self._split()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds to the wall time of a stage, which may take several runs."""
        start, path = time.perf_counter(), self.workdir / "seconds.json"
        yield
        before = self.seconds().get(name, 0) if name.startswith("train") else 0
        now = {**self.seconds(), name: round(before + time.perf_counter() - start, 2)}
        path.write_text(json.dumps(now))

    def seconds(self) -> dict[str, float]:
        """Wall times so far."""
        path = self.workdir / "seconds.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def settings(self, phase: str) -> dict[str, Any]:
        """All of the config that determines what comes out of a phase."""
        free = {"name", "emulate", "checkpoint", "eval_batch_size", "message_bytes"}
        free |= {"sparse"} if phase == "dense" else set()
        if phase == "dense" or not self.config.sparse.quantise:
            free |= {"wire_dtype", "wire_rules"}
        chosen = {k: v for k, v in self.config.to_dict().items() if k not in free}
        return json.loads(json.dumps(chosen))  # as a checkpoint gives it back

    def phase(self, name: str) -> Phase:
        """The phase ``"dense"``, ``"gates"`` or ``"sparse"`` of the config."""
        config = self.config
        schedule = config.dense if name == "dense" else config.sparse
        per_epoch = len(self.train_set) // config.batch_size
        require(
            per_epoch >= 1,
            f"`batch_size` (={config.batch_size}) must be at most the {len(self.train_set)} "
            "training images; choose a smaller batch",
        )
        updates = max(2, round(schedule.epochs * per_epoch))
        if config.max_steps:
            updates = min(updates, config.max_steps)
        gated = min(round(schedule.get("mask_share", 0) * updates), updates - 1)
        if self.recipe.gated and name != "dense":
            updates = max(2, gated if name == "gates" else updates - gated)
        tx = optimizer.make(config.optimizer, schedule.learning_rate, updates, per_epoch)
        if name == "gates":
            tx = self.recipe.gate(tx)
        if name == "sparse":
            tx = self.recipe.transform(tx, gated)
        micro = config.accumulate
        if micro > 1:
            tx = optax.MultiSteps(tx, micro).gradient_transformation()
        return Phase(
            name=name,
            steps=updates * micro,
            tx=tx,
            steps_per_epoch=per_epoch * micro,
            save_every=max(1, round(config.checkpoint.every_epochs * per_epoch)) * micro,
            keep=config.checkpoint.keep,
            task=self.task,
            ema_decay=config.optimizer.ema_decay,
            accumulate=micro,
            settings=self.settings(name),
            distill=self.recipe.distillation() if name != "dense" else None,
            penalty=self.recipe.penalty if name == "gates" else None,
        )

    def train(self, name: str) -> None:
        """Runs a phase, from its newest checkpoint where there is one."""
        config = self.config
        if name == "dense" and config.dense.weights:
            pretrained.load(self.model, config.dense.weights)
            return
        if name == "dense" and config.dense.backbone:
            pretrained.load_backbone(self.model, config.dense.backbone)
        batches = training_batches(
            self.train_set,
            self.train_preprocess,
            config.batch_size // config.accumulate,
            seed=config.seed + ("dense", "sparse", "gates").index(name),
        )
        phase = self.phase(name)  # may give the model gates, which the validator must know
        validate = self._validator()
        with self.timed(f"train_{name}"):
            fit(
                self.model,
                phase,
                batches,
                validate,
                mesh=self.mesh,
                workdir=self.workdir,
            )

    def learn(self) -> None:
        """From the trained dense model to masks and the weights that go with them."""
        if settings.planned(self.config):
            planned = planning.choose(self.config, self.model, self.calibration, self.workdir)
            if planned is not None:
                console.print(str(planned), highlight=False)
            self._take_plan()
        self.recipe.prepare(self.calibration)
        if self.config.sparse.post_training:
            with self.timed("post_training"):
                self.recipe.post_train(self.calibration)
            self._save("sparse")
            return
        if self.recipe.gated:
            self.train("gates")
            self.recipe.close()
        self.train("sparse")

    def calibration(self) -> list[np.ndarray]:
        """Batches of training images, prepared as for evaluation; their labels are not used.

        Images of different sizes do not make a batch: then it is the patches that are trained on.
        """
        config, prepare, size = self.config, self.eval_preprocess, self.config.eval_batch_size
        if prepare.size == 0:
            prepare, size = self.train_preprocess, config.batch_size
        wanted = min(config.sparse.calibration_images, len(self.train_set))
        batches = evaluation_batches(self.train_set, prepare, size)
        return [b["image"] for b in itertools.islice(batches, max(1, wanted // size))]

    def _validator(self) -> Callable[[nnx.Module], dict[str, float]]:
        held_out = sources.load(self.config.data.source, "validation")
        program = plan.Program(self.model)

        def validate(model: nnx.Module) -> dict[str, float]:
            program.refresh(model)
            return self._evaluate(program, held_out)

        return validate

    def restore(self, name: str) -> None:
        """Loads the newest weights and masks of a phase into the model."""
        if name != "dense":
            self._take_plan()
            self.recipe.shape()
        phase = self.phase(name)
        like = TrainState.create(self.model, phase.tx, mesh=self.mesh, ema=phase.ema_decay > 0)
        checkpoints = Checkpoints(self.workdir / "checkpoints" / name, keep=phase.keep)
        state, _ = checkpoints.restore(like, settings=phase.settings)
        checkpoints.close()
        state.write_to(self.model)

    def validate(self, run: Any) -> float:
        """The metric on the validation split, by which choices are made."""
        held_out = sources.load(self.config.data.source, "validation")
        return self._evaluate(run, held_out)[self.task.metric]

    def _save(self, name: str) -> None:
        """Writes the model as the end of a phase that had no training."""
        phase = self.phase(name)
        state = TrainState.create(self.model, phase.tx, mesh=self.mesh, ema=phase.ema_decay > 0)
        checkpoints = Checkpoints(self.workdir / "checkpoints" / name, keep=phase.keep)
        checkpoints.save(state, data={}, settings=phase.settings)
        checkpoints.close()

    def test(self, run: Any) -> float:
        """The metric on the test split, which no choice has looked at."""
        test = sources.load(self.config.data.source, "test")
        return self._evaluate(run, test)[self.task.metric]

    def draw(self, **runs: Any) -> None:
        """Writes ``pictures.png``: what models answer to the first images of the test split."""
        test = sources.load(self.config.data.source, "test")
        batch = next(evaluation_batches(test, self.eval_preprocess, self.config.eval_batch_size))
        answers = {name: jax.device_get(run(batch["image"])) for name, run in runs.items()}
        pictures.write(
            self.task, self.eval_preprocess, batch, answers, self.workdir / "pictures.png"
        )

    def _evaluate(self, run: Any, source: sources.Source) -> dict[str, float]:
        size = self.config.eval_batch_size
        if getattr(self.task, "self_ensemble", False):
            run = partial(self_ensemble, run)
        return evaluate(self.task, run, source, self.eval_preprocess, size, mesh=self.mesh)

    def _check_packed(self) -> None:
        """Refuses to pack what could not run on the images to come, before anything is trained."""
        config = self.config
        require(
            config.data.eval_size != 0 or not config.rows,
            f"`rows` (={tuple(config.rows)}) are planned for images of one size, but "
            "`data.eval_size` (=0) takes every image as it is; set --config.data.eval_size, or no "
            "rows",
        )

    def freeze(self) -> plan.Frozen:
        """Packs the model for one device per node, and writes ``plan.json``."""
        with self.timed("freeze"):
            asked = None if self.config.sparse.quantise else self.recipe.wire_dtype
            integers = any(map(wire.calibrated, self.recipe.wires.values()))
            images = np.concatenate(self.calibration()) if integers else self.images
            frozen = plan.freeze(
                self.model, images, wire_dtype=asked, message_bytes=self.config.message_bytes
            )
            (self.workdir / "plan.json").write_text(frozen.plan.to_json())
        if not self.mesh.emulated:
            plan.verify(frozen, self.images)
            console.print("the compiled program communicates what the plan says, to the byte")
        return frozen

    def run_all(self) -> None:
        """Dense training, masks, the metric of both, the packed model, the report."""
        self._check_packed()
        found = {}
        self.train("dense")
        dense = plan.Program(nnx.clone(self.model))
        found["dense"] = self.test(dense)
        self.learn()
        with self.timed("evaluate_masked"):
            found["masked"] = self.test(plan.Program(self.model))
        frozen = self.freeze()
        with self.timed("evaluate_packed"):
            found["packed"] = self.test(frozen)
        self.draw(dense=dense, packed=frozen)
        content = reports.build(
            frozen.plan,
            name=self.config.name,
            mesh=repr(self.mesh),
            task=self.task,
            found=found,
            seconds=self.seconds(),
        )
        reports.write(content, self.workdir)
        reports.show(content)
        console.print(
            f"written to {self.workdir}: report.json, report.html, plan.json, traffic.png, "
            "pictures.png"
        )

    def run_train(self) -> None:
        """All phases of training."""
        self.train("dense")
        self.learn()

    def run_eval(self) -> None:
        """Prints the masked model's metric on the test split."""
        self.restore("sparse")
        masked = plan.Program(self.model)
        value = shown(self.test(masked), self.task.unit)
        console.print(f"masked: test {self.task.metric} {value}")
        self.draw(masked=masked)

    def run_freeze(self) -> None:
        """Saves the packed model for ``--mode=serve``, and prints the plan."""
        self._check_packed()
        self.restore("sparse")
        frozen = self.freeze()
        frozen.save(self.workdir / artifact.PACKED, replace=True)
        console.print(str(frozen.plan), highlight=False)

    def run_infer(self) -> None:
        """Runs the packed model on the test split."""
        self._check_packed()
        self.restore("sparse")
        frozen = self.freeze()
        with self.timed("infer"):
            value = shown(self.test(frozen), self.task.unit)
        console.print(
            f"packed on {frozen.mesh}: test {self.task.metric} {value} in "
            f"{self.seconds()['infer']} s"
        )
        self.draw(packed=frozen)
