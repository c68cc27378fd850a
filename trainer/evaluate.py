"""The `evaluate` job: how good pictures are, of a model at several settings, or of a folder.

The reference's pictures pass by once, then those of each setting; metrics see both and keep what they need. Ranks share
the pictures, each of which depends on its prompt and seed alone, so that any number of ranks gives the same figures.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from pydantic import PositiveInt
from torch import Tensor

from conf.errors import ConfigError, mistakes
from conf.schema import build
from data.run_directory import RunDirectory, check_name
from data.tasks import Task
from data.tracking import LogConfig, job_log
from models.code_sampler import CodeSampler
from models.features import Features
from models.guidance import Guidance
from models.samplers import Sampler
from trainer.distributed import Cluster, World, all_reduce_sum, is_main, joined
from trainer.engines.networks import prepare_frozen
from trainer.evaluation.distributions import FrechetDistance
from trainer.evaluation.metric import Metric, ModelMetric, PictureMetric
from trainer.evaluation.opening import (
    Model,
    digest,
    fingerprint_of,
    identity_of_pictures,
    is_local,
    listed,
    open_buckets,
    open_conditions,
    open_generated,
    open_model,
    open_prompts,
    open_reference,
    told_of_reference,
)
from trainer.evaluation.pictures import DrawnPictures, KeptPictures, PictureSet, ReconstructedPictures
from trainer.evaluation.results import SHOWN, Results, caption_of
from trainer.loading import Loaded
from trainer.rank_progress import rank_progress
from trainer.sample import check_guidance, guidance_of, sampler_of, told_of
from trainer.sample_neighbours import NeighboursConfig, neighbour_fields
from trainer.sampling import OwnGuidance, OwnSampler, sampled_with

log = logging.getLogger(__name__)

# Ranks meet only at the end of a setting, some long after the others.
_LONGEST_WAIT_S = 30 * 24 * 3600.0


@dataclass
class Config:
    """conf/evaluate.yaml, whose comments explain the keys. A class stands for a `_target_` that builds such objects."""

    features: Features
    sampler: Sampler | CodeSampler | OwnSampler
    guidance: Guidance | OwnGuidance
    cluster: Cluster
    source: str | None
    generated: str | list[str] | None
    reconstructions: bool
    reference: str | list[str] | None
    reference_where: str | None
    caption: str
    neighbours: NeighboursConfig
    queries: Literal["samples", "captions", "drawn"]
    database: str | None
    reference_samples: PositiveInt | None
    prompts: list[str]
    prompts_file: str | None
    samples: PositiveInt | None
    seed: int
    steps: list[PositiveInt]
    guidance_scales: list[float]
    averages: list[str]
    height: PositiveInt | None
    width: PositiveInt | None
    bucketed: bool
    batch: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    keep: bool
    storage_options: dict[str, dict[str, Any]]
    manifest_folder: str | None
    cache_folder: str | None
    name: str
    runs: str
    log: LogConfig
    metric: dict[str, Any] = field(default_factory=dict)  # metric=[] leaves no trace of the group


@dataclass(frozen=True)
class Setting:
    """How pictures are drawn; None where they are not drawn."""

    average: str | None = None
    steps: int | None = None
    guidance: float | None = None


def preflight(config: Any, ranks: int) -> None:
    """Refuse what cannot be evaluated. Reads no data, loads no weights and writes nothing.

    Raises:
        ConfigError: names the key at fault.
    """
    check_name(config.name)
    if not config.get("metric"):
        raise ConfigError("no metrics: choose some with metric=[fid,clip_score] (millrace evaluate --help lists them).")
    if (config.source is None) == (config.generated is None):
        raise ConfigError("give either source=, a run or a diffusers folder, or generated=, pictures that are there.")
    if config.reconstructions and config.source is None:
        raise ConfigError(
            "reconstructions=true needs source=, whose first stage makes them of the reference's pictures."
        )
    # The source may be of a run that is still to be made.
    for key in ("generated", "reference", "prompts_file"):
        for path in listed(config[key]):
            if is_local(path) and not Path(path).exists():
                raise ConfigError(f"{key}={path}: there is nothing at this path.")
    if not config.averages:
        raise ConfigError("averages=[]: name at least one, or auto.")
    for key in ("steps", "guidance_scales", "averages"):
        if len(set(config[key])) < len(config[key]):
            raise ConfigError(f"{key}={list(config[key])}: each once.")


def run(config: Any) -> None:
    """Evaluate all settings of this config that are not finished."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with joined(config.device, _LONGEST_WAIT_S) as world, ExitStack() as resources:
        evaluate(config, world, resources)


