"""Starts a run from another's weights. This is not resume: step, optimiser, plan and averages begin anew.

What does not fit is left at its initial value and listed; tables of positions are resized.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.pipeline_folder import TRANSFORMERS_STEM
from models.pretrained import ComponentFolder, OfTransformers, Pretrained
from models.tensor_files import open_stem
from trainer.checkpoint import load_shards, load_tensors, saved_shapes
from trainer.checkpoint.format import is_committed
from trainer.checkpoint.layout import WEIGHT, box_views, kind_of, saved_name
from trainer.engines.base import Engine, Shard


@dataclass(frozen=True)
class Report:
    """What became of each tensor of a network and of its source.

    Args:
        network: name in this run.
        source: where its weights came from.
        matched: parameters that were loaded as they are.
        resized: tables of positions that were loaded resized, and first convolutions of UNets that read more than the
            source's, in which what is new begins at zero: "name: from shape to shape".
        missing: parameters that the source lacks, left at their initial values.
        mismatched: parameters of another shape, left at their initial values: "name: source shape, own shape".
        unexpected: tensors of the source that have no place here.
        fixed: buffers that follow from the configuration and differ from the source's.
    """

    network: str
    source: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether source and network fit each other wholly."""
        return not (self.missing or self.mismatched or self.unexpected or self.fixed or self.resized)

    def __str__(self) -> str:
        """One line, and one more per tensor that did not simply match."""
        headings = {
            "resized": "resized",
            "missing": "missing in the source, left as initialised",
            "mismatched": "of another shape, left as initialised",
            "unexpected": "in the source only",
            "fixed": "fixed by the configuration and other than in the source",
        }
        counts = {"matched": len(self.matched)} | {key: len(getattr(self, key)) for key in headings}
        summary = ", ".join(f"{count} {key}" for key, count in counts.items() if count or key == "matched")
        lines = [f"{self.network} from {self.source}: {summary}"]
        for key, heading in headings.items():
            lines += [f"  {heading}: {name}" for name in getattr(self, key)]
        return "\n".join(lines)


@dataclass(frozen=True)
class InitFrom:
    """Configuration: whose weights a run starts from.

    Args:
        path: a checkpoint directory of ours (`.../step_00000020`), a diffusers component (a folder with `config.json`),
            or a diffusers pipeline (a folder of components); for a CLIP, a folder of transformers.
        ema: of a checkpoint, the EMA length to take instead of the weights.
        networks: this run's network to the source's: a network of the checkpoint, or a component of the pipeline. By
            default every trainable network takes the one of its own name, and of a component, the only one takes it.
    """

    path: str
    ema: str | None = None
    networks: dict[str, str] = field(default_factory=dict)

    def apply(self, engine: Engine) -> list[Report]:
        """Fill the engine's trainable networks (collective); one report for each.

        Raises:
            ValueError: there is no such source, or a network matches nothing of it.
            CheckpointError: the checkpoint is damaged.
        """
        by_network: dict[str, list[Shard]] = {}
        for shard in engine.shards("weight"):
            network, _, name = shard.name.partition(".")
            by_network.setdefault(network, []).append(replace(shard, name=name))
        chosen = self._chosen(list(by_network))
        reports = [
            _fill(network, self._source(theirs, engine.networks[network]), by_network[network])
            for network, theirs in chosen.items()
        ]
        engine.written()
        return reports

    def _chosen(self, trainable: Sequence[str]) -> dict[str, str]:
        unknown = sorted(set(self.networks) - set(trainable))
        if unknown:
            raise ValueError(f"init_from.networks has {', '.join(unknown)}; trainable are {', '.join(trainable)}")
        if self.networks:
            return self.networks
        if self._is_component and len(trainable) > 1:
            raise ValueError(f"init_from.networks must say which of {', '.join(trainable)} starts from {self.path}")
        return {name: name for name in trainable}

    @property
    def _is_component(self) -> bool:
        return (Path(self.path) / "config.json").is_file()

    def _source(self, name: str, network: nn.Module) -> "_Source":
        path = Path(self.path)
        if is_committed(path):
            return _Checkpoint(path, name, self.ema)
        if self.ema is not None:
            raise ValueError(f"init_from.ema={self.ema}, but {path} is no checkpoint of ours and holds no averages")
        folder = path if self._is_component else path / name
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"init_from: {path} is neither a checkpoint directory (committed.json) nor a diffusers component "
                f"(config.json), and has no component {name!r}"
            )
        return _TransformersFolder(folder) if isinstance(network, OfTransformers) else _Component(folder, network)


class _Source(Protocol):
    """Weights by our parameter names."""

    def __str__(self) -> str: ...

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of those of the names that it has."""

    def unexpected(self, names: Sequence[str]) -> list[str]:
        """What it has beside the names."""

    def fixed(self) -> list[str]:
        """Buffers that are not as in the source."""

    def fill(self, shards: Sequence[Shard]) -> None:
        """Read the shards' boxes."""

    def whole(self, name: str) -> Tensor:
        """One tensor, float32."""


def _fill(network: str, source: _Source, shards: Sequence[Shard]) -> Report:
    shapes = source.shapes([shard.name for shard in shards])
    report = Report(network, str(source), unexpected=source.unexpected([s.name for s in shards]), fixed=source.fixed())
    same: list[Shard] = []
    for shard in shards:
        theirs, ours = shapes.get(shard.name), tuple(shard.shape)
        if theirs is None:
            report.missing.append(shard.name)
        elif theirs == ours:
            report.matched.append(shard.name)
            same.append(shard)
        elif _are_positions(theirs, ours):
            report.resized.append(f"{shard.name}: from {theirs} to {ours}")
            _store(shard, resize_positions(source.whole(shard.name), ours[1]))
        elif shard.name == "conv_in.weight" and _reads_more(theirs, ours):
            report.resized.append(f"{shard.name}: from {theirs} to {ours}")
            _store(shard, F.pad(source.whole(shard.name), (0, ours[-1] - theirs[-1])))
        else:
            report.mismatched.append(f"{shard.name}: {theirs} in the source, {ours} here")
    if not report.matched:
        raise ValueError(f"init_from: {source} fits nothing of {network}. {report}")
    source.fill(same)
    return report


