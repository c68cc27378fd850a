"""From a config to what is measured: the model, its prompts, and the pictures on either side."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.errors import ConfigError
from conf.schema import build
from data.buckets import Buckets
from data.fields import Field
from data.retrieval.field import NeighbourField
from data.selection import Split
from data.store import redact
from data.tars import TarData
from models.conditioner import Conditioner
from trainer.distributed import World, first_on_node
from trainer.evaluation.conditions import Conditions, NeighbourConditions, SampleConditions, read_of_samples
from trainer.evaluation.distributions import read_statistics
from trainer.evaluation.pictures import Asked, FolderPictures, TarPictures, one_size, single_bucket
from trainer.loading import Loaded, LoadedFirstStage, load_first_stage, load_model
from trainer.sample_neighbours import NeighbourReader

Model = Loaded | LoadedFirstStage


def listed(paths: Any) -> list[str]:
    """Paths of a key that takes one or several, or none."""
    return [] if paths is None else [paths] if isinstance(paths, str) else list(paths)


def is_local(path: str) -> bool:
    """Whether it is one path of this machine, and not a pattern of several or a URL."""
    return "://" not in path and not path.startswith("pipe:") and not any(mark in path for mark in "*?[{")


def open_model(config: Any, average: str) -> Model | None:
    """The source's networks, still to be placed; None where pictures are there already.

    Raises:
        ValueError: see `load_model`.
    """
    if config.source is None:
        return None
    return load_first_stage(config.source) if config.reconstructions else load_model(config.source, average)


def open_generated(config: Any, buckets: Buckets | None, world: World) -> TarPictures | FolderPictures:
    """The pictures that are there already, of one size unless `height` or `width` says what they are cropped to.

    Args:
        buckets: their size, once it is known.
    """
    strict = config.height is None and config.width is None
    return _open("generated", listed(config.generated), config, None if strict else buckets, config.samples, world)


def open_buckets(config: Any, model: Model | None, world: World) -> Buckets:
    """The sizes that pictures are drawn in, and those of the reference cropped to."""
    if config.bucketed:
        if model is None or "buckets" not in model.config:
            raise ConfigError("bucketed=true takes the sizes that a run was trained at: give source=runs/<name>.")
        return build(model.config["buckets"])
    if config.height is not None and config.width is not None:
        return single_bucket((config.height, config.width))
    if model is not None:
        size = model.size
    else:
        generated = open_generated(config, None, world)
        size = generated.size if isinstance(generated, FolderPictures) else one_size(generated)
    return single_bucket((config.height or size[0], config.width or size[1]))


def open_reference(
    config: Any, model: Model | None, buckets: Buckets, world: World
) -> TarPictures | FolderPictures | Path | None:
    """The reference's pictures, or the file of their statistics; by default a run's held-out samples; None without."""
    paths = listed(config.reference)
    if len(paths) == 1 and paths[0].endswith(".npz"):
        read_statistics(Path(paths[0]))
        return Path(paths[0])
    if paths:
        return _open("reference", paths, config, buckets, config.reference_samples, world)
    if model is None or "data" not in model.config:
        return None
    data: TarData = build(model.config["data"])
    if not data.holdout:
        return None
    data.encodings.clear()
    return first_on_node(
        world,
        lambda: TarPictures(data, "validation", buckets, config.batch, world.device, config.reference_samples),
    )


def open_conditions(config: Any, model: Loaded, buckets: Buckets, reference: Any, world: World) -> Conditions | None:
    """What is drawn by a model that reads more of samples than captions: what the reference's samples come with, in
    fields as the model was trained with, or the run's held-out ones; neighbours of other queries; None of other models.

    Raises:
        ConfigError: there are no such samples; or see `_open_neighbours`.
    """
    conditioner: Any = model.networks["conditioner"]
    names = read_of_samples(conditioner)
    given = _prompts_are_given(config)
    reader = NeighbourReader(config, model)
    if config.queries != "samples":
        return _open_neighbours(config, model, reader, buckets, reference)
    if not names or (given and "captions" in conditioner.reads):
        return None
    if given:
        raise ConfigError(
            f"prompts: {model.source} reads {', '.join(names)} of samples, and no captions; leave it out"
            f"{', or add queries=captions' if set(names) == set(reader.fields) else ''}."
        )
    split: Split = "train"
    if isinstance(reference, TarPictures) and config.reference is not None:
        data = _tars("reference", listed(config.reference), config, dict(model.fields) | reader.fields)
    elif "data" in model.config and (data := build(model.config["data"])).holdout:
        split = "validation"
        for of_sources in (data.fields, *(source.fields for source in data.sources.values())):
            of_sources |= {
                name: reader.as_asked(name, one) for name, one in of_sources.items() if isinstance(one, NeighbourField)
            }
    else:
        raise ConfigError(f"reference: {model.source} reads {', '.join(names)} of samples; give tars of such samples.")
    count = config.samples or (reference.count if isinstance(reference, TarPictures | FolderPictures) else None)
    opened = first_on_node(world, lambda: data.open(buckets, split))
    return SampleConditions(opened, count or int(opened.totals().sum()))


def _open_neighbours(
    config: Any, model: Loaded, reader: NeighbourReader, buckets: Buckets, reference: Any
) -> NeighbourConditions:
    """Neighbours of captions, or of entries that are drawn.

    Raises:
        ConfigError: the model reads none, or more than these; prompts that nothing reads.
    """
    conditioner: Any = model.networks["conditioner"]
    names, drawn = set(read_of_samples(conditioner)), config.queries == "drawn"
    if not reader.fields or names != set(reader.fields):
        read = ", ".join(names - set(reader.fields)) or "no neighbours"
        raise ConfigError(f"queries={config.queries}: {model.source} reads {read}; leave it out.")
    if not drawn or "captions" in conditioner.reads:
        asked = open_prompts(config, model, buckets, reference)
    elif _prompts_are_given(config):
        raise ConfigError("prompts: with queries=drawn nothing is asked for; leave one of them out.")
    else:
        asked = _nothing(config, buckets, reference)
    return NeighbourConditions(asked, reader, drawn)


def _prompts_are_given(config: Any) -> bool:
    return bool(config.prompts) or config.prompts_file is not None


def open_prompts(config: Any, model: Loaded, buckets: Buckets, reference: Any) -> list[Asked]:
    """What is drawn: the prompts given, or the reference's captions; of a model that reads nothing, so many pictures.

    Raises:
        ConfigError: there is nothing to draw.
    """
    conditioner = model.networks["conditioner"]
    if isinstance(conditioner, Conditioner) and conditioner.parts == 0 and config.samples is not None:
        return _nothing(config, buckets, reference)
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        prompts += [line.strip() for line in Path(config.prompts_file).read_text().splitlines() if line.strip()]
    if prompts:
        count = config.samples or len(prompts)
        return [Asked(prompts[i % len(prompts)], buckets[0].height, buckets[0].width) for i in range(count)]
    if not isinstance(reference, TarPictures | FolderPictures):
        raise ConfigError(
            "there is nothing to draw: give prompts_file=<a prompt a line>, or a reference= of pictures with captions."
        )
    return reference.asked(config.samples or reference.count)


def _nothing(config: Any, buckets: Buckets, reference: Any) -> list[Asked]:
    """So many pictures of which nothing is asked: as many as `samples` says, or as the reference has."""
    count = config.samples or (reference.count if isinstance(reference, TarPictures | FolderPictures) else None)
    if count is None:
        raise ConfigError("samples: say how many pictures are to be drawn; a file of statistics does not tell.")
    return [Asked("", buckets[0].height, buckets[0].width)] * count


def digest(value: Any) -> str:
    """16 hex digits of anything that JSON takes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity_of_pictures(
    config: Any, model: Model | None, asked: Sequence[Asked], conditions: Conditions | None
) -> dict[str, Any]:
    """All that pictures depend on, beside how they are drawn."""
    if model is None:
        return {}
    source = model.source.partition(",")[0]  # without the average, which settings tell
    told: dict[str, Any] = {"source": source, "weights": _digest_of_files(config.source, source)}
    told |= {"asked": digest([asdict(one) for one in asked]), "seed": config.seed, "batch": config.batch}
    told["precision"] = config.precision
    if conditions is not None:
        told["conditions"] = conditions.fingerprint
    for key in ("sampler", "guidance"):
        told[key] = OmegaConf.to_container(config[key])
    return told


