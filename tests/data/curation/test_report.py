"""The report of a curation, by its content and by looking at its pictures' pixels."""

import io
import re

import numpy as np
import pyarrow.parquet as pq
from drawn import encoded, natural
from PIL import Image
from shard_files import write_tar
from test_curate import job

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
    assert "1 groups hold 2 samples" in markdown
    assert "| sharpness | undecodable picture | 1 |" in markdown and "| 11 | undecodable picture |" in markdown
    page = (out / "index.html").read_text()
    names = re.findall(r"\(pictures/(.*?)\)", markdown)
    assert {"histogram_2.png", "kept_2.png", "dropped_2.png", "duplicates_1.png"} <= set(names)
    assert page.count("<img") == len(names) and all((out / "pictures" / name).exists() for name in names)


def test_a_report_alone_needs_no_filters(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", encoded(natural(0, 40, 40)))])
    done = job(f"shards={tmp_path}", "filter=[]", f"report={tmp_path / 'out'}", "funnel.where=width > 50")
    assert done.returncode == 0, done.stderr
    assert "0 are kept by: width > 50" in (tmp_path / "out" / "report.md").read_text()
    bare = job(f"shards={tmp_path}", "filter=[]")
    assert bare.returncode == 2 and "filter=[sharpness" in bare.stderr