def evaluate(config: Any, world: World, resources: ExitStack) -> list[dict[str, Any]]:
    """The rows of all settings of this config, as one of the world's ranks. What must be closed goes to `resources`.

    Raises:
        ConfigError: a metric cannot be had of these pictures, or a file is missing.
        ValueError: a picture cannot be read, or is of another size than the others.
    """
    directory = RunDirectory(config.runs, config.name)
    results = Results(directory)

    # What is measured, and what it is held against.
    metrics = build_metrics(config)
    of_pictures = [metric for metric in metrics if isinstance(metric, PictureMetric)]
    model = open_model(config, config.averages[0])
    buckets = open_buckets(config, model, world)
    reference = open_reference(config, model, buckets, world)
    drawn, asked, conditions = False, [], None
    if isinstance(model, Loaded) and of_pictures:
        drawn, conditions = True, open_conditions(config, model, buckets, reference, world)
        asked = open_prompts(config, model, buckets, reference) if conditions is None else conditions.asked()
    given = _given(config, model, buckets, reference, world) if of_pictures and not drawn else None
    _check(metrics, given.count if given is not None else len(asked), reference, config)

    # Which settings are still to be measured.
    pictures_are = identity_of_pictures(config, model, asked, conditions)
    if given is not None:
        pictures_are |= {"given": config.generated, "of": fingerprint_of(given), "sizes": str(buckets.fingerprint)}
    measured = {"metrics": OmegaConf.to_container(config.metric), "labels": [metric.label for metric in metrics]}
    measured |= {"reference": fingerprint_of(reference), "sizes": str(buckets.fingerprint)}
    settings = settings_of(config, model)
    pictures_are |= _fixed(config, model)
    identities = {s: digest([pictures_are, measured, asdict(s)]) for s in settings}
    rows = {setting: results.find(identities[setting]) for setting in settings}
    waiting = [setting for setting in settings if rows[setting] is None]

    run_log = resources.enter_context(job_log(config)) if world.is_main else None
    compared = reference if isinstance(reference, PictureSet) and _comparing(of_pictures) else None
    total = (given.count if given is not None else len(asked)) * len(waiting)
    total += compared.count if waiting and compared is not None else 0
    for metric in of_pictures if waiting else []:
        metric.place(world)
    with rank_progress(directory.path / "progress", world, total, "evaluate", run_log) as tell:
        task = Task(world.rank, world.size, tell)
        if waiting:
            _see_reference(of_pictures, compared, task)
            _take_statistics(of_pictures, reference, directory, world)
        for average in dict.fromkeys(setting.average for setting in waiting):
            if average not in (None, config.averages[0]):
                model = open_model(config, average)
            for name, network in (model.networks if model is not None else {}).items():
                prepare_frozen(name, network, False, config.precision, model.seed, world.device)  # type: ignore[union-attr]
            of_model = _measure_model(metrics, model, world)
            for setting in [setting for setting in waiting if setting.average == average]:
                pictures = given
                if isinstance(model, Loaded) and drawn:
                    sampler, guidance = _drawing(config, setting, model)
                    of = conditions.picture if conditions is not None else None
                    pictures = DrawnPictures(
                        asked, of, config.seed, model, sampler, guidance, config.batch, world.device
                    )
                    folder = directory.path / "pictures" / digest([pictures_are, asdict(setting)])
                    pictures = KeptPictures(pictures, folder, world.device) if config.keep else pictures
                elif given is not None and model is not None:
                    pictures = ReconstructedPictures(given, model.networks["first_stage"])
                sheet, own = _see(of_pictures, pictures, task) if pictures is not None else ([], 0)
                count = int(all_reduce_sum({"samples": float(own)}, world.device)["samples"])
                values = of_model | _values(of_pictures, config.reconstructions)
                row = _row(config, setting, model, reference, metrics, count) | values
                row["identity"] = identities[setting]
                rows[setting] = row
                if run_log is not None:
                    results.add(row, sheet)
                    done = sum(finished["samples"] for finished in results.rows())
                    run_log.log({f"evaluation/{key}": value for key, value in row.items()} | {"samples": done})
                    print(f"{caption_of(row)}: {', '.join(f'{k} {v:.5g}' for k, v in values.items())}", flush=True)
    told = [row for row in rows.values() if row is not None]
    if world.is_main:
        page = results.write(told, run_log)
        print(f"{len(told)} rows in {directory.path}/evaluation.json; report: {page}")
    return told


