"""`millrace evaluate`: a real tiny run from the command line, on ranks, killed, and against pictures that are there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import webdataset
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from conf.compose import compose
from conf.schema import check
from data.run_directory import read_jsonl
from models.features import RandomStandIn
from tests.data.curation.tiny_models import save_clip
from tests.trainer.jobs import train_on
from tests.trainer.ranks import ranks
from tools import cli
from tools.demo.composition import asked_for
from tools.demo.judge import is_right
from tools.demo.scenes import describe, scenes, write_tars
from trainer.distributed import World
from trainer.evaluate import Config, evaluate

STAND_IN = ["features=random_stand_in", "features.num_features=8"]
DRAWN = ["samples=20", "steps=[2]", "guidance_scales=[1]", "batch=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, `runs/run`, and two folders of tars: what it was trained on, and other scenes."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_tars(folder / "scenes", 60, seed=0)
    write_tars(folder / "held", 24, seed=0, split="test")
    settings = ["steps=8", "schedule=constant", "schedule.lr=0.02", "schedule.warmup=0", "ema=constant"]
    held_out = ["data.holdout=0.3", "validation.every=8", "validation.samples=12", "validation.ema=null"]
    data = f"data.sources.scenes.shards={folder}/scenes"
    train_on(1, folder, "name=run", data, *settings, *held_out)
    return folder


def job(home: Path, name: str, *overrides: str) -> list[str]:
    shared = [f"runs={home}/runs", f"name={name}", f"cache_folder={home}/cache", "log.wandb=null"]
    return ["evaluate", *shared, *overrides]


def rows_of(home: Path, name: str) -> list[dict]:
    return json.loads((home / "runs" / name / "evaluation.json").read_text())


def pictures_of(folder: Path) -> dict[str, np.ndarray]:
    """By key, what a folder of tars holds, as webdataset reads it."""
    tars = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8")
    return {sample["__key__"]: sample["png"] for sample in samples}


def test_a_run_is_evaluated_from_the_command_line(home: Path, capsys):
    metrics = "metric=[fid,kid,precision_recall,validation_loss,composition]"
    small = ["metric.kid.subset_size=10", "metric.validation_loss.samples=12", "keep=true"]
    source = [f"source={home}/runs/run", f"reference={home}/held", "averages=[none,decay_9999]"]
    drawn = [*STAND_IN, "samples=20", "steps=[2,4]", "guidance_scales=[1]", "batch=4"]
    command = job(home, "whole", *source, *drawn, metrics, *small)
    assert cli.execute(command) == 0
    rows = rows_of(home, "whole")
    assert [(row["average"], row["steps"], row["samples"]) for row in rows] == [
        (average, steps, 20) for average in ("none", "decay_9999") for steps in (2, 4)
    ]
    # Stand-ins have their name in every column, row and page.
    assert all(row["features"] == row["stand_ins"] == "random_stand_in" for row in rows)
    assert not {"fid", "kid", "precision", "recall"} & rows[0].keys()
    page = (home / "runs/whole/report/index.html").read_text()
    assert "features: random_stand_in" in page and "fid_random_stand_in" in page and page.count("<figure>") == 4
    assert pq.read_table(home / "runs/whole/evaluation.parquet").to_pylist() == rows
    assert len({row["fid_random_stand_in"] for row in rows}) == 4

    # What was kept, measured by torchmetrics and the judge themselves.
    folders = sorted((home / "runs/whole/pictures").iterdir())
    assert len(folders) == 4
    by_fid = {}
    for folder in folders:
        kept = pictures_of(folder)
        assert len(kept) == 20
        stack = torch.from_numpy(np.stack([kept[f"{i:06d}"] for i in range(20)])).permute(0, 3, 1, 2)
        fid = FrechetInceptionDistance(RandomStandIn(8))
        fid.update(stack, real=False)
        for image in _reference(home):
            fid.update(image[None], real=True)
        by_fid[float(fid.compute())] = kept
    for row in rows:
        assert any(row["fid_random_stand_in"] == pytest.approx(value, rel=1e-3) for value in by_fid), by_fid.keys()
    assert all(0 <= row["composition_accuracy"] <= 1 for row in rows)

    # The weights' loss is what training logged of them at its last step.
    logged = read_jsonl(home / "runs/run/metrics.jsonl")[-1]["val/loss"]
    assert rows[0]["validation_loss"] == pytest.approx(logged, rel=1e-5)
    assert rows[2]["validation_loss"] != pytest.approx(logged, rel=1e-5)

    # The same again: nothing is measured anew. Another metric: what was kept is not drawn anew.
    before = (home / "runs/whole/evaluation.jsonl").read_text()
    assert cli.execute(command) == 0
    assert (home / "runs/whole/evaluation.jsonl").read_text() == before
    times = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    one = job(home, "whole", *source, *drawn, "metric=[fid]", "keep=true")
    assert cli.execute(one) == 0
    fresh = rows_of(home, "whole")
    assert times == {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    for row, old in zip(fresh, rows, strict=True):
        assert row["fid_random_stand_in"] == pytest.approx(old["fid_random_stand_in"], rel=1e-9)
    assert len(read_jsonl(home / "runs/whole/evaluation.jsonl")) == 8


def _reference(home: Path) -> list[torch.Tensor]:
    """The held pictures as the job crops them: to the run's first bucket, 32 x 32, in the middle."""
    from data.decode import decode_image
    from data.transforms import CENTER, Framing, frame

    found = []
    with tarfile.open(home / "held/00000.tar") as tar:
        for member in tar:
            if member.name.endswith((".jpg", ".png", ".webp")):
                image = torch.empty((3, 32, 32), dtype=torch.uint8)
                file = tar.extractfile(member)
                assert file is not None
                frame(decode_image(file.read(), (32, 32)).pixels, (32, 32), Framing(CENTER, CENTER, False), image)
                found.append(image)
    assert len(found) == 24
    return found


