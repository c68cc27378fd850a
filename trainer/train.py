"""The `train` job: from a config to a trained, checkpointed, resumable run."""

import logging
import os
from contextlib import ExitStack, closing
from typing import Any

import torch
from omegaconf import OmegaConf

from conf.schema import build
from conf.secrets import without_secrets
from data.inspect import bucket_table, contact_sheet
from data.plan import Plan, lanes_of, split_batch
from data.run_directory import RunDirectory
from data.tars import TarSplit
from data.tracking import WandbConfig
from trainer.callbacks import Every, Log, UpdateEma
from trainer.config import Config as Config
from trainer.config import preflight as preflight
from trainer.distributed import World, barrier, first_on_node, joined
from trainer.encodings import use_encodings
from trainer.hang import HangWatch
from trainer.hardware import peak_flops
from trainer.init_from import InitFrom
from trainer.loop import Callback, Run, fit
from trainer.meter import Meter
from trainer.neighbour_models import with_models
from trainer.networks import build_networks
from trainer.objectives.base import Publishes
from trainer.passes import Passes
from trainer.phases import build_by_phase
from trainer.publishing import publish
from trainer.rehearsal import rehearse
from trainer.report import write_report
from trainer.samples import SampleGrid, pictures_for
from trainer.serving import Serving
from trainer.signals import StopSignal
from trainer.state import RunState
from trainer.tracking import Tracker
from trainer.validation import Validation, validation_batches

log = logging.getLogger(__name__)

# Batches on a dry run's contact sheet.
_SHEET_ROWS = 12


def dry_run(split: TarSplit, plan: Plan, directory: RunDirectory) -> None:
    """Write a contact sheet of real batches, one lane after another of the first steps, and print the buckets' fill."""
    loader = split.loader(plan, range(plan.lanes), workers=0)
    batches = [batch for step in range(2) for batch in loader.step(step)][:_SHEET_ROWS]
    path = directory.path / "contact_sheet.png"
    table = bucket_table(plan)
    contact_sheet(batches, path, table)
    print(f"{table}\n{path}")


