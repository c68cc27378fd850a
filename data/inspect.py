"""What a run would train on, to look at before it starts: a sheet of real batches, and how full the buckets are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.batch import Batch
from data.plan import Plan

_WIDTH = 1600  # of the sheet, in pixels
_CELL = 208  # longest side of a picture
_GAP = 8
_LINES = 3  # of caption below a picture
_FONT_SIZE = 11


def bucket_fill(plan: Plan) -> list[dict[str, str | int | float]]:
    """How the samples of each source fall into the buckets, one row per source and bucket that has any.

    Returns:
        `source`, `bucket`, `samples`, `share` of the source's samples, and `slices` that they fill per epoch
        (below 1: the bucket needs several epochs for one slice).
    """
    rows: list[dict[str, str | int | float]] = []
    for source in plan.sources:
        for index in np.flatnonzero(source.compiled.totals).tolist():
            samples = int(source.compiled.totals[index])
            rows.append(
                {
                    "source": source.name,
                    "bucket": str(plan.buckets[index]),
                    "samples": samples,
                    "share": samples / source.compiled.rows,
                    "slices": samples / plan.slice_size,
                }
            )
    return rows


def bucket_table(plan: Plan) -> str:
    """`bucket_fill` as text, with columns aligned."""
    lines = [("source", "bucket", "samples", "share", "slices per epoch")]
    for row in bucket_fill(plan):
        share, slices = f"{row['share']:.1%}", f"{row['slices']:.1f}"
        lines.append((str(row["source"]), str(row["bucket"]), f"{row['samples']:,}", share, slices))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def contact_sheet(batches: Sequence[Batch], path: Path | str, table: str = "") -> None:
    """Write a PNG of batches as they will be trained on, a row or more for each.

    Below every picture stand its original size (height x width), the top and left of its crop in the resized picture
    (and "flip" where it is mirrored), and the beginning of its caption.

    Args:
        batches: uint8 images.
        path: of the PNG; its folder is made.
        table: text for the sheet's head, e.g. `bucket_table`.
    """
    import matplotlib  # for its font: Pillow's own lacks most letters beyond ASCII, and monospace aligns the table

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), _FONT_SIZE)
    line_height = _FONT_SIZE + 3
    head_height = line_height * len(table.splitlines()) + 2 * _GAP
    cells = [[_cell(batch, i, font, line_height) for i in range(len(batch))] for batch in batches]
    placed: list[tuple[Image.Image, int, int]] = []
    y = head_height
    for row in cells:
        x = _GAP
        for cell in row:
            if x + cell.width + _GAP > _WIDTH:
                x, y = _GAP, y + row[0].height + _GAP
            placed.append((cell, x, y))
            x += cell.width + _GAP
        y += row[0].height + 2 * _GAP
    sheet = Image.new("RGB", (_WIDTH, y), "white")
    if table:
        ImageDraw.Draw(sheet).multiline_text((_GAP, _GAP), table, "black", font, spacing=3)
    for cell, x, top in placed:
        sheet.paste(cell, (x, top))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _cell(batch: Batch, index: int, font: ImageFont.FreeTypeFont, line_height: int) -> Image.Image:
    picture = Image.fromarray(batch.images[index].permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_CELL, _CELL))
    (height, width), (top, left) = batch.original_size[index].tolist(), batch.crop[index].tolist()
    flipped = " flip" if "flip" in batch.fields and batch.fields["flip"][index] else ""
    cell = Image.new("RGB", (_CELL, picture.height + (1 + _LINES) * line_height), "white")
    cell.paste(picture, (0, 0))
    draw = ImageDraw.Draw(cell)
    draw.text((0, picture.height), f"{height}x{width} crop {top},{left}{flipped}", "gray", font)
    for i, line in enumerate(_wrap(batch.captions[index], font)):
        draw.text((0, picture.height + (i + 1) * line_height), line, "black", font)
    return cell


def _wrap(caption: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The caption's beginning in lines that fit a cell; broken anywhere, as not every language has spaces."""
    lines: list[str] = []
    rest = " ".join(caption.split())
    while rest and len(lines) < _LINES:
        length = len(rest)
        while font.getlength(rest[:length]) > _CELL:
            length -= 1
        if length < len(rest) and (space := rest.rfind(" ", 0, length + 1)) > 0:
            length = space
        lines.append(rest[:length])
        rest = rest[length:].lstrip()
    return lines