def _evaluate(overrides: list[str]) -> list[dict]:
    config = compose("evaluate", overrides)
    check(config, Config)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with ExitStack() as resources:
        return evaluate(config, World(rank, size, rank, torch.device("cpu"), launched=False), resources)


def test_ranks_give_what_one_process_gives(home: Path):
    shared = [f"source={home}/runs/run", f"reference={home}/held", *STAND_IN, *DRAWN, "bucketed=true"]
    shared += ["metric=[fid,kid,precision_recall,composition]", "metric.kid.subset_size=10"]
    alone = _evaluate(job(home, "on1", *shared)[1:])
    for size in (2, 4):
        on_ranks = ranks(size).run(_evaluate, job(home, f"on{size}", *shared)[1:])[0]
        for row, expected in zip(on_ranks, alone, strict=True):
            assert row["samples"] == expected["samples"] == 20 and row["identity"] == expected["identity"]
            for name in (key for key, value in expected.items() if isinstance(value, float)):
                assert row[name] == pytest.approx(expected[name], rel=1e-6), (size, name)


@pytest.mark.slow
def test_the_command_starts_ranks_and_goes_on_after_it_was_killed(home: Path):
    shared = [f"source={home}/runs/run", f"reference={home}/held", *STAND_IN, "metric=[fid]", "batch=2", "keep=true"]
    shared += ["samples=24", "steps=[40,41]", "guidance_scales=[1]"]
    command = [sys.executable, "-P", "-m", "tools.cli", *job(home, "killed", *shared, "cluster.processes=2")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kept = home / "runs/killed/pictures"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(kept.glob("*/*.tar"))) < 14:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    for _ in range(500):  # the ranks are told by the kernel
        if not _ranks_of("name=killed"):
            break
        time.sleep(0.05)
    written = {path: path.stat().st_mtime_ns for path in kept.glob("*/*.tar")}
    first = (home / "runs/killed/evaluation.jsonl").read_text()
    assert 14 <= len(written) < 24 and first.count("\n") == 1
    assert cli.execute(job(home, "killed", *shared)) == 0
    assert (home / "runs/killed/evaluation.jsonl").read_text().startswith(first)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    whole = _evaluate(job(home, "not_killed", *shared)[1:])
    for row, expected in zip(rows_of(home, "killed"), whole, strict=True):
        assert row["fid_random_stand_in"] == pytest.approx(expected["fid_random_stand_in"], rel=1e-6)


def _ranks_of(word: str) -> list[int]:
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or [])]


