"""Encoded once, trained on as if it were encoded on the fly."""

import io
import multiprocessing
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import webdataset
from PIL import Image
from safetensors.torch import load

from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import build, check
from data.encoded import read_stored
from data.run_directory import read_jsonl
from tests.data.shard_files import write_tar
from tests.trainer.jobs import SMALL, train_on
from tests.trainer.ranks import ranks
from trainer.distributed import World
from trainer.encode import Config, encode, preflight
from trainer.train import Config as TrainConfig
from trainer.train import train

WORDS = ["red", "green", "blue", "small", "large", "circle", "square", "left", "right", "above"]
STEPS = 10
# Both jobs take these: a latent first stage, several buckets, two caption columns, flips and dropout ...
BASE = [
    *("first_stage=kl_tiny", "engine.precision=fp32", "data.workers=0", "log.wandb=null"),
    *("schedule=constant", "schedule.lr=0.003", "schedule.warmup=0"),  # so that losses tell what is conditioned on
    *("buckets=tiny", "buckets.sizes=[[32,32],[24,40],[40,24]]", "data.crop=center", "data.flip=true"),
    *("data.sources.s.caption={caption: 1.0, other: 1.0}", "data.holdout=0.1"),
    *("objective.caption_dropout=0.3", f"steps={STEPS}", f"validation.every={STEPS}", "validation.samples=6"),
    *("model.patch_size=2", "model.in_channels=4", "model.out_channels=4"),
]
# ... and text.
TEXT = [
    *("conditioner=t5_local", "conditioner.length=12", "conditioner.width=32", "conditioner.vocab_size=64"),
    *("conditioner.steps=3", "model.joint_attention_dim=32", "model.pooled_projection_dim=32"),
]


def scene(i: int) -> bytes:
    """A smooth picture: random colours at a few points, enlarged; of three aspect ratios."""
    size = [(50, 50), (70, 40), (40, 70)][i % 3]
    points = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(points).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, keys: range, bad: tuple[int, ...] = ()) -> None:
    """Scenes under two captions, of which the first is often empty; the bad ones' pictures cannot be decoded."""
    members = []
    for i in keys:
        data = scene(i)
        members.append((f"{i:04d}.png", data[:60] + bytes(len(data) - 60) if i in bad else data))
        caption = " ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 5)) if i % 3 else ""
        members.append((f"{i:04d}.txt", caption.encode()))
        other = f"the other of {WORDS[i % 10]}" if i % 2 else ""
        members.append((f"{i:04d}.json", f'{{"other": "{other}"}}'.encode()))
    write_tar(path, members)


def write_shards(folder: Path, shards: int = 2, size: int = 24, bad: tuple[int, ...] = ()) -> None:
    for s in range(shards):
        write_shard(folder / "shards" / f"{s:05d}.tar", range(s * size, (s + 1) * size), bad)


def overrides(folder: Path, *more: str) -> list[str]:
    return [*BASE, *TEXT, *places(folder), f"conditioner.folder={folder}/text_encoder", *more]


def places(folder: Path) -> list[str]:
    return [f"runs={folder}/runs", f"data.cache_folder={folder}/cache", f"data.sources.s.shards={folder}/shards"]


def encode_on(world: int, folder: Path, *more: str) -> None:
    """The job on gloo ranks."""
    ranks(world).run(encode_here, overrides(folder, *more))


def encode_here(arguments: list[str]) -> str:
    """The job as one of the ranks there are; what it refuses."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = compose("encode", arguments)
    check(config, Config)
    try:
        preflight(config, size)
        encode(config, World(rank, size, rank, torch.device("cpu"), launched=False))
    except ValueError as error:
        return f"mistake: {error}" if isinstance(error, ConfigError) else str(error)
    return ""


def train_here(arguments: list[str]) -> str:
    """`train` on one rank; what it refuses."""
    config = compose("train", arguments)
    check(config, TrainConfig)
    try:
        with ExitStack() as resources:
            train(config, World(0, 1, 0, torch.device("cpu"), launched=False), resources)
    except ValueError as error:
        return str(error)
    return ""


def trained(world: int, folder: Path, name: str, *more: str) -> list[float]:
    """The losses of a run's steps, then of its validation."""
    rows = train_on(world, folder, *overrides(folder, *more), f"name={name}")
    return [row["loss"] for row in rows] + [row["val/loss"] for row in rows if "val/loss" in row]


