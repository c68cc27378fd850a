"""Sample grids of a run, always of the same prompts and noise, so that two of them can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.run_directory import RunDirectory
from data.tars import TarSplit
from trainer.callbacks import averaged
from trainer.distributed import is_main
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.objectives.base import DrawsPictures
from trainer.sampling import Picture, grid, save_png, share_work
from trainer.tracking import Tracker

# Sheets of tiny pictures are enlarged to about this height per picture.
_SHOWN_HEIGHT = 128


@dataclass
class SampleGrid:
    """Draws `samples/step_00000500.png`.

    Args:
        pictures: what to draw.
        objective: of the run; it draws.
        directory: of the run.
        tracker: shows the sheet in W&B.
        alive: called after each pass of the sampler over some of the pictures.
    """

    pictures: Sequence[Picture]
    objective: DrawsPictures
    directory: RunDirectory
    tracker: Tracker
    alive: Callable[[], None] = lambda: None

    def __call__(self, engine: Engine, ema: Ema, length: str | None, step: int) -> None:
        """Draw and write the sheet; collective.

        Args:
            length: the average whose weights to draw from; None takes the weights themselves.
            step: steps taken.
        """
        with averaged(ema, length):
            images = share_work(
                lambda part: self.objective.draw(engine.networks, part, engine.device),
                self.pictures,
                alive=self.alive,
            )
        if is_main():
            path = self.directory.samples / f"step_{step:08d}.png"
            metadata = {"prompts": [p.prompt for p in self.pictures], "seeds": [p.seed for p in self.pictures]}
            save_png(grid(images), path, metadata | {"step": step}, max(1, round(_SHOWN_HEIGHT / images[0].shape[1])))
            self.tracker.log_image("samples", path, step)


def pictures_for(prompts: Sequence[str], count: int, split: TarSplit) -> list[Picture]:
    """What a run's grids show: each prompt at the split's commonest size; or else samples' captions in their sizes, and
    with their own pictures, for encoders that read some."""
    if prompts:
        shape = next(iter(split.shares()))
        return [Picture(prompt, seed, shape.height, shape.width) for seed, prompt in enumerate(prompts)]
    plan = split.plan(lanes=count, slice_size=1, seed=0)
    reader = split.reader(plan.seed, crop="center", flip=False, encoded=False)
    batches = [reader[plan.slice(0, lane)].batch for lane in range(count)]
    return [
        Picture(b.captions[0], seed, *b.target_size, image=b.images[0], fields={k: v[0] for k, v in b.fields.items()})
        for seed, b in enumerate(batches)
    ]
