"""`make demo`: draws captioned tars, indexes them, trains a tiny MMDiT on two processes, and judges what it draws.

Everything goes through the commands and parts that a user has: `millrace index`, then `millrace train` with
experiment=demo/scenes (which also trains the tokenizer and T5 from the captions), `trainer.sampling`, and the run's
report page.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.demo import judge
from tools.demo.scenes import SPLITS, Scene, Split, draw, write_tars

TRAINING_SCENES = 6000
PROMPTS = 240
# Stored pictures are twice as large as those of the buckets that experiment=demo/scenes trains at.
SHRINK = 2
_MARKER = "demo.json"


@dataclass(frozen=True)
class Verdict:
    """What the judge says, as shares of pictures.

    Args:
        accuracy: of the drawn pictures, on held-out prompts.
        single, pair: the same, of the prompts for one object and for two.
        truth: the judge's own accuracy on ground-truth pictures of the same scenes, at the size trained at.
        shuffled: of the drawn pictures, judged by each other's prompts.
        chance: analytic, of well-formed scenes drawn without the prompt.
    """

    accuracy: float
    single: float
    pair: float
    truth: float
    shuffled: float
    chance: float


def main() -> None:
    """The command line of the demo."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the data, the training and the prompts")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--split", choices=SPLITS[1:], default="test", help="of the prompts; the other is for tuning")
    parser.add_argument("overrides", nargs="*", help="passed on to `millrace train`, e.g. steps=100")
    arguments = parser.parse_args()
    demonstrate(arguments.seed, arguments.runs, arguments.overrides, arguments.split)


def demonstrate(seed: int, runs: Path, overrides: Sequence[str] = (), split: Split = "test") -> Verdict:
    """Run the whole demo into `<runs>/demo`, or `<runs>/demo_<seed>` for other seeds than 0; print where all is."""
    name = "demo" if seed == 0 else f"demo_{seed}"
    folder = runs / name
    _clear(folder)
    with _timed(f"drawing {TRAINING_SCENES} captioned scenes"):
        write_tars(folder / "data" / "train", TRAINING_SCENES, seed)
        held_out = write_tars(folder / "data" / split, PROMPTS, seed, split=split)
    (folder / _MARKER).write_text(json.dumps({"seed": seed}))
    shards = folder / "data" / "train"
    with _timed("indexing"):
        _millrace("index", f"shards={shards}")
    with _timed("training on 2 processes"):
        _millrace(
            *("train", "experiment=demo/scenes", f"data.sources.scenes.shards={shards}", f"name={name}"),
            *(f"runs={runs}", f"seed={seed}", "cluster=local", "cluster.processes=2", *overrides),
        )
    with _timed(f"drawing {PROMPTS} held-out prompts"):
        pictures = sample(folder, held_out, seed)
    with _timed("judging"):
        verdict = assess(pictures, held_out, seed)
    report(folder, pictures, held_out, verdict)
    return verdict


def sample(folder: Path, asked: Sequence[Scene], seed: int) -> list[np.ndarray]:
    """A picture (H, W, 3) uint8 of each scene's caption, drawn by the run's newest checkpoint; also written as PNGs."""
    import torch

    from conf.schema import build
    from trainer.loading import load_model
    from trainer.sampling import Picture, grid, save_png
    from trainer.sampling import draw as draw_pictures

    config = _config(folder)
    loaded = load_model(folder)
    wanted = [
        Picture(scene.caption, seed * 100_000 + i, scene.height // SHRINK, scene.width // SHRINK)
        for i, scene in enumerate(asked)
    ]
    drawn = draw_pictures(
        loaded.networks,
        loaded.process,
        build(config.sampler),
        build(config.guidance),
        wanted,
        torch.device("cpu"),
        batch=40,
    )
    out = folder / "held_out"
    for i, (picture, image) in enumerate(zip(wanted, drawn, strict=True)):
        save_png(image, out / f"{i:05d}.png", {"prompt": picture.prompt, "seed": picture.seed})
    save_png(grid(drawn[:64]), out / "grid.png", {"prompts": [p.prompt for p in wanted[:64]]}, scale=3)
    return [image.permute(1, 2, 0).numpy() for image in drawn]


def assess(pictures: Sequence[np.ndarray], asked: Sequence[Scene], seed: int) -> Verdict:
    """Composition accuracy of the pictures, and what to hold it against."""
    import cv2

    objects = [scene.objects for scene in asked]
    right = np.array([judge.is_right(picture, o) for picture, o in zip(pictures, objects, strict=True)])
    single = np.array([len(o) == 1 for o in objects])
    rng = np.random.default_rng([seed, 2])
    truth = [
        cv2.resize(draw(scene, rng), (scene.width // SHRINK, scene.height // SHRINK), interpolation=cv2.INTER_AREA)
        for scene in asked
    ]
    return Verdict(
        accuracy=float(right.mean()),
        single=float(right[single].mean()),
        pair=float(right[~single].mean()),
        truth=judge.composition_accuracy(truth, objects),
        shuffled=judge.shuffled_chance(pictures, objects),
        chance=judge.analytic_chance(objects),
    )


def report(folder: Path, pictures: Sequence[np.ndarray], asked: Sequence[Scene], verdict: Verdict) -> None:
    """Write the verdict to `composition.json` and the run's page, and print where everything is."""
    from data.page import figure_of
    from data.run_directory import RunDirectory, read_jsonl
    from trainer.report import loss_curve, table, write_report

    directory = RunDirectory(str(folder.parent), folder.name)
    rows = [
        ("composition accuracy, held-out combinations", f"{verdict.accuracy:.3f}"),
        ("of scenes with one object", f"{verdict.single:.3f}"),
        ("of scenes with two objects", f"{verdict.pair:.3f}"),
        ("the judge on ground-truth pictures", f"{verdict.truth:.3f}"),
        ("chance: a scene drawn without the prompt", f"{verdict.chance:.4f}"),
        ("chance: these pictures under shuffled prompts", f"{verdict.shuffled:.4f}"),
    ]
    grid = folder / "held_out" / "grid.png"
    caption = "Held-out prompts: each asks for an object whose shape, colour and place training never showed together."
    section = f"<h2>Composition</h2>{table(rows)}{figure_of(grid.read_bytes(), caption)}"
    page = write_report(directory, [section])
    curve = folder / "loss.png"
    curve.write_bytes(loss_curve(read_jsonl(directory.metrics)))
    (folder / "composition.json").write_text(json.dumps(vars(verdict), indent=2))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"\n  pictures    {grid}\n  loss curve  {curve}\n  report      {page}")


def _config(folder: Path):
    """The run's composed config."""
    from omegaconf import OmegaConf

    return OmegaConf.load(folder / "config.yaml")


def _millrace(*arguments: str) -> None:
    """Run the `millrace` command of this Python's environment; a failure ends the demo."""
    subprocess.run([sys.executable, "-m", "tools.cli", *arguments], check=True)


def _clear(folder: Path) -> None:
    """Make room for a new demo: an earlier one's folder goes, nothing else's does."""
    if folder.exists() and not (folder / _MARKER).exists():
        raise SystemExit(f"{folder} exists and is not an earlier demo's: move it, or choose another --runs")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).write_text("{}")


@contextmanager
def _timed(what: str):
    print(f"{what} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