def encoded_folder(folder: Path, name: str) -> Path:
    return folder / "shards" / f"encoded-{name}"


def files(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(encoded_folder(folder, name).iterdir())}


def samples(folder: Path, name: str) -> dict[str, dict[str, bytes]]:
    """The members of each sample, as webdataset reads the tars."""
    tars = sorted(str(path) for path in encoded_folder(folder, name).glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        found[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    write_shards(folder)
    encode_on(1, folder, "data.encoded=whole", "encode.dtype=float32", "encode.batch=5")
    return folder


@pytest.fixture(scope="module")
def on_the_fly(folder) -> list[float]:
    return trained(1, folder, "fly")


def test_training_from_float32_encodings_equals_encoding_on_the_fly_on_any_ranks(folder, on_the_fly):
    assert len(on_the_fly) == STEPS + 1
    assert trained(1, folder, "whole", "data.encoded=whole") == pytest.approx(on_the_fly, rel=1e-5)
    assert trained(2, folder, "whole2", "data.encoded=whole") == pytest.approx(on_the_fly, rel=1e-4)
    keys = [read_jsonl(folder / "runs" / name / "keys.jsonl") for name in ("fly", "whole", "whole2")]
    assert keys[0] == keys[1] == keys[2]


def test_bfloat16_encodings_are_float32_ones_rounded_and_train_alike(folder, on_the_fly):
    encode_on(1, folder, "data.encoded=half", "encode.batch=5")
    whole, half = samples(folder, "whole"), samples(folder, "half")
    assert whole.keys() == half.keys() and len(half) == 48
    for key, members in whole.items():
        assert members.keys() == half[key].keys()
        for member, data in members.items():
            rounded = load(half[key][member])
            for name, exact in load(data).items():
                assert exact.dtype == torch.float32 and rounded[name].dtype == torch.bfloat16
                assert torch.equal(exact.to(torch.bfloat16), rounded[name])
    drawing = ("samples.every=10", "samples.count=2")
    assert trained(1, folder, "half", "data.encoded=half", *drawing) == pytest.approx(on_the_fly, rel=1e-4)
    assert (folder / "runs/half/samples/step_00000010.png").stat().st_size > 100


def test_text_alone_can_be_encoded(folder, on_the_fly):
    encode_on(1, folder, "data.encoded=text", "encode.latents=false", "encode.dtype=float32", "data.crop=random")
    # All steps: denoisers start blind to their conditions, and only the fourth loss is that of one that reads text.
    assert trained(1, folder, "text", "data.encoded=text") == pytest.approx(on_the_fly, rel=1e-5)


def test_samples_have_members_for_what_there_is_of_them(folder):
    for key, members in samples(folder, "whole").items():
        i = int(key)
        texts = {f"text{n}.safetensors" for n, there in enumerate((i % 3, i % 2)) if there}
        assert members.keys() == {"moments.safetensors", "flipped.safetensors"} | texts
        moments = load(members["moments.safetensors"])["moments"]
        height, width = [(32, 32), (24, 40), (40, 24)][i % 3]
        assert moments.shape == (8, height // 4, width // 4)
        for member in texts:
            text = load(members[member])
            assert text["0.pooled"].shape == (32,)
            assert 0 < len(text["0.sequence"]) <= 12 and text["0.sequence"][-1].any()


def test_encodings_come_from_workers_as_they_are_read_here(folder):
    config = compose("train", overrides(folder, "data.encoded=half"))
    encode_on(1, folder, "data.encoded=half", "encode.batch=5")
    data, buckets = build(config.data), build(config.buckets)
    stored = read_stored(data.manifests("s")[0], "half", data.store)
    assert stored is not None
    data.encodings = {"s": stored.encoding}
    split = data.open(buckets)
    loaders = [split.loader(split.plan(2, 3, seed=0), range(2), workers=workers) for workers in (0, 1)]
    for step in range(2):
        for here, there in zip(*(loader.step(step) for loader in loaders), strict=True):
            assert here.images.shape == there.images.shape == (3, 0, *here.target_size)
            assert here.fields["moments"].dtype == torch.bfloat16 and here.fields.keys() == there.fields.keys()
            for name, values in here.fields.items():
                assert torch.equal(torch.as_tensor(values), torch.as_tensor(there.fields[name])), name
    loaders[1].close()


def test_tasks_give_the_same_bytes_and_what_is_done_is_left(folder):
    encode_on(2, folder, "data.encoded=two", "encode.dtype=float32", "encode.batch=5")
    told = read_jsonl(folder / "runs/encode/encode/metrics.jsonl")[-1]
    assert (told["job"], told["samples"], told["total"]) == ("encode two", 48, 48)  # of both ranks
    assert files(folder, "two") == files(folder, "whole")
    assert set(files(folder, "two")) == {"00000.tar", "00000.parquet", "00001.tar", "00001.parquet", "null.safetensors"}
    shared = ["data.encoded=shared", "encode.dtype=float32", "encode.batch=5", "encode.tasks=3"]
    for task in (2, 0, 1):  # a task without any shard
        encode_on(1 + task % 2, folder, *shared, f"encode.task={task}")
        assert len(files(folder, "shared")) == {2: 1, 0: 3, 1: 5}[task]
    assert files(folder, "shared") == files(folder, "whole")
    assert read_jsonl(folder / "runs/encode/encode/task_1/metrics.jsonl")[-1]["total"] == 24
    before = {path: path.stat().st_mtime_ns for path in encoded_folder(folder, "two").iterdir()}
    encode_on(1, folder, "data.encoded=two", "encode.dtype=float32", "encode.batch=5")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_configuration_is_refused_in_a_sentence(folder):
    def refusal(*more: str) -> str:
        arguments = overrides(folder, "data.encoded=whole", "name=refused", *more)
        return ranks(1).run(train_here, [*SMALL, *arguments])[0]

    assert "another first stage" in refusal("seed=1")
    assert "its crops are 32x32, 24x40, 40x24, and this run's buckets are 32x32" in refusal("buckets.sizes=[[32,32]]")
    assert "data.crop=center, and this run has data.crop=random" in refusal("data.crop=random")
    assert "another conditioner's: encoder 0" in refusal("conditioner.length=10")
    assert "this run reads 'key'" in refusal("data.sources.s.caption=key")
    assert "00000.tar is not encoded" in refusal("data.encoded=nowhere")
    assert not (folder / "runs/refused/checkpoints").exists()


def test_what_is_selected_must_be_encoded_and_what_changed_is_encoded_again(tmp_path, folder):
    write_shards(tmp_path)
    text = [f"conditioner.folder={folder}/text_encoder", "data.encoded=some", "encode.conditions=false"]
    small = "data.sources.s.where=width < 60"
    encode_on(1, tmp_path, *text, small, "data.flip=false")
    arguments = [*SMALL, *overrides(tmp_path, *text[:2], "name=run", "steps=1", "validation.every=null")]
    assert "8 of the samples selected of" in ranks(1).run(train_here, [*arguments, "data.flip=false"])[0]
    assert "no mirrored pictures" in ranks(1).run(train_here, [*arguments, small])[0]
    assert ranks(1).run(train_here, [*arguments, small, "data.flip=false"]) == [""]
    before = files(tmp_path, "some")
    write_shard(tmp_path / "shards" / "00001.tar", range(100, 124))
    assert (
        "00001.tar is not encoded, or was before it changed"
        in ranks(1).run(train_here, [*arguments, small, "data.flip=false", "name=again"])[0]
    )
    encode_on(1, tmp_path, *text, small, "data.flip=false")
    after = files(tmp_path, "some")
    assert {name for name in after if after[name] != before[name]} == {"00001.tar", "00001.parquet"}


def test_a_picture_that_cannot_be_decoded_is_replaced_as_on_the_fly(tmp_path, folder):
    write_shards(tmp_path, bad=(4, 9))
    text = (f"conditioner.folder={folder}/text_encoder", "steps=4")
    encode_on(1, tmp_path, *text, "data.encoded=latents", "encode.conditions=false", "encode.dtype=float32")
    assert "0004" not in samples(tmp_path, "latents") and len(samples(tmp_path, "latents")) == 46
    fly = trained(1, tmp_path, "fly", *text, "batch=16")
    assert trained(1, tmp_path, "encoded", *text, "batch=16", "data.encoded=latents") == pytest.approx(fly, rel=1e-5)
    quarantined = [read_jsonl(tmp_path / "runs" / name / "quarantine.jsonl") for name in ("fly", "encoded")]
    assert quarantined[0] == quarantined[1]
    assert {line["key"] for line in quarantined[0]} <= {"0004", "0009"} and quarantined[0]
    strict = overrides(tmp_path, *text, "data.encoded=strict", "encode.conditions=false", "encode.max_errors=0.05")
    (refused,) = ranks(1).run(encode_here, strict)
    assert refused.startswith("2 of 24 samples") and "'0004': cannot decode image" in refused
    assert list(encoded_folder(tmp_path, "strict").glob("*")) == []


def encode_as(rank: int, world: int, rendezvous: str, arguments: list[str]) -> None:
    """The job as one of the ranks of a process group of its own."""
    if world > 1:
        dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    assert encode_here(arguments) == ""
    if world > 1:
        dist.destroy_process_group()


def started(world: int, rendezvous: Path, arguments: list[str]) -> list[Any]:
    """The job's processes."""
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=encode_as, args=(rank, world, str(rendezvous), arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_gives_the_same_bytes(tmp_path, folder):
    """Ranks are killed one after the other, each at a moment of its own; other numbers of ranks go on."""
    write_shards(tmp_path, shards=8, size=12)
    arguments = overrides(tmp_path, f"conditioner.folder={folder}/text_encoder", "encode.batch=1")
    (only,) = started(1, tmp_path / "once", [*arguments, "data.encoded=once"])
    only.join()
    expected = files(tmp_path, "once")
    assert only.exitcode == 0 and len(expected) == 17
    rng, killed, kills = random.Random(0), encoded_folder(tmp_path, "killed"), 0
    for attempt, world in enumerate((1, 2, 2, 1)):
        there = len(list(killed.iterdir())) if killed.exists() else 0
        goal = there + rng.randint(1, 4)  # files, those under way included
        processes = started(world, tmp_path / f"rendezvous{attempt}", [*arguments, "data.encoded=killed"])
        while any(p.is_alive() for p in processes) and not (killed.exists() and len(list(killed.iterdir())) >= goal):
            time.sleep(0.002)
        for process in rng.sample(processes, world):
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        for process in processes:
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        for path in killed.iterdir():
            if path.name in expected:
                assert path.read_bytes() == expected[path.name], path.name  # whole, whatever the moment
    assert kills >= 5, "killed too late to tell anything"
    last = started(2, tmp_path / "rendezvous", [*arguments, "data.encoded=killed"])
    for process in last:
        process.join()
        assert process.exitcode == 0
    assert files(tmp_path, "killed") == expected


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), "data.encoded must name"),
        (("data.encoded=x", "data.crop=random"), "data.crop=random"),
        (("data.encoded=x", "first_stage=identity"), "first_stage: Identity has no latents"),
        (("data.encoded=x", "encode.latents=false", "encode.conditions=false"), "nothing to encode"),
        (("data.encoded=x", "buckets.sizes=[[30,32]]"), "30x32 is no multiple of 4"),
        (("data.encoded=a/b",), "data.encoded='a/b'"),
        (("data.encoded=x", "encode.tasks=2", "encode.task=2"), "encode.task=2 is not one of the 2 tasks"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_anything_is_read(more, named):
    config = compose("encode", overrides(Path("/nowhere"), *more))
    check(config, Config)
    with pytest.raises((ConfigError, ValueError), match=named):
        preflight(config, 1)