def build_metrics(config: Any) -> list[Metric]:
    """The metrics of a config; those with the same feature network share it.

    Raises:
        ConfigError: a metric's file or model is missing, or a value wrong.
    """
    networks: dict[str, Features] = {}
    metrics: list[Metric] = []
    nodes: Mapping[str, Any] = OmegaConf.to_container(config.metric)  # type: ignore[assignment]
    for name, node in nodes.items():
        if node is None:  # metric.fid=null leaves one out
            continue
        with mistakes():
            extra: dict[str, Any] = {}
            if "features" in node:
                described = node.pop("features")
                key = json.dumps(described, sort_keys=True)
                if key not in networks:
                    networks[key] = build(described)
                extra["features"] = networks[key]
            # Not among the values: OmegaConf would copy the network.
            make = build(OmegaConf.create({**node, "_partial_": True}))
            try:
                metrics.append(make(**extra))
            except ValueError as error:
                raise ConfigError(f"metric.{name}: {error}") from error
    return metrics


def settings_of(config: Any, model: Model | None) -> list[Setting]:
    """All combinations of averages, guidance scales and steps; a single one of pictures that are not drawn.

    Raises:
        ConfigError: guidance that is asked for does not act in the model.
    """
    if not isinstance(model, Loaded):
        return [Setting()]
    own = model.config.get("sampler", {}).get("steps")
    chosen = config.sampler.get("steps")
    steps = list(config.steps) or [own if chosen is None else chosen]
    chosen = build(config.guidance)
    check_guidance(chosen, model)
    for scale in config.guidance_scales:
        check_guidance(OwnGuidance(scale), model, key="guidance_scales")
    scales = list(config.guidance_scales) or [guidance_of(chosen, model).scale]
    return [Setting(a, s, float(g)) for a, g, s in product(config.averages, scales, steps)]


def _given(config: Any, model: Model | None, buckets: Any, reference: Any, world: World) -> PictureSet:
    """Pictures that are not drawn: those that are there, or that reconstructions are made of."""
    if model is None:
        return open_generated(config, buckets, world)
    if not isinstance(reference, PictureSet):
        raise ConfigError("reconstructions=true needs the reference's pictures: give reference=<tars or a folder>.")
    return reference


def _check(metrics: Sequence[Metric], count: int, reference: Any, config: Any) -> None:
    """Refuse, before anything is drawn, metrics that cannot be had of so many pictures or of this reference."""
    for metric in metrics:
        if not isinstance(metric, PictureMetric):
            if config.source is None or config.reconstructions:
                raise ConfigError(f"{metric.name} is of a model that draws: give source=, without reconstructions.")
            continue
        if "originals" in metric.needs and not config.reconstructions:
            raise ConfigError(f"{metric.name} compares reconstructions with originals: add reconstructions=true.")
        if "reference" in metric.needs and reference is None:
            raise ConfigError(
                f"{metric.name} needs something to compare with: give reference=<tars, a folder or .npz>."
            )
        with mistakes():
            warning = metric.check(count, reference.count if isinstance(reference, PictureSet) else None)
        if warning is not None and is_main():
            log.warning("%s", warning)


def _comparing(metrics: Sequence[PictureMetric]) -> list[PictureMetric]:
    return [metric for metric in metrics if "reference" in metric.needs]


def _see_reference(metrics: Sequence[PictureMetric], reference: PictureSet | None, task: Task) -> None:
    """Let the reference's pictures pass by those metrics that compare with them."""
    comparing = _comparing(metrics)
    for part in task.own(range(reference.parts if reference is not None else 0)):
        assert reference is not None
        for seen in reference.read(part):
            for metric in comparing:
                metric.see_reference(seen)
            task.advance(len(seen.numbers))
    for metric in comparing:
        metric.end_reference()