def _are_positions(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether both are tables of positions (1, side^2, width), of one width."""
    return all(len(s) == 3 and s[0] == 1 and math.isqrt(s[1]) ** 2 == s[1] for s in (a, b)) and a[2] == b[2]


def _reads_more(theirs: Sequence[int], ours: Sequence[int]) -> bool:
    """Whether a convolution (c_out, 3, 3, c_in) reads more channels, as what lies beside a latent comes last."""
    return len(theirs) == len(ours) == 4 and theirs[:-1] == ours[:-1] and theirs[-1] < ours[-1]


def resize_positions(table: Tensor, length: int) -> Tensor:
    """A table of positions (1, side^2, width) for a grid of `length` places, by bicubic interpolation: the new grid
    spans the same picture (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.2)."""
    old, new = math.isqrt(table.shape[1]), math.isqrt(length)
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    # With `antialias`, torch takes the cubic kernel that leaves linear tables linear (a = -0.5), enlarging or reducing.
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(1, length, -1)


@torch.no_grad()
def _store(shard: Shard, whole: Tensor) -> None:
    for box, view in box_views(shard):
        view.copy_(whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))])


class _Checkpoint:
    """One network's weights, or an average of them, in a checkpoint of ours."""

    def __init__(self, path: Path, network: str, ema: str | None) -> None:
        self._path = path
        self._kind = WEIGHT if ema is None else f"ema.{ema}"
        self._prefix = saved_name(self._kind, f"{network}.")
        self._shapes = {
            name.removeprefix(self._prefix): shape
            for name, shape in saved_shapes(path).items()
            if name.startswith(self._prefix) and kind_of(name) == self._kind
        }

    def __str__(self) -> str:
        return f"{self._path} ({self._prefix.removesuffix('.')})"

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {name: self._shapes[name] for name in names if name in self._shapes}

    def unexpected(self, names: Sequence[str]) -> list[str]:
        return sorted(set(self._shapes) - set(names))

    def fixed(self) -> list[str]:
        return []  # buffers are not saved

    def fill(self, shards: Sequence[Shard]) -> None:
        load_shards(self._path, [replace(shard, name=self._prefix + shard.name) for shard in shards])

    def whole(self, name: str) -> Tensor:
        return load_tensors(self._path, [self._prefix + name])[self._prefix + name]


class _Component:
    """A diffusers component's folder, by our names; each tensor is read whole, one at a time."""

    def __init__(self, path: Path, network: nn.Module) -> None:
        if not isinstance(network, Pretrained):
            raise ValueError(f"init_from: {type(network).__name__} has no counterpart in diffusers to load {path} into")
        self._folder = ComponentFolder(path)
        self._network = network
        self._buffers: Mapping[str, Tensor] = {
            name: tensor for name, tensor in network.named_buffers() if name in network.state_dict()
        }

    def __str__(self) -> str:
        return str(self._folder.path)

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {name: shape for name in names if (shape := self._shape(name)) is not None}

    def _shape(self, name: str) -> tuple[int, ...] | None:
        def unread(theirs: str) -> Tensor:
            return torch.empty(self._folder.shape(theirs), device="meta")

        try:
            return tuple(self._network.from_diffusers(name, unread).shape)
        except KeyError:
            return None

    def unexpected(self, names: Sequence[str]) -> list[str]:
        asked: set[str] = set()

        def note(theirs: str) -> Tensor:
            asked.add(theirs)
            return torch.empty(self._folder.shape(theirs), device="meta")

        for name in names:
            try:
                self._network.from_diffusers(name, note)
            except KeyError:
                continue
        for name, buffer in self._buffers.items():
            asked |= set(self._network.to_diffusers(name, buffer.to("meta")))
        return sorted(set(self._folder.names) - asked)

    def fixed(self) -> list[str]:
        return list(self._differing_buffers())

    def _differing_buffers(self) -> Iterator[str]:
        for name, own in self._buffers.items():
            for theirs, value in self._network.to_diffusers(name, own.float().cpu()).items():
                if theirs in self._folder.names:
                    saved = self._folder.read(theirs).float()
                    # Other releases compute sines by other kernels: their last digits may differ.
                    if saved.shape != value.shape or not torch.allclose(saved, value, rtol=0, atol=1e-5):
                        yield f"{name} ({theirs})"

    def fill(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            _store(shard, self._network.from_diffusers(shard.name, self._folder.read))

    def whole(self, name: str) -> Tensor:
        return self._network.from_diffusers(name, self._folder.read).float()


class _TransformersFolder:
    """A folder of transformers', whose names are ours."""

    def __init__(self, path: Path) -> None:
        self._path, self._files = path, open_stem(path, TRANSFORMERS_STEM)
        # Older files tell the numbers of places, which are no weights.
        self._names = {name for name in self._files.names() if not name.endswith("position_ids")}

    def __str__(self) -> str:
        return str(self._path)

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {name: self._files.meta(name).shape or (1,) for name in names if name in self._names}

    def unexpected(self, names: Sequence[str]) -> list[str]:
        return sorted(self._names - set(names))

    def fixed(self) -> list[str]:
        return []

    def fill(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            _store(shard, self.whole(shard.name))

    def whole(self, name: str) -> Tensor:
        return torch.atleast_1d(self._files.read(name).float())