def told_of_reference(config: Any, reference: Any) -> str | None:
    """The reference, in a word."""
    if reference is None:
        return None
    return ", ".join(map(redact, listed(config.reference))) or "held-out samples of the run"


def fingerprint_of(reference: Any) -> str | None:
    """Of the reference: another one gives other figures."""
    if isinstance(reference, TarPictures | FolderPictures):
        return f"{reference.fingerprint} {reference.count}"
    return hashlib.sha256(reference.read_bytes()).hexdigest() if isinstance(reference, Path) else None


def _digest_of_files(path: str, source: str) -> str:
    """Of a checkpoint's checksums; of other folders, of their files' sizes and times."""
    checkpoint = Path(source) / "committed.json"
    if checkpoint.is_file():
        return hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    files = sorted(Path(path).rglob("*.safetensors"))
    return digest([[str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files])


def _open(
    key: str, paths: Sequence[str], config: Any, buckets: Buckets | None, limit: int | None, world: World
) -> TarPictures | FolderPictures:
    """Tars, or a folder of pictures.

    Args:
        key: of the config that names them.
        buckets: what they are cropped to; None takes them as they are, and all must be of one size.
    """
    batch, device = config.batch, world.device
    if len(paths) == 1 and Path(paths[0]).is_dir() and not any(Path(paths[0]).rglob("*.tar")):
        if key == "reference" and config.reference_where is not None:
            raise ConfigError(
                f"reference_where={config.reference_where!r} selects samples of tars, and reference={paths[0]} has"
                " none."
            )
        if buckets is not None and len(buckets) > 1:
            raise ConfigError(f"bucketed=true takes a {key} of tars, and {paths[0]} has none.")
        size = None if buckets is None else (buckets[0].height, buckets[0].width)
        return FolderPictures(Path(paths[0]), size, batch, device, limit)
    data = _tars(key, paths, config)

    def open_tars() -> TarPictures:
        pictures = TarPictures(data, None, buckets or single_bucket((1, 1)), batch, device, limit)
        if buckets is None:
            pictures = TarPictures(data, None, single_bucket(one_size(pictures)), batch, device, limit)
        return pictures

    return first_on_node(world, open_tars)


def _tars(key: str, paths: Sequence[str], config: Any, fields: dict[str, Field] | None = None) -> TarData:
    """Tars that a key of the config names, with the fields that their samples come with."""
    source = {"shards": list(paths), "caption": config.caption}
    if key == "reference":
        source["where"] = config.reference_where
    folders = {"manifest_folder": config.manifest_folder, "cache_folder": config.cache_folder}
    options: Any = OmegaConf.to_container(config.storage_options)
    return TarData({key: source}, storage_options=options, fields=fields, **folders)  # type: ignore[dict-item]
