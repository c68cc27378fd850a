"""What an evaluation leaves behind: a row for each finished setting, a page with samples, and W&B's rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from data.page import Page
from data.run_directory import RunDirectory, read_jsonl
from data.store import Store
from data.tracking import RunLog
from trainer.sampling import grid, save_png

SHOWN = 16
"""Pictures of each setting that the page shows."""
_SHOWN_HEIGHT = 128
_HIDDEN = ("identity",)


class Results:
    """The rows of a run's folder, `evaluation.jsonl`; a setting that is there is not measured again.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._path = directory.path / "evaluation.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """In the order in which they were finished."""
        return read_jsonl(self._path) if self._path.exists() else []

    def find(self, identity: str) -> dict[str, Any] | None:
        """The row of a setting, if it is finished."""
        return next((row for row in self.rows() if row["identity"] == identity), None)

    def add(self, row: Mapping[str, Any], pictures: Sequence[Tensor]) -> None:
        """A setting is finished; some of its pictures are shown."""
        if pictures:
            told = {key: value for key, value in row.items() if key not in _HIDDEN}
            scale = max(1, round(_SHOWN_HEIGHT / pictures[0].shape[1]))
            save_png(grid(pictures), self._sheet(row), told, scale)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def write(self, asked: Sequence[Mapping[str, Any]], log: RunLog | None) -> str:
        """Write `evaluation.json` (the rows that were asked for now), and `evaluation.parquet` and the page (all of the
        folder's); returns the page's path."""
        folder = self._directory.path
        (folder / "evaluation.json").write_text(json.dumps(list(asked), indent=1) + "\n")
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        # The rows of several commands have columns of their own.
        pq.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), folder / "evaluation.parquet")
        page = Page(f"Evaluation: {folder.name}")
        stand_ins = sorted({row["stand_ins"] for row in rows if row.get("stand_ins")})
        if stand_ins:
            page.paragraph(
                f"features: {', '.join(stand_ins)}. Columns of this name were measured through a network that stands in"
                " for a trained one: they show that all runs, and say little of how good pictures are."
            )
        shown = [column for column in columns if column not in _HIDDEN]
        page.table(shown, [[_figures(row.get(column)) for column in shown] for row in rows], "evaluation")
        for row in rows:
            if self._sheet(row).exists():
                page.picture(row["identity"], self._sheet(row).read_bytes(), caption_of(row))
        if log is not None:
            page.show(log, sum(row["samples"] for row in rows))
        return page.write(str(folder / "report"), Store())

    def _sheet(self, row: Mapping[str, Any]) -> Path:
        return self._directory.path / "sheets" / f"{row['identity']}.png"


def caption_of(row: Mapping[str, Any]) -> str:
    """What tells a row from others, in words."""
    told = [f"{key} {row[key]}" for key in ("sampler", "steps", "guidance", "average") if row.get(key) is not None]
    return f"{row['source']}: {', '.join(told)}" if told else str(row["source"])


def _figures(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
