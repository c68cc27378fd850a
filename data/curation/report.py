"""What curation found, for people: the funnel of a `where` clause, groups of duplicates, errors."""

from collections.abc import Mapping, Sequence

import numpy as np

from data.clips import is_clips
from data.curation.sheets import Sheets
from data.funnel import Funnel, Near, Stage, funnel
from data.manifest import Manifest
from data.page import Page, axes, png_of
from data.scores import Scored, error_counts, failures, open_scores, read_scored, score_names
from data.store import Store

GROUPS = 4
"""Groups of duplicates that are shown, the largest first."""
ON_SHEET = 12
ERRORS = 20
"""Errors listed per filter."""


def make_report(manifests: Sequence[Manifest], store: Store, where: str | None = None) -> Page:
    """The page, not yet written anywhere.

    Args:
        manifests: of the shards.
        store: where they lie.
        where: the clause whose funnel is shown.

    Raises:
        ValueError: a wrong clause, or scores that are missing.
        StoreError: the store fails.
    """
    rows = sum(m.rows for m in manifests)
    what = "clips" if is_clips(manifests[0]) else "samples"
    page = Page(f"Curation of {rows} {what} in {len(manifests)} shards")
    sheets = Sheets(manifests, store)
    if where is not None:
        _show_funnel(page, funnel(manifests, store, where, ON_SHEET), where, sheets)
    names = score_names(manifests[0].url, store)
    scored = {name: [read_scored(manifest, name, store) for manifest in manifests] for name in names}
    for name, files in scored.items():
        if all(files):
            _show_groups(page, name, manifests, store, sheets)
    _show_errors(page, manifests, scored)
    _show_missing(page, scored)
    return page


def _show_funnel(page: Page, found: Funnel, where: str, sheets: Sheets) -> None:
    page.heading("Survival")
    page.paragraph(f"Of {found.total} samples, {found.stages[-1].left} are kept by: {where}")
    page.table(
        ["condition", "threshold", "removed alone", "removed after those above", "left"],
        [
            (
                stage.text,
                "" if stage.threshold is None else f"{stage.threshold:.5g}",
                _share(stage.removed_alone, found.total),
                _share(stage.removed, stage.removed + stage.left),
                _share(stage.left, found.total),
            )
            for stage in found.stages
        ],
        name="funnel",
    )
    for number, stage in enumerate(found.stages, 1):
        page.heading(stage.text)
        if stage.histogram is not None:
            page.picture(f"histogram_{number}", _histogram(stage), f"{stage.column}; dashed: {stage.threshold:.5g}")
        shown = "{}, drawn at random." if stage.threshold is None else "Just {}: nearest to the threshold."
        for what, near in (("kept", stage.kept), ("dropped", stage.dropped)):
            if near:
                png = sheets.draw([(n.shard, n.row) for n in near], [_value(n) for n in near])
                page.picture(f"{what}_{number}", png, shown.format(what).capitalize())


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})" if total else "0"


def _value(near: Near) -> str:
    return "" if near.value is None else f"{near.value:.5g}"


def _histogram(stage: Stage) -> bytes:
    assert stage.histogram is not None and stage.threshold is not None
    figure, plot = axes()
    for counts, label, alpha in (
        (stage.histogram.counts, "all", 0.35),
        (stage.histogram.survivors, "kept by earlier conditions", 0.9),
    ):
        plot.stairs(counts, stage.histogram.edges, fill=True, alpha=alpha, label=label)
    plot.axvline(stage.threshold, color="black", linestyle="--")
    plot.set_xlabel(stage.column)
    plot.set_ylabel("samples")
    plot.legend()
    return png_of(figure)


def _show_groups(page: Page, name: str, manifests: Sequence[Manifest], store: Store, sheets: Sheets) -> None:
    """The groups of a filter with columns `..._group` (its number for the members of a group, null for others) and
    `..._rank` (0 for the best of each)."""
    with open_scores(manifests[0], name, store) as file:
        column = next((c for c in file.schema_arrow.names if c.endswith("_group")), None)
    if column is None:
        return
    rank = column.removesuffix("_group") + "_rank"
    members = []
    for shard, manifest in enumerate(manifests):
        with open_scores(manifest, name, store) as file:
            scores = file.read(columns=[column, rank])
        rows = np.flatnonzero(scores[column].is_valid().to_numpy())
        found = scores.take(rows)
        members.append(np.column_stack([found[column], found[rank], np.full(len(rows), shard), rows]))
    table = np.concatenate(members)
    groups, counts = np.unique(table[:, 0], return_counts=True)
    page.heading(f"Groups of {name}")
    page.table(
        ["groups", "samples in them", f"removed by {rank} = 0"], [(len(groups), len(table), len(table) - len(groups))]
    )
    for number, group in enumerate(groups[np.argsort(-counts, kind="stable")[:GROUPS]], 1):
        chosen = table[table[:, 0] == group]
        shown = chosen[np.argsort(chosen[:, 1])[:ON_SHEET]].tolist()
        png = sheets.draw([(shard, row) for _, _, shard, row in shown], [f"rank {place}" for _, place, *_ in shown])
        page.picture(f"{name}_{number}", png, f"Group of {len(chosen)} samples, the best first.")


def _show_errors(page: Page, manifests: Sequence[Manifest], scored: Mapping[str, Sequence[Scored | None]]) -> None:
    failed = failures(manifests, scored)
    page.heading("Errors")
    if not failed:
        page.paragraph("None.")
        return
    counts = [(name, *counted) for name, files in scored.items() for counted in error_counts(files).most_common()]
    page.table(["filter", "reason", "samples"], counts)
    page.table(
        ["shard", "sample", "reason", "detail", "filters"],
        [(one.shard, one.key, one.reason, one.detail, ", ".join(one.filters)) for one in failed[:ERRORS]],
    )
    if len(failed) > ERRORS:
        page.paragraph(f"And {len(failed) - ERRORS} more.")


def _show_missing(page: Page, scored: Mapping[str, Sequence[Scored | None]]) -> None:
    """Filters that have no scores of some shards as these are now."""
    missing = [(name, sum(file is None for file in files), len(files)) for name, files in scored.items()]
    if any(count for _, count, _ in missing):
        page.heading("To be scored anew")
        page.table(["filter", "shards without its scores", "of"], [row for row in missing if row[1]])
