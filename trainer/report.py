"""A run's page: `report.html`, one file that shows its curves, its pictures and its configuration."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.page import axes, document, figure_of, png_of
from data.run_directory import RunDirectory, read_jsonl

_SHOWN = [
    "step",
    "samples",
    "loss",
    "val/loss",
    "val/psnr",
    "val/ssim",
    "grad_norm",
    "samples_per_s",
    "data_wait",
    "mfu",
    "peak_memory_bytes",
]


def write_report(directory: RunDirectory, sections: Sequence[str] = (), stand_ins: Sequence[str] = ()) -> Path:
    """Write the page from what lies in the run directory.

    Args:
        sections: further HTML, put before the configuration.
        stand_ins: what of the run stood in for the real thing, told at the top.
    """
    rows = read_jsonl(directory.metrics) if directory.metrics.exists() else []
    parts = [f"<h1>{html.escape(directory.path.name)}</h1>"]
    parts += [f"<p><strong>A stand-in: {html.escape(told)}.</strong></p>" for told in stand_ins]
    parts.append(_summary(rows))
    if rows:
        parts.append(figure_of(loss_curve(rows), "Training loss, and validation loss at fixed times."))
        if any("loss_by_t/0" in row for row in rows):
            parts.append(figure_of(_by_timestep(rows), "Loss by timestep (left: images, right: noise)."))
    sheets = sorted(directory.samples.glob("step_*.png"))
    for sheet in sheets[-3:]:
        parts.append(figure_of(sheet.read_bytes(), f"Samples, {sheet.stem.replace('_', ' ')}."))
    parts += sections
    if directory.config.exists():
        parts.append(f"<h2>Configuration</h2><pre>{html.escape(directory.config.read_text())}</pre>")
    directory.report.write_text(document(directory.path.name, parts))
    return directory.report


def loss_curve(rows: Sequence[dict[str, Any]]) -> bytes:
    """PNG of training and validation loss over samples seen."""
    figure, plot = axes()
    for name, style in (("loss", {"alpha": 0.6}), ("val/loss", {"marker": "o"})):
        points = [(r["samples"], r[name]) for r in rows if r.get(name) is not None]
        if points:
            plot.plot(*zip(*points, strict=True), label=name, **style)
    plot.set_xlabel("samples")
    plot.set_yscale("log")
    plot.legend()
    return png_of(figure)


def table(rows: Sequence[tuple[str, object]]) -> str:
    """HTML of a two-column table."""
    cells = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    return f"<table>{''.join(cells)}</table>"


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>No step has been logged yet.</p>"
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    texts = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in last.items()}
    return table([(name, texts[name]) for name in _SHOWN if name in texts])


def _by_timestep(rows: Sequence[dict[str, Any]]) -> bytes:
    figure, plot = axes()
    for name in ("loss_by_t", "val/loss_by_t"):
        row: dict[str, Any] = next((r for r in reversed(rows) if f"{name}/0" in r), {})
        values = [row[f"{name}/{i}"] for i in range(len(row)) if f"{name}/{i}" in row]
        plot.plot([(i + 0.5) / len(values) for i in range(len(values))], values, marker="o", label=name)
    plot.set_xlabel("t")
    plot.legend()
    return png_of(figure)
