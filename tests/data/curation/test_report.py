"""The report of a curation, by its content and by looking at its pictures' pixels."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn import encoded, natural
from moto.server import ThreadedMotoServer
from PIL import Image, ImageDraw
from shard_files import write_tar
from test_curate import job

from data.curate import curate
from data.curation.blank import Blank
from data.curation.duplicates import Duplicates
from data.curation.hashes import ContentHash
from data.curation.report import make_report
from data.curation.sheets import TILE, Sheets
from data.index import ensure_indexed
from data.scores import score_url
from data.store import Store

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def test_a_sheet_shows_the_samples_asked_for_in_their_order(tmp_path):
    flat = [np.full((60, 60, 3), color, np.uint8) for color in COLORS]
    write_tar(tmp_path / "0.tar", [(f"{i}.png", encoded(flat[i])) for i in range(2)])
    write_tar(tmp_path / "1.tar", [("2.png", encoded(flat[2])), ("3.png", b"no picture")])
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    places = [(1, 0), (0, 1), (0, 0), (1, 1)] * 2
    sheet = np.array(Image.open(io.BytesIO(Sheets(manifests, store).draw(places, [str(i) for i in range(8)]))))
    height = sheet.shape[0] // 2
    assert sheet.shape[1] == 6 * TILE
    middles = [sheet[i // 6 * height + TILE // 4, i % 6 * TILE + TILE // 2].tolist() for i in range(8)]
    assert middles == [list(COLORS[2]), list(COLORS[1]), list(COLORS[0]), [255] * 3] * 2


def test_the_report_follows_the_clause_and_lists_duplicates_and_errors(tmp_path):
    pictures = [encoded(natural(i, 60, 80), 90) for i in range(30)]
    pictures[7] = pictures[3]
    pictures[11] = pictures[11][: len(pictures[11]) // 2]
    for shard in range(2):
        members = [(f"{i:02d}.jpg", pictures[i]) for i in range(shard, 30, 2)]
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    out = tmp_path / "out"
    done = job(
        f"shards={tmp_path}/shards",
        "filter=[sharpness,duplicates]",
        f"report={out}",
        "funnel.where=duplicate_rank = 0 and sharpness > quantile(0.5)",
    )
    assert done.returncode == 0, done.stderr
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path / "shards")), store)
    sharpness = [v for m in manifests for v in pq.read_table(score_url(m.url, "sharpness"))["sharpness"].to_pylist()]
    threshold = sorted(v for v in sharpness if v is not None)[14]
    markdown = (out / "report.md").read_text()
    table = re.findall(r"\| (.*?) \| (.*?) \| (\d+) .*?\| (\d+) .*?\| (\d+) ", markdown)
    assert table[0] == ("duplicate_rank = 0", "0", "1", "1", "29") or table[0][2:] == ("1", "1", "29")
    text, shown, alone, after, left = table[1]
    assert text == "sharpness > quantile(0.5)" and float(shown) == float(f"{threshold:.5g}")
    assert int(alone) == 16 and int(after) + int(left) == 29  # the one that cannot be decoded is not kept
    assert "| 1 | 2 | 1 |" in markdown and "duplicate_rank = 0" in markdown
    assert "| sharpness | undecodable picture | 1 |" in markdown and "| 11 | undecodable picture |" in markdown
    names = re.findall(r"\(pictures/(.*?)\)", markdown)
    assert {"histogram_2.png", "kept_2.png", "dropped_2.png", "duplicates_1.png"} <= set(names)
    shown = pictures_of((out / "index.html").read_text())
    assert [data for data, _ in shown] == [(out / "pictures" / name).read_bytes() for name in names]
    assert all(text and Image.open(io.BytesIO(data)).size > (TILE, TILE) for data, text in shown)


def pictures_of(page: str) -> list[tuple[bytes, str]]:
    """What a browser shows of a page's pictures, none of which may lie elsewhere; and the texts in their place."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "img":
                told = dict(attributes)
                start, data = told["src"].split(",")
                assert start == "data:image/png;base64"
                found.append((base64.b64decode(data, validate=True), told["alt"]))

    Parser().feed(page)
    return found


def test_groups_are_shown_with_their_keys_and_the_best_first(tmp_path, monkeypatch):
    small = natural(1, 60, 80)
    write_tar(tmp_path / "0.tar", [("small.png", encoded(small)), ("other.png", encoded(natural(2, 60, 80)))])
    write_tar(tmp_path / "1.tar", [("again.png", encoded(small)), ("copy.png", encoded(small))])
    write = ImageDraw.ImageDraw.text
    lines: list[str] = []

    def noted(brush: ImageDraw.ImageDraw, place: tuple, text: str, **options) -> None:
        lines.append(text)
        write(brush, place, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, [ContentHash(), Duplicates(distance=None)], store)
    make_report(manifests, store)
    assert lines == ["small", "rank 0", "again", "rank 1", "copy", "rank 2"]
    write_tar(tmp_path / "2.tar", [("a" * 50 + "1.png", encoded(small))])
    lines.clear()
    manifests = ensure_indexed([str(tmp_path / "2.tar")], store)
    Sheets(manifests, store).draw([(0, 0)], ["x"])
    assert lines[0].startswith("...aaaaa") and lines[0].endswith("a1")


@pytest.mark.parametrize("changed", [0, 1])
def test_filters_that_some_shards_lack_are_told_and_keep_no_others_from_the_page(tmp_path, changed):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.png", encoded(natural(shard, 40, 40)))])
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, [ContentHash(), Duplicates(distance=None)], store)
    write_tar(tmp_path / f"{changed}.tar", [("new.png", encoded(natural(5, 40, 40)))])
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, [Blank()], store)
    page = make_report(manifests, store, "contrast > 1").write(str(tmp_path / "report"), store)
    told = Path(page).with_name("report.md").read_text()
    assert "| duplicates | 1 | 2 |" in told and "| content_hash | 1 | 2 |" in told and "Groups of" not in told
    assert "| blank |" not in told


def test_a_report_goes_to_an_object_store_and_not_to_the_web(tmp_path, monkeypatch):
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setitem(os.environ, f"AWS_{name}", value)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    shard = write_tar(tmp_path / "0.tar", [(f"{i}.png", encoded(natural(i, 40, 40))) for i in range(2)])
    client.put_object(Bucket="bucket", Key="curate/0.tar", Body=shard.read_bytes())
    command = ["shards=s3://bucket/curate", f"store.storage_options={{s3: {{endpoint_url: '{endpoint}'}}}}"]
    done = job(*command, "filter=[blank]", "report=s3://bucket/report", "funnel.where=contrast > 1")
    assert done.returncode == 0, done.stderr
    assert "report: s3://bucket/report/index.html" in done.stdout
    page = client.get_object(Bucket="bucket", Key="report/index.html")["Body"].read().decode()
    assert len(pictures_of(page)) == 2
    server.stop()
    refused = job(*command, "filter=[]", "report=https://somewhere/report")
    assert refused.returncode == 2 and "report=https://somewhere/report cannot be written" in refused.stderr


def test_a_report_alone_needs_no_filters(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", encoded(natural(0, 40, 40)))])
    done = job(f"shards={tmp_path}", "filter=[]", f"report={tmp_path / 'out'}", "funnel.where=width > 50")
    assert done.returncode == 0, done.stderr
    assert "0 are kept by: width > 50" in (tmp_path / "out" / "report.md").read_text()
    bare = job(f"shards={tmp_path}", "filter=[]")
    assert bare.returncode == 2 and "filter=[sharpness" in bare.stderr
