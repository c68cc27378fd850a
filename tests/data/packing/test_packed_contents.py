"""What changes on the way when it is asked for: pictures, captions, scores."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.index import ensure_indexed
from data.scores import write_scores
from data.store import Store
from tests.data.packing.packed import epoch, in_tar, photo, run
from tests.data.shard_files import picture, sample, write_shard


def test_pictures_are_resized_and_encoded_anew(tmp_path):
    made = [sample(i) | {"jpg": photo(96 + 8 * i, 64 + 16 * i, i)} for i in range(8)]
    png = io.BytesIO()
    Image.open(io.BytesIO(photo(80, 50, 99))).save(png, "PNG")
    made.append({"__key__": "png", "png": png.getvalue(), "txt": "a png"})
    made.append({"__key__": "tiny", "jpg": picture(20, 18), "txt": "small enough"})
    write_shard(tmp_path / "in" / "0.tar", made)
    given = f"data.sources.x.shards={tmp_path / 'in'}"
    assert run(f"out={tmp_path / 'out'}", "short_side=32", "quality=98", given) == 0
    packed = in_tar(tmp_path / "out")
    assert packed["tiny"]["jpg"] == made[-1]["jpg"]
    for one in made[:8]:
        new = packed[one["__key__"]]
        before, after = Image.open(io.BytesIO(one["jpg"])), Image.open(io.BytesIO(new["jpg"]))
        assert after.format == "JPEG" and min(after.size) == 32
        assert abs(max(after.size) - max(before.size) * 32 / min(before.size)) <= 0.5
        fields = json.loads(new["json"])
        assert (fields["width"], fields["height"]) == after.size
        assert (fields["original_width"], fields["original_height"]) == before.size
        assert {k: fields[k] for k in one["json"]} == one["json"]
    assert Image.open(io.BytesIO(packed["png"]["png"])).size == (51, 32)
    for one in made[:8]:  # as Pillow would resize it, but for what encoding costs
        pillow = Image.open(io.BytesIO(one["jpg"]))
        after = Image.open(io.BytesIO(packed[one["__key__"]]["jpg"]))
        difference = np.asarray(pillow.resize(after.size, Image.Resampling.BICUBIC)).astype(float) - np.asarray(after)
        assert np.abs(difference).mean() < 2
    # another format: all but those that have it already
    assert run(f"out={tmp_path / 'webp'}", "format=webp", given) == 0
    for one in in_tar(tmp_path / "webp").values():
        assert Image.open(io.BytesIO(one["webp"])).format == "WEBP" and not one.keys() & {"jpg", "png"}
    # and the tensors that training gets are the same but for what encoding costs
    expected, found = epoch({"x": {"shards": str(tmp_path / "in")}}), epoch({"x": {"shards": str(tmp_path / "webp")}})
    assert expected.keys() == found.keys() == in_tar(tmp_path / "in").keys()
    errors = {key: (found[key][0].float() - expected[key][0].float()).abs().mean().item() for key in found}
    assert max(error for key, error in errors.items() if key != "tiny") < 3, errors  # noise does not survive encoding
    assert run(f"out={tmp_path / 'jpg'}", "format=jpg", given) == 0
    assert in_tar(tmp_path / "jpg")["000003"]["jpg"] == made[3]["jpg"]


def test_captions_and_scores_travel_in_txt_and_json(tmp_path):
    made = [sample(i) for i in range(6)]
    for one in made:
        one["json"] |= {"long": f"long {one['json']['index']}" if one["json"]["index"] else "", "AESTHETIC_SCORE": 1.0}
    del made[5]["json"]
    path = write_shard(tmp_path / "in" / "0.tar", made)
    store = Store()
    [manifest] = ensure_indexed([str(path)], store)
    scores = pa.table(
        {"taste": [0.5, float("nan"), 2.5, None, 4.5, 5.5], "vector": [[float(i), 1.0] for i in range(6)]}
    )
    write_scores(manifest, "taste", scores, store)
    given = [f"data.sources.x.shards={tmp_path / 'in'}", "columns=[taste,vector,aesthetic_score]"]
    assert run(f"out={tmp_path / 'one'}", "data.sources.x.caption=long", *given) == 0
    packed = in_tar(tmp_path / "one")
    assert [packed[f"{i:06d}"]["txt"].decode() for i in range(6)] == ["", "long 1", "long 2", "long 3", "long 4", ""]
    fields = [json.loads(packed[f"{i:06d}"]["json"]) for i in range(6)]
    assert [f["taste"] for f in fields] == [0.5, None, 2.5, None, 4.5, 5.5]
    assert [f["vector"] for f in fields] == [[float(i), 1.0] for i in range(6)]
    own = {name: value for name, value in made[2]["json"].items() if name != "AESTHETIC_SCORE"}
    assert fields[2] == own | {"taste": 2.5, "vector": [2.0, 1.0], "aesthetic_score": 1.0}
    assert [f.get("aesthetic_score") for f in fields] == [1.0] * 5 + [None]
    # in the packed shard they are columns: of the manifest, of the table, and so for a where clause
    assert (
        run(f"out={tmp_path / 'two'}", f"data.sources.y.shards={tmp_path / 'one'}", "data.sources.y.where=taste > 2")
        == 0
    )
    assert sorted(in_tar(tmp_path / "two")) == ["000002", "000004", "000005"]
    table = pq.read_table(tmp_path / "one" / "00000.parquet")
    assert table.schema.field("taste").type == pa.float64() and "vector" in table.column_names
    # a mix of captions is drawn from the packed form as from the selection
    mix = {"caption": 0.5, "long": 0.5}
    assert run(f"out={tmp_path / 'mix'}", "data.sources.x.caption={caption: 0.5, long: 0.5}", given[0]) == 0
    packed = in_tar(tmp_path / "mix")
    assert packed["000003"]["txt"] == b"caption 3" and json.loads(packed["000003"]["json"])["long"] == "long 3"
    drawn = epoch({"x": {"shards": str(tmp_path / "mix"), "caption": mix}})
    assert set(drawn) == set(packed) and any(c.startswith("long") for _, c in drawn.values())
