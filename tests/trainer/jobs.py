"""The `train` job on the session's gloo ranks: as a command line would compose it, without the start of processes."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conf.compose import compose
from conf.schema import check
from data.run_directory import read_jsonl
from tests.trainer.ranks import ranks
from trainer.checkpoint import load_weights
from trainer.distributed import World
from trainer.train import Config, train

QUICK = [
    *("engine.precision=fp32", "data.workers=0", "data.log_keys=true"),
    *("log.every=1", "log.wandb=null", "validation.every=null", "samples.every=null", "rehearse=false"),
]
# No text, two blocks, a few steps.
SMALL = [
    "conditioner=none",
    *(f"model.{key}={value}" for key, value in {"sample_size": 8, "patch_size": 4, "in_channels": 3}.items()),
    *("model.num_layers=2", "model.attention_head_dim=16", "model.num_attention_heads=2"),
    *("model.joint_attention_dim=64", "model.pooled_projection_dim=64", "model.pos_embed_max_size=16"),
    *("buckets=tiny", "batch=8", "lanes=4", "steps=4", "ema=none"),
    *QUICK,
]


def train_on(
    world: int, folder: Path, *overrides: str, small: Sequence[str] = SMALL, timeout_s: float = 300
) -> list[dict]:
    """Train a run of `folder` to its end on so many ranks; the rows of its metrics.jsonl. `name=` is an override.

    Args:
        small: what makes it so; QUICK leaves the networks to the overrides.
        timeout_s: that ranks may take.
    """
    shared = [f"runs={folder}/runs", f"data.cache_folder={folder}/cache"]
    ranks(world).run(_train, [*small, *shared, *overrides], timeout_s=timeout_s)
    (name,) = (value.removeprefix("name=") for value in overrides if value.startswith("name="))
    return read_jsonl(folder / "runs" / name / "metrics.jsonl")


def resumed_as_whole(run: Callable[..., list[dict]], folder: Path, engine: str) -> list[dict]:
    """Train four steps on two ranks: two and then two more end in the same bits, and on one rank in the same losses.

    Args:
        run: of ranks, the folder, a run's name and overrides, as `train_on`.

    Returns:
        Rows of the run `engine`, which was not resumed.
    """
    chosen = f"engine={engine}"
    whole = run(2, folder, engine, chosen, "steps=4")
    for name, world in ((f"{engine}_twice", 2), (f"{engine}_alone", 1)):
        run(2, folder, name, chosen, "steps=2")
        twice = run(world, folder, name, chosen, "steps=4")
        assert [row["step"] for row in whole] == [1, 2, 3, 4] == [row["step"] for row in twice]
        for first, second in zip(whole, twice, strict=True):
            assert first["loss"] == (second["loss"] if world == 2 else pytest.approx(second["loss"], rel=1e-5))
    ends = [
        load_weights(folder / "runs" / n / "checkpoints/step_00000004", "denoiser") for n in (engine, f"{engine}_twice")
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    return whole


def _train(overrides: list[str]) -> None:
    config = compose("train", overrides)
    check(config, Config)
    rank = dist.get_rank()
    with ExitStack() as resources:
        train(config, World(rank, dist.get_world_size(), rank, torch.device("cpu"), launched=False), resources)
