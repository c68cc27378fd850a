"""Fields of samples: taken from members and columns, moved with the picture, held against drawing by hand."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.batch import fuse
from data.buckets import BucketList, Square
from data.fields import Boxes, DrawnMask, Field, Label, LabelMap, Mask, Number, Picture
from data.masks import LargeMasks
from data.reader import BadSliceError
from data.tars import TarData, TarSplit
from models.layout import WHOLE, Layout
from tests.data.shard_files import write_shard

COLOURS = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)


def encoded(pixels: np.ndarray, mode: str | None = None, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, form)
    return file.getvalue()


def drawn(index: int, height: int, width: int) -> dict:
    """A picture with up to three coloured rectangles apart from each other; its boxes, its map of labels, its mask."""
    rng = np.random.default_rng(index)
    labels = np.zeros((height, width), np.uint8)
    boxes = []
    for label in (1, 2, 3):
        third = width // 3
        left, top = (label - 1) * third + int(rng.integers(third // 2)), int(rng.integers(height // 2))
        right, bottom = left + int(rng.integers(4, third // 2)), top + int(rng.integers(4, height // 2))
        labels[top:bottom, left:right] = label
        boxes.append({"bbox": [left, top, right - left, bottom - top], "category_id": label})
    return {
        "__key__": f"{index:03d}",
        "png": encoded(COLOURS[labels]),
        "seg.png": encoded(labels),
        "mask.png": encoded(np.where(labels == 2, 255, 0).astype(np.uint8)),
        "depth.png": encoded(COLOURS[labels][:, :, ::-1].copy()),
        "cls": str(index % 7).encode(),
        "json": {"boxes": boxes, "aesthetic": index / 10, "Kind": ["cat", "dog"][index % 2]},
    }


def every_field() -> dict[str, Field]:
    return {
        "class": Label(member="cls", classes=7),
        "kind": Label(column="kind", names=["dog", "cat"]),
        "score": Number(column="aesthetic"),
        "boxes": Boxes(column="boxes"),
        "map": LabelMap("seg.png"),
        "mask": Mask("mask.png"),
        "depth": Picture("depth.png"),
        "hole": DrawnMask(),
    }


def opened(folder: Path, fields: dict[str, Field], buckets=None, **options) -> TarSplit:
    data = {"workers": 0, "cache_folder": str(folder / "cache"), "fields": fields} | options
    return TarData({"drawn": {"shards": str(folder)}}, **data).open(buckets or Square(24))


def read(split: TarSplit, lanes: int = 1, size: int = 12, step: int = 0, **options):
    return split.loader(split.plan(lanes, size, seed=3), range(lanes), **options).step(step)


@pytest.mark.parametrize(("height", "width"), [(24, 60), (48, 120), (70, 90)])
def test_what_lies_in_a_picture_goes_where_the_picture_goes(tmp_path, height, width):
    write_shard(tmp_path / "0.tar", [drawn(i, height, width) for i in range(12)])
    (batch,) = read(opened(tmp_path, every_field(), flip=True))
    assert 0 < int(batch.fields["flip"].sum()) < 12
    kept = 0
    for i, key in enumerate(batch.keys):
        index = int(key)
        assert batch.fields["class"][i] == index % 7 and batch.fields["kind"][i] == 1 - index % 2
        assert batch.fields["score"][i].item() == pytest.approx(index / 10)
        picture, labels = batch.images[i], batch.fields["map"][i]
        assert torch.equal(batch.fields["mask"][i], labels == 2)
        assert torch.equal(batch.fields["depth"][i], picture.flip(0))
        shown = torch.from_numpy(COLOURS)[labels.long()].permute(2, 0, 1)
        off = (picture.float() - shown).abs().amax(0) > 130
        if height == 24:
            assert not off.any(), "without resizing, every pixel has its label's colour"
        assert off.float().mean() < 0.02, "but on edges, where one interpolates"
        layout: Layout = batch.fields["boxes"][i]
        assert set(layout.labels) >= set(labels.unique().tolist()) - {0}
        for label, box in zip(layout.labels, layout.boxes, strict=True):
            kept += 1
            rows, columns = (labels == label).nonzero(as_tuple=True)
            if len(rows) == 0:  # less than half a pixel is left of it
                assert min(box[2] - box[0], box[3] - box[1]) * 24 < 1
                continue
            by_hand = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            torch.testing.assert_close(torch.tensor(box) * 24, torch.stack(by_hand).float(), atol=0.6, rtol=0)
        left, top, right, bottom = layout.crop
        scale = 24 / min(height, width)
        assert (right - left, bottom - top) == pytest.approx((24 / round(width * scale), 24 / round(height * scale)))
        assert left * round(width * scale) == pytest.approx(batch.crop[i, 1].item())
    assert kept < 36, "some boxes lie outside"


def test_fields_are_the_same_whoever_reads_them_and_pass_between_processes(tmp_path):
    write_shard(tmp_path / "0.tar", [drawn(i, 30 + i, 60) for i in range(24)])
    split = opened(tmp_path, every_field(), flip=True)
    whole = fuse(read(split, lanes=4, size=4))
    for other in (fuse(read(split, lanes=4, size=4, workers=2)), fuse([*whole.split(3)])):
        assert other.keys == whole.keys and other.fields["boxes"] == whole.fields["boxes"]
        for name, values in whole.fields.items():
            assert name == "boxes" or torch.equal(other.fields[name], values), name
    assert pickle.loads(pickle.dumps(whole.fields["boxes"])) == whole.fields["boxes"]
    holes = [fuse(read(split, lanes=4, size=4, step=step)).fields["hole"] for step in (0, 1)]
    assert torch.equal(holes[0], whole.fields["hole"]) and not torch.equal(holes[0], holes[1])
    assert len({tuple(hole.flatten().tolist()) for hole in holes[0]}) > 12


def without(name: str):
    return lambda sample: sample.pop(name)


def told(**values):
    return lambda sample: sample["json"].update(values)


def put(name: str, payload: bytes):
    return lambda sample: sample.update({name: payload})


BAD = {
    "no class": (without("cls"), "no .cls among its members"),
    "no number": (put("cls", b"tabby"), "its .cls is 'tabby', which is no class"),
    "class too large": (put("cls", b"7"), "its .cls is '7', which is no class"),
    "no boxes": (told(boxes=None), "it has no 'boxes'"),
    "half a box": (told(boxes=[{"bbox": [1, 2], "category_id": 1}]), "without four numbers as its 'bbox'"),
    "label of another kind": (told(boxes=[[1, 2, 3, 4, "x"]]), "its 'boxes' is 'x', which is no class"),
    "unknown name": (told(Kind="bird"), "its 'kind' is 'bird', which is no class"),
    "map undecodable": (put("seg.png", b"x" * 40), "cannot decode map of 40 bytes"),
    "map in colours": (put("seg.png", encoded(np.zeros((30, 60, 3), np.uint8))), "a map of labels is grey"),
    "map of another shape": (put("seg.png", encoded(np.zeros((30, 40), np.uint8))), "another shape than its picture"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_missing_or_bad_field_is_an_error_of_content(tmp_path, fault):
    change, reason = BAD[fault]
    samples = [drawn(i, 30, 60) for i in range(4)]
    change(samples[2])
    write_shard(tmp_path / "0.tar", samples)
    split = opened(tmp_path, every_field())
    loader = split.loader(split.plan(1, 4, seed=3), range(1))
    (batch,) = loader.step(0)
    (line,) = loader.drain().quarantine
    assert line.key == "002" and reason in line.reason and line.replaced_by in batch.keys
    assert "002" not in batch.keys
    for sample in samples:
        change(sample) if sample is not samples[2] else None
    write_shard(tmp_path / "all" / "0.tar", samples)
    with pytest.raises((BadSliceError, ValueError)):
        read(opened(tmp_path / "all", every_field()), size=4)


def test_fields_of_sources_and_configurations_that_cannot_be(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", [drawn(i, 30, 60) for i in range(4)])
    write_shard(tmp_path / "b" / "0.tar", [drawn(i, 30, 60) for i in range(4)])
    sources = {"a": {"shards": str(tmp_path / "a")}, "b": {"shards": str(tmp_path / "b")}}
    sources["b"]["fields"] = {"class": Label(column="Aesthetic")}
    options = {"workers": 0, "cache_folder": str(tmp_path / "cache"), "fields": {"class": Label(member="cls")}}
    split = TarData(sources, **options).open(BucketList([[24, 24]]))
    assert split.reader(0).sources[1].fields["class"].columns == ["aesthetic_score"]
    sources["b"]["fields"] = {"class": LabelMap("seg.png")}
    with pytest.raises(ValueError, match=r"data.sources.b.fields: all sources must have the same kinds"):
        TarData(sources, **options)
    with pytest.raises(ValueError, match=r"there is no column for a field, 'nowhere'; the columns are"):
        opened(tmp_path / "a", {"x": Number(column="nowhere")})
    (batch,) = read(opened(tmp_path / "a", {"x": Number(column="nowhere", default=5.0)}), size=2)
    assert batch.fields["x"].tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match="of a `column`"):
        Label()


def test_values_from_a_command_line_are_those_of_the_tar(tmp_path):
    for name, payload in drawn(3, 24, 48).items():
        if isinstance(payload, bytes):
            (tmp_path / name).write_bytes(payload)
    labels = LabelMap("seg.png").given(str(tmp_path / "seg.png"), (24, 24))
    assert torch.equal(Mask("m").given(str(tmp_path / "mask.png"), (24, 24)), labels == 2)
    assert torch.equal(DrawnMask().given(str(tmp_path / "mask.png"), (24, 24)), labels == 2)
    assert Label(member="cls", names=["a", "b"]).given("b", (8, 8)) == 1
    boxes = Boxes(column="boxes", relative=True, form="xyxy")
    layout = Layout((4, 5), ((0.0, 0.25, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)), WHOLE)
    text = '[{"bbox": [-0.5, 0.25, 0.5, 2], "category_id": 4}, [0.5, 0, 1, 1, 5], [2, 2, 3, 3, 6]]'
    (tmp_path / "boxes.json").write_text(text)
    assert boxes.given(text, (24, 24)) == boxes.given(str(tmp_path / "boxes.json"), (24, 24)) == layout
    with pytest.raises(ValueError, match="no class"):
        Label(member="cls").given("b", (8, 8))


def test_large_masks_hide_as_much_as_the_papers_at_any_size():
    for side in (64, 256):
        masks = np.stack([LargeMasks().draw(side, side, seed) for seed in range(300)])
        hidden = masks.mean((1, 2))
        assert 0.2 < hidden.mean() < 0.45 and hidden.min() > 0 and hidden.std() > 0.1
    boxes = np.stack([LargeMasks(chains=0).draw(256, 200, seed) for seed in range(100)])
    edge = int(200 / 256 * 10)
    assert not boxes[:, :edge].any() and not boxes[:, :, :edge].any() and not boxes[:, -edge:].any()
