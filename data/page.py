"""Pages that jobs write for people: the same content as one HTML file that holds its pictures, and as Markdown."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from data.store import Store, remove_leftovers
from data.tracking import RunLog

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
img { max-width: 100%; } figure { margin: 1rem 0; } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
"""


class Page:
    """Collects headings, paragraphs, tables and pictures.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._html: list[str] = [f"<h1>{html.escape(title)}</h1>"]
        self._markdown: list[str] = [f"# {title}"]
        self._tables: dict[str, list[Sequence[str]]] = {}
        self._pictures: dict[str, tuple[bytes, str]] = {}

    def heading(self, text: str) -> None:
        self._html.append(f"<h2>{html.escape(text)}</h2>")
        self._markdown.append(f"## {text}")

    def paragraph(self, text: str) -> None:
        self._html.append(f"<p>{html.escape(text)}</p>")
        self._markdown.append(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], name: str | None = None) -> None:
        """A table whose first row names its columns; one with a name is shown in W&B too."""
        lines = [header, *([str(cell) for cell in row] for row in rows)]
        if name is not None:
            self._tables[name] = lines
        cells = [[html.escape(cell) for cell in line] for line in lines]
        marked = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells[1:])
        self._html.append(f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in cells[0])}</tr>{marked}</table>")
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        escaped.insert(1, ["---"] * len(header))
        self._markdown.append("\n".join(f"| {' | '.join(line)} |" for line in escaped))

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """A PNG; `name` is that of its file beside the Markdown."""
        self._html.append(figure_of(png, caption))
        self._markdown.append(f"![{caption}](pictures/{name}.png)\n\n{caption}")
        self._pictures[name] = png, caption

    def write(self, folder: str, store: Store) -> str:
        """Write `report.md`, the pictures, and last `index.html`, each whole or not at all; returns the page's URL.

        Args:
            folder: for them, or a URL of one.
            store: where it lies.

        Raises:
            StoreError: the store fails.
        """
        folder = folder.rstrip("/")
        for inside in (folder, f"{folder}/pictures"):
            remove_leftovers(inside)
        for name, (png, _) in self._pictures.items():
            store.write(f"{folder}/pictures/{name}.png", png)
        store.write(f"{folder}/report.md", ("\n\n".join(self._markdown) + "\n").encode())
        store.write(f"{folder}/index.html", document(self.title, self._html).encode())
        return f"{folder}/index.html"

    def show(self, log: RunLog, at: int) -> None:
        """Show the pictures, and the tables that have names, in W&B, at a place of the log's axis."""
        for name, (header, *rows) in self._tables.items():
            log.log_table(f"report/{name}", header, rows, at)
        for name, (png, caption) in self._pictures.items():
            log.log_image(f"report/{name}", png, at, caption)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document of parts."""
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def figure_of(png: bytes, caption: str) -> str:
    """HTML of a picture with its caption; the PNG travels inside the page."""
    data, text = base64.b64encode(png).decode(), html.escape(caption)
    return f"<figure><img src='data:image/png;base64,{data}' alt='{text}'><figcaption>{text}</figcaption></figure>"


def axes() -> tuple[Any, Any]:
    """A matplotlib figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    plot = figure.subplots()
    plot.grid(alpha=0.3)
    return figure, plot


def png_of(figure: Any) -> bytes:
    """The PNG of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