def test_clip_score_is_transformers_cosine_and_of_captions_that_there_are(home: Path, tmp_path: Path):
    clip = save_clip(tmp_path / "clip")
    folder = tmp_path / "pictures"
    folder.mkdir()
    captions = ["a red fox", "a cat", None]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in captions]
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)
    command = job(home, "clip", f"generated={folder}", "metric=[clip_score]", f"metric.clip_score.model={clip}")
    assert cli.execute(command) == 0
    (row,) = rows_of(home, "clip")
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    expected = []
    for image, caption in zip(images[:2], captions[:2], strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        expected.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
    assert row["clip_score"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert row["features"] == str(clip) and row["stand_ins"] is None and row["samples"] == 3


def test_kept_tars_are_pictures_like_any_others(home: Path):
    drawn = [f"source={home}/runs/run", f"reference={home}/held", *STAND_IN, "metric=[fid,composition]", *DRAWN]
    assert cli.execute(job(home, "drawn", *drawn, "keep=true")) == 0
    (folder,) = (home / "runs/drawn/pictures").iterdir()
    given = [f"generated={folder}", f"reference={home}/held", *STAND_IN, "metric=[fid,composition]", "batch=7"]
    assert cli.execute(job(home, "given", *given)) == 0
    (ours,), (theirs,) = rows_of(home, "drawn"), rows_of(home, "given")
    for name in ("fid_random_stand_in", "composition_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    statistics = home / "runs/drawn/reference_fid_random_stand_in.npz"
    assert (
        cli.execute(job(home, "stats", f"generated={folder}", f"reference={statistics}", *STAND_IN, "metric=[fid]"))
        == 0
    )
    assert rows_of(home, "stats")[0]["fid_random_stand_in"] == pytest.approx(ours["fid_random_stand_in"], rel=1e-5)


def test_ground_truth_has_all_compositions_right(home: Path):
    """The judge sees what the metric gives it: pictures of the captions themselves, and of others."""
    assert (
        cli.execute(job(home, "truth", f"generated={home}/held", "metric=[composition]", "height=64", "width=64")) == 0
    )
    (row,) = rows_of(home, "truth")
    assert row["composition_accuracy"] > 0.9 and row["composition_accuracy_two_objects"] > 0.8
    rng = np.random.default_rng(0)
    for scene in scenes(200, 1, "train"):
        assert asked_for(describe(scene.objects, rng)) == scene.objects
    assert not is_right(np.full((64, 64, 3), 230, np.uint8), asked_for("a red circle in the centre"))


def test_reconstructions_of_a_first_stage(home: Path, tmp_path: Path):
    from diffusers import AutoencoderKL
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    theirs.save_pretrained(tmp_path / "vae")
    metrics = "metric=[fid,psnr,ssim]"
    given = [f"source={tmp_path}/vae", "reconstructions=true", f"reference={home}/held", "batch=6"]
    assert cli.execute(job(home, "rec", *given, *STAND_IN, metrics)) == 0
    (row,) = rows_of(home, "rec")
    originals = torch.stack(_reference(home))
    with torch.no_grad():
        latents = theirs.encode(originals.float() / 127.5 - 1).latent_dist.mean
        images = ((theirs.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round()
    each = [peak_signal_noise_ratio(a, b, data_range=255.0) for a, b in zip(images, originals.float(), strict=True)]
    assert row["psnr"] == pytest.approx(float(torch.stack(each).mean()), rel=1e-3)
    _, places = structural_similarity_index_measure(
        images, originals.float(), data_range=255.0, reduction="none", return_full_image=True
    )
    # Where the window fits: torchmetrics also averages over mirrored margins.
    assert row["ssim"] == pytest.approx(float(places[..., 5:-5, 5:-5].mean()), abs=1e-3)
    fid = FrechetInceptionDistance(RandomStandIn(8))
    fid.update(originals, real=True)
    fid.update(images.to(torch.uint8), real=False)
    assert row["rfid_random_stand_in"] == pytest.approx(float(fid.compute()), rel=1e-2)


def test_mistakes_are_told_in_sentences(home: Path, tmp_path: Path, capsys):
    run, held = f"source={home}/runs/run", f"reference={home}/held"
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for i, side in enumerate((16, 16, 20)):
        Image.new("RGB", (side, 16)).save(sizes / f"{i}.png")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for overrides, status, told in [
        ([run, held, "metric=[fid]"], 2, "features.path must name the weights of FID's Inception"),
        ([run, held, "metric=[fid]", "features.path=/nothing.pth"], 2, "there is no file /nothing.pth"),
        (["source=/nothing", held, *STAND_IN, "metric=[fid]"], 1, "/nothing is neither a run"),
        ([run, "reference=/nothing", "metric=[fid]"], 2, "reference=/nothing: there is nothing"),
        ([held, "metric=[fid]"], 2, "give either source="),
        ([run, held, "metric=[]"], 2, "no metrics"),
        ([run, held, *STAND_IN, "metric=[kid]", "samples=20"], 2, "metric.kid.subset_size"),
        ([run, held, *STAND_IN, "metric=[psnr]"], 2, "reconstructions=true"),
        ([run, f"reference={tmp_path}/other.npz", *STAND_IN, "metric=[fid]"], 1, "no mu and sigma"),
        ([f"generated={sizes}", held, *STAND_IN, "metric=[fid]"], 1, "2.png is of 20 x 16 pixels, and"),
        ([f"generated={home}/held", held, *STAND_IN, "metric=[fid]"], 1, "give height= and width="),
        ([f"generated={sizes}", "metric=[composition]", "height=16", "width=16"], 1, "'' is none"),
        ([f"generated={sizes}", *STAND_IN, "metric=[fid]"], 2, "fid needs something to compare with"),
    ]:
        shutil.rmtree(home / "runs/mistake", ignore_errors=True)
        assert cli.execute(job(home, "mistake", *overrides)) == status, told
        assert told in capsys.readouterr().err


def test_too_few_samples_are_warned_of(home: Path, caplog):
    command = job(home, "few", f"source={home}/runs/run", f"reference={home}/held", "metric=[fid]", *DRAWN)
    assert cli.execute([*command, "features=random_stand_in"]) == 0
    assert "20 pictures are too few for the covariance of 64 features" in caplog.text