def run(config: Any) -> None:
    """Train, or go on training, the run of this config."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads this at its first call; see torch's notes on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with joined(config.device) as world, ExitStack() as resources:
        train(config, world, resources)


def begin(state: RunState, init_from: Any, adapter: Any = None) -> None:
    """Go on from the run's newest checkpoint; without one, from the weights of `init_from`, or from nothing. Adapters
    begin as nothing beside them."""
    if state.restore() or init_from is None or adapter:
        return
    source = {"path": init_from} if isinstance(init_from, str) else init_from
    for report in InitFrom(**source).apply(state.engine):
        log.info("%s", report)
    state.ema.attach(state.engine)


def train(config: Any, world: World, resources: ExitStack) -> None:
    """The run of this config, as one of the world's ranks. What must be closed in any case goes to `resources`."""
    directory = RunDirectory(config.runs, config.name)
    plain: dict[str, Any] = without_secrets(OmegaConf.to_container(config))

    # Data: what each slice holds, and which of them this rank serves.
    data, buckets = build(config.data), build(config.buckets)
    if config.dry_run:
        data.show_fields()
    split = first_on_node(world, lambda: data.open(buckets))
    held_out = first_on_node(world, lambda: data.open(buckets, "validation")) if data.holdout else None
    lanes, slice_size = split_batch(config.batch, config.lanes)
    mine = lanes_of(world.rank, world.size, lanes)

    if config.dry_run:
        if world.is_main:
            dry_run(split, split.plan(lanes, slice_size, config.seed), directory)
        return

    # How its slices are passed through networks.
    objective = build(config.objective)
    shares = split.shares()
    shapes = list(shares)
    arrange = Passes(config.pass_size, slice_size, len(mine), len(shapes), objective.scope)

    # Networks, on an engine.
    networks = build_networks(config, objective, split, world)
    if data.encoded is not None:
        networks |= use_encodings(config, data, networks, world)
    stand_ins = [
        f"{name}: {told}" for name, network in networks.items() if (told := getattr(network, "stand_in", None))
    ]
    for told in stand_ins:
        log.warning("a stand-in, whose figures are not those of the real thing: %s", told)
    optimizers = build_by_phase(config.optimizer, objective.phases, "optimizer")
    schedules = build_by_phase(config.schedule, objective.phases, "schedule")
    engine = build(config.engine).build(networks, objective.phases, optimizers, config.seed, world.device)
    ema = build(config.ema)
    ema.attach(engine)

    # Where to go on from.
    if world.is_main:
        resources.enter_context(directory.alone())
    barrier()
    hang = HangWatch(config.hang_timeout, directory.path / "logs", world)
    policy = build(config.checkpoint)
    state = RunState(
        engine,
        ema,
        policy.build(directory.checkpoints, hang.beat),
        lambda start: split.plan(lanes, slice_size, config.seed, start),
        with_models(plain, data),
        data.replan,
    )
    begin(state, config.init_from, config.get("adapter"))
    if world.is_main:
        directory.write_config(plain)
        directory.rewind(state.step)
    barrier()

    # What happens between steps.
    meter = Meter(objective.phases, config.batch, world.device)
    wandb = WandbConfig(**config.log.wandb) if config.log.wandb is not None else None
    tracker = resources.enter_context(Tracker(directory, plain, config.steps, state.step, wandb, world.is_main))
    loader = split.loader(state.segments.plan, mine, pin_memory=world.device.type == "cuda")
    serving = resources.enter_context(closing(Serving(loader, directory.path, state.step, meter, world.device)))

    def save(step: int) -> None:
        serving.flush(step)
        state.save(step)

    def roll_back(bad: list[int]) -> int:
        step = state.roll_back(bad)
        serving.rewind(step)
        if world.is_main:
            directory.rewind(step)
        meter.restart()
        return step

    logging_ = Log(meter, tracker, engine.steps_taken, config.steps, config.log.every)
    callbacks: list[Callback] = [UpdateEma(ema), logging_, Every(serving.flush, config.log.every, config.steps, meter)]
    if held_out is not None and config.validation.every is not None:
        batches = validation_batches(held_out, config.validation.samples, arrange.size, world.rank, world.size)
        validation = Validation(batches, hang.beat)
        logging_.validate_every = config.validation.every
        logging_.validate = lambda: validation(objective, engine, ema, config.validation.ema)
    if config.samples.every is not None:
        pictures = pictures_for(config.samples.prompts, config.samples.count, held_out or split)
        grid = SampleGrid(pictures, objective, directory, tracker, hang.beat)
        callbacks.append(
            Every(lambda step: grid(engine, ema, config.samples.ema, step), config.samples.every, config.steps, meter)
        )
    # Not amid steps without a finite gradient: a roll-back goes to before them.
    callbacks.append(Every(lambda step: None if loop.bad_steps else save(step), policy.every, config.steps, meter))

    # The loop.
    callbacks.append(resources.enter_context(hang))
    if config.rehearse:
        rehearse(objective, engine, shapes, slice_size, len(mine), arrange, config.steps, data.blank_fields, hang.beat)
    meter.flops_per_sample = sum(share * objective.flops(networks, shape) for shape, share in shares.items())
    peak = config.log.peak_flops or peak_flops(world.device)
    meter.peak_flops = peak * world.size if peak else None
    stopping = resources.enter_context(StopSignal(world.device))
    loop = Run(
        objective=objective,
        engine=engine,
        loader=serving,
        steps=config.steps,
        global_batch=config.batch,
        arrange=arrange,
        learning_rate=lambda phase, step: schedules[phase.name].at(step, config.steps),
        meter=meter,
        callbacks=callbacks,
        patience=config.patience,
        roll_back=roll_back,
        stopping=stopping,
        skipped_steps=state.skipped,
    )
    meter.restart()
    taken = fit(loop, state.step)

    # The end: of the run, or of this visit to it.
    if taken > state.step:
        save(taken)
    state.checkpointer.wait()
    if taken == config.steps and isinstance(objective, Publishes):
        first = state.segments.history[-1].start
        with closing(split.loader(state.segments.plan, mine, workers=0)) as reading:
            batches = [batch.to(world.device) for batch in arrange(reading.step(first))]
        publish(config, objective, engine, ema, batches, state.checkpointer)
    if world.is_main:
        log.info("%d of %d steps taken; report: %s", taken, config.steps, write_report(directory, stand_ins=stand_ins))
