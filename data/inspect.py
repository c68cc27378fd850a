"""What a run would train on, to look at before it starts: a sheet of real batches, and how full the buckets are."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.batch import Batch
from data.hashing import mix64
from data.plan import Plan
from models.layout import Layout

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
    (and "flip" where it is mirrored), what its fields say, and the beginning of its caption. Boxes are drawn into the
    picture, maps and further pictures beside it, several of a field (of neighbours) in a square.

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
                x, y = _GAP, y + max(cell.height for cell in row) + _GAP
            placed.append((cell, x, y))
            x += cell.width + _GAP
        y += max(cell.height for cell in row) + 2 * _GAP
    sheet = Image.new("RGB", (_WIDTH, y), "white")
    if table:
        ImageDraw.Draw(sheet).multiline_text((_GAP, _GAP), table, "black", font, spacing=3)
    for cell, x, top in placed:
        sheet.paste(cell, (x, top))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _cell(batch: Batch, index: int, font: ImageFont.FreeTypeFont, line_height: int) -> Image.Image:
    shown, words = _fields(batch, index)
    picture = Image.fromarray(batch.images[index].permute(1, 2, 0).contiguous().numpy())
    _draw_boxes(picture, [value for value in shown if isinstance(value, Layout)])
    picture = _beside([picture, *(_as_picture(value) for value in shown if isinstance(value, Tensor))])
    (height, width), (top, left) = batch.original_size[index].tolist(), batch.crop[index].tolist()
    flipped = " flip" if "flip" in batch.fields and batch.fields["flip"][index] else ""
    told = [line for word in words for line in _wrap(word, font)]
    width = max(_CELL, picture.width)
    cell = Image.new("RGB", (width, picture.height + (1 + len(told) + _LINES) * line_height), "white")
    cell.paste(picture, (0, 0))
    draw = ImageDraw.Draw(cell)
    draw.text((0, picture.height), f"{height}x{width} crop {top},{left}{flipped}", "gray", font)
    for i, line in enumerate([*told, *_wrap(batch.captions[index], font)]):
        draw.text((0, picture.height + (i + 1) * line_height), line, "black", font)
    return cell


def _fields(batch: Batch, index: int) -> tuple[list[Tensor | Layout], list[str]]:
    """Of a sample's fields, what is drawn and what is written."""
    shown: list[Tensor | Layout] = []
    words = []
    for name, values in batch.fields.items():
        value = values[index]
        if name == "flip" or value is None:
            continue
        if isinstance(value, Layout):
            shown.append(value)
            words.append(f"{name}: {' '.join(map(str, value.labels))}")
        elif isinstance(value, Tensor) and value.ndim == 0:
            words.append(f"{name}: {value.item():.4g}")
        elif isinstance(value, Tensor) and not value.is_floating_point():
            shown.append(value)
        elif isinstance(value, list):
            words.append(f"{name}: {' | '.join(map(str, value))}")
    return shown, words


def _draw_boxes(picture: Image.Image, layouts: Sequence[Layout]) -> None:
    draw = ImageDraw.Draw(picture)
    for layout in layouts:
        for label, (left, top, right, bottom) in zip(layout.labels, layout.boxes, strict=True):
            corners = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
            draw.rectangle([round(x) for x in corners], outline=_color(label))


def _as_picture(value: Tensor) -> Image.Image:
    """A picture (3, H, W) as it is, several (k, 3, H, W) in a square; a map (H, W) in a colour for each of its values,
    0 black and true white."""
    if value.ndim == 4:
        k, _, height, width = value.shape
        columns = math.ceil(math.sqrt(k))
        square = torch.zeros(columns * -(-k // columns), 3, height, width, dtype=value.dtype)
        square[:k] = value
        value = square.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    if value.ndim == 3:
        return Image.fromarray(value.permute(1, 2, 0).contiguous().numpy())
    palette = {number: (0, 0, 0) if number == 0 else _color(number) for number in value.unique().tolist()}
    palette |= {True: (255, 255, 255)} if value.dtype == torch.bool else {}
    pixels = np.array([palette[number] for number in value.flatten().tolist()], np.uint8)
    return Image.fromarray(pixels.reshape(*value.shape, 3))


def _color(number: int) -> tuple[int, int, int]:
    red, green, blue = (mix64(number, channel) % 192 + 64 for channel in range(3))
    return red, green, blue


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    for picture in pictures:
        picture.thumbnail((_CELL, _CELL))
    row = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width
    return row


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
