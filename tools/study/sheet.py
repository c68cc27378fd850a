"""What an analysis writes on: verdicts, tables and plots, which become a page, Markdown and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.page import Page, png_of

_WORDS = {"~": "textasciitilde", "^": "textasciicircum", "\\": "textbackslash"}
_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {c: f"\\{word}{{}}" for c, word in _WORDS.items()})


@dataclass(frozen=True)
class Table:
    """A table for the page, and as a file of its own in Markdown and LaTeX.

    Args:
        name: of its files.
        caption: a sentence.
        header: of the columns.
        rows: of cells.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """The table in Markdown; columns of numbers are aligned to the right."""
        lines = [[cell.replace("|", "\\|") for cell in map(str, line)] for line in (self.header, *self.rows)]
        rule = ["---:" if self._is_number(i) else "---" for i in range(len(self.header))]
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])) + "\n"

    def latex(self) -> str:
        """The table in LaTeX, for the booktabs package."""
        cells = [[str(cell).translate(_LATEX) for cell in line] for line in (self.header, *self.rows)]
        lines = [" & ".join(line) + r" \\" for line in cells]
        columns = "".join("r" if self._is_number(i) else "l" for i in range(len(self.header)))
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        caption = self.caption.translate(_LATEX)
        return (
            f"\\begin{{table}}\n\\caption{{{caption}}}\n\\label{{tab:{self.name}}}\n\\centering\n"
            f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n\\end{{table}}\n"
        )

    def _is_number(self, column: int) -> bool:
        cells = [str(row[column]).replace(" ", "") for row in self.rows]
        return bool(cells) and all(cell[:1] in "0123456789.+-–" for cell in cells if cell)


@dataclass
class Sheet:
    """Collects what one analysis found.

    Args:
        name: of the analysis; begins the names of its files.
        folder: of the study.
    """

    name: str
    folder: Path
    verdicts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    _parts: list[Any] = field(default_factory=list)

    def verdict(self, sentence: str) -> None:
        """A sentence with numbers that says what was found. Verdicts also stand at the head of the page."""
        self.verdicts.append(sentence)

    def paragraph(self, text: str) -> None:
        """Further text."""
        self._parts.append(text)

    def table(self, name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; see `Table`."""
        table = Table(name, caption, header, rows)
        self.tables.append(table)
        self._parts.append(table)

    def plot(self, name: str, caption: str, figure: Any) -> None:
        """A matplotlib figure; `name` is that of its file."""
        self._parts.append((name, caption, png_of(figure)))

    def number(self, **values: Any) -> None:
        """JSON values by name, for programs that read the study's `analysis.json`."""
        self.numbers |= values

    def write(self, page: Page) -> None:
        """Append the section to a page."""
        page.heading(self.name.replace("_", " "))
        for sentence in self.verdicts:
            page.paragraph(sentence)
        for part in self._parts:
            if isinstance(part, Table):
                page.paragraph(part.caption)
                page.table(part.header, part.rows, part.name)
            elif isinstance(part, str):
                page.paragraph(part)
            else:
                name, caption, png = part
                page.picture(name, png, caption)


def figures(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; large and small ones with a power of ten."""
    if value is None:
        return ""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{digits}g}"
