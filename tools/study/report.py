"""What a study leaves behind: results.parquet, the page, tables as files, and a run of its own in W&B."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.page import Page
from data.run_directory import RunDirectory
from data.store import Store
from data.tracking import RunLog, WandbConfig
from tools.study.results import Result, columns, write_parquet
from tools.study.sheet import Sheet, figures


def overview(results: Sequence[Result], folder: Path) -> Sheet:
    """The table of all runs, and the reasons of those that are not finished."""
    sheet = Sheet("runs", folder)
    names = columns(results)
    axes = list(results[0].labels)
    rows = [
        [*r.labels.values(), r.seed, *(figures(r.values.get(name)) for name in names)] for r in results if r.finished
    ]
    done = len(rows)
    sheet.verdict(f"{done} of {len(results)} runs are finished.")
    if rows:
        sheet.table("runs", "Every finished run.", [*axes, "seed", *names], rows)
    missing = [[r.name, r.state] for r in results if not r.finished]
    if missing:
        sheet.table("not_finished", "Runs that are not finished.", ["run", "why"], missing)
    return sheet


def write_report(
    name: str, folder: Path, results: Sequence[Result], sheets: Sequence[Sheet], wandb: Mapping[str, Any] | None
) -> Path:
    """Write everything into the study's folder; returns the page's path.

    Args:
        name: of the study.
        folder: of the study.
        results: of all runs.
        sheets: what the analyses have found.
        wandb: the runs' `log.wandb`; None leaves W&B out.
    """
    tables = folder / "report" / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    write_parquet(results, folder / "results.parquet")
    page = Page(name)
    for sheet in sheets:
        for sentence in sheet.verdicts:
            page.paragraph(sentence)
    for sheet in sheets:
        sheet.write(page)
        for table in sheet.tables:
            (tables / f"{table.name}.md").write_text(table.markdown())
            (tables / f"{table.name}.tex").write_text(table.latex())
    found = {sheet.name: {"verdicts": sheet.verdicts, **sheet.numbers} for sheet in sheets}
    (folder / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    path = page.write(str(folder / "report"), Store())
    if wandb is not None:
        directory = RunDirectory(str(folder.parent), folder.name)
        finished = sum(result.finished for result in results)
        with RunLog(directory, found, WandbConfig(**wandb), axis="finished_runs", name=f"{name} analysis") as log:
            log.log({"finished_runs": finished, "runs": len(results)})
            page.show(log, finished)
    return Path(path)
