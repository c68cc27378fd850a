"""The demo's captioned scenes as data for small studies."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from data.index import ensure_indexed
from data.store import Store
from tools.demo.scenes import write_tars


@dataclass(frozen=True)
class DrawnScenes:
    """Draws scenes into the study's `data` folder.

    Args:
        count: of scenes.
        seed: of the drawing.
    """

    count: int
    seed: int = 0

    def prepare(self, folder: Path) -> None:
        """Draw and index them, unless they are there."""
        data = folder / "data"
        if data.exists():
            return
        scratch = folder / "data.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        write_tars(scratch, self.count, self.seed)
        scratch.rename(data)
        # Now, so that not every run that starts does it.
        store = Store()
        ensure_indexed(store.expand([str(data)]), store)