def _take_statistics(metrics: Sequence[PictureMetric], reference: Any, directory: RunDirectory, world: World) -> None:
    """The reference's statistics from their file; or into one, for later evaluations."""
    for metric in metrics:
        if not isinstance(metric, FrechetDistance):
            continue
        if isinstance(reference, Path):
            with mistakes():
                metric.load_statistics(reference)
        elif world.is_main:
            (name,) = metric.named({metric.name: 0.0})
            np.savez(directory.path / f"reference_{name}.npz", **metric.statistics())  # type: ignore[arg-type]


def _measure_model(metrics: Sequence[Metric], model: Model | None, world: World) -> dict[str, float]:
    """What metrics say of the model itself."""
    values: dict[str, float] = {}
    for metric in metrics:
        if isinstance(metric, ModelMetric):
            values |= metric.named(metric.measure(model, world))
    return values


def _drawing(config: Any, setting: Setting, model: Loaded) -> tuple[Sampler, Guidance]:
    steps = {"steps": setting.steps} if "steps" in config.sampler else {}
    changed = OmegaConf.merge(config, {"sampler": steps, "guidance": {"scale": setting.guidance}})
    return sampler_of(build(changed.sampler), model), guidance_of(build(changed.guidance), model)


def _fixed(config: Any, model: Model | None) -> dict[str, Any]:
    """Of what pictures are drawn with, what is alike in all settings: the scale of guidance by pictures where that
    acts, numbers that stand for fields, which neighbours they have."""
    if not isinstance(model, Loaded):
        return {}
    told: dict[str, Any] = told_of(guidance_of(build(config.guidance), model))
    del told["guidance"]  # settings have it
    told |= sampled_with(model.networks["conditioner"], model.fields)
    if not neighbour_fields(model):
        return told
    asked = {key: config.neighbours[key] for key in ("k", "query", "column")}
    if config.queries == "drawn":
        asked |= {key: config.neighbours[key] for key in ("top_m", "alike")}
    return told | {"queries": config.queries, "database": config.database} | asked


def _see(metrics: Sequence[PictureMetric], pictures: PictureSet, task: Task) -> tuple[list[Tensor], int]:
    """Let this rank's pictures pass by the metrics; the first of them, to be shown, and how many there were."""
    shown: list[Tensor] = []
    count = 0
    for part in task.own(range(pictures.parts)):
        for seen in pictures.read(part):
            for metric in metrics:
                metric.see(seen)
            images = seen.images if seen.originals is None else _alternating(seen.originals, seen.images)
            shown += list(images[: SHOWN - len(shown)].cpu())
            count += len(seen.numbers)
            task.advance(len(seen.numbers))
    return shown, count


def _alternating(originals: Tensor, images: Tensor) -> Tensor:
    """Each original before its reconstruction."""
    return torch.stack([originals, images], 1).flatten(0, 1)


def _values(metrics: Sequence[PictureMetric], reconstructions: bool) -> dict[str, float]:
    """What metrics say of what they have seen; of reconstructions, rFID and its like."""
    values: dict[str, float] = {}
    for metric in metrics:
        named = metric.named(metric.result())
        of_reference = reconstructions and "reference" in metric.needs
        values |= {f"r{name}": value for name, value in named.items()} if of_reference else named
    return values


def _row(
    config: Any, setting: Setting, model: Model | None, reference: Any, metrics: Sequence[Metric], count: int
) -> dict[str, Any]:
    """What a row tells beside the figures."""
    sampler = config.sampler
    if isinstance(model, Loaded) and sampler._target_.endswith(".OwnSampler"):
        sampler = OmegaConf.create(model.config["sampler"])
    stand_ins = sorted({metric.label or "" for metric in metrics if metric.stand_in})
    return {
        "source": model.source if model is not None else ", ".join(listed(config.generated)),
        "sampler": sampler._target_.rpartition(".")[2] if setting.steps is not None else None,
        **asdict(setting),
        **_fixed(config, model),
        "samples": count,
        "reference": told_of_reference(config, reference),
        "features": ", ".join(dict.fromkeys(metric.label for metric in metrics if metric.label is not None)) or None,
        "stand_ins": ", ".join(stand_ins) or None,
    }
