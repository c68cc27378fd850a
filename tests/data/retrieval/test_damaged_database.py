"""Files of a database are damaged at random: each is refused by its name, or answers are right; what the error says
mends it."""

import re
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from shard_files import picture, write_tar

import data.retrieve
from conf.errors import ConfigError
from data.retrieval.database import Database, read_told
from data.retrieval.index import Searcher
from data.retrieval.marks import mark_at
from tests.data.curation.tiny_models import save_clip
from tools.cli import execute

ROWS = 15


class Made:
    """A database of two sides with an index of cells, what it answers, and the settings that made it."""

    def __init__(self, folder: Path) -> None:
        self.folder, shards = folder / "db", folder / "shards"
        for i in range(3):
            members = []
            for name in (f"{i}{n}" for n in range(ROWS // 3)):
                members.append((f"{name}.png", picture(30, 40, form="PNG", seed=int(name))))
                members.append((f"{name}.txt", f"caption {name}".encode()))
            write_tar(shards / f"{i:05d}.tar", members)
        self.settings = [f"embedding.model={save_clip(folder / 'clip')}", "embedding.texts=true", "log.wandb=null"]
        self.settings += ["index.kind=ivf_flat", "index.cells=3", "index.recall=1.0", f"runs={folder}/runs"]
        self.shards = f"shards={shards}"
        assert execute(["retrieve", f"database={self.folder}", self.shards, *self.settings]) == 0
        self.answers = answers(self.folder)


def answers(folder: Path) -> list[Any]:
    database = Database(folder)
    everything = np.arange(database.rows)
    told: list[Any] = [database.metadata(everything.tolist())]
    for side in database.sides:
        vectors = database.vectors(everything, side)
        told += [side, vectors.tobytes(), *(a.tobytes() for a in Searcher(database, side)(vectors, 4))]
    return told


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


def damage(kind: str, path: Path, others: list[Path], random: np.random.Generator) -> list[Path]:
    """The files that are no longer what they were."""
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: random.integers(len(content))])
    elif kind == "flip":
        for place in random.integers(len(content), size=random.integers(1, 9)):
            content[place] ^= int(random.integers(1, 256))
        path.write_bytes(content)
    elif kind == "replace":
        path.write_bytes(random.bytes(random.choice([0, 8, len(content), 2 * len(content)])))
    else:
        other = others[random.integers(len(others))]
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return [path, other]
    return [path]


@pytest.mark.parametrize("kind", ["delete", "truncate", "flip", "replace", "swap"])
def test_damage_is_refused_by_name_and_mended_by_the_command_that_is_named(made, tmp_path, kind, capsys):
    refused = 0
    for seed in range(8):
        folder = shutil.copytree(made.folder, tmp_path / f"{kind}{seed}")
        random = np.random.default_rng(seed)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        at_large = [path for path in files if path.suffix == ".index" or path.name == "database.json"]
        path = (at_large if seed % 2 else files)[random.integers(len(at_large if seed % 2 else files))]
        damaged = damage(kind, path, [one for one in files if one != path], random)
        try:
            assert answers(folder) == made.answers
        except ConfigError as error:
            refused += 1
            assert any(str(path.relative_to(folder)) in str(error) for path in damaged), (seed, damaged, error)
            (command,) = re.findall(r"run `millrace (retrieve database=\S+ shards=)\.\.\.` again", str(error))
            line = command.replace("shards=", made.shards).split()
            assert execute([*line, *made.settings]) == 0, (seed, damaged, capsys.readouterr().err)
            assert answers(folder) == made.answers, (seed, damaged)
    assert refused >= 7  # a flip may hit nothing that is read


def test_an_index_of_others_that_is_cut_off_is_refused(made, tmp_path):
    """There are no marks of it."""
    folder = shutil.copytree(made.folder, tmp_path / "db")
    (folder / "database.json").unlink()
    shutil.rmtree(folder / "metadata")
    assert len(Searcher(Database(folder))(Database(folder).vectors(np.arange(2)), 3)[0]) == 2
    whole = (folder / "image.index").read_bytes()
    (folder / "image.index").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"image\.index is damaged .*write it anew with clip-retrieval"):
        Searcher(Database(folder))


def test_marks_see_size_ends_and_pages_between(tmp_path):
    path = tmp_path / "large"
    content = bytearray(np.random.default_rng(0).bytes(1 << 20))
    path.write_bytes(content)
    mark = mark_at(path)
    seen = []
    for place in (0, 65535, 65536, 70000, len(content) - 65537, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        seen.append(mark_at(path) != mark)
    assert seen == [True, True, True, False, True, True]  # 70,000 lies between two pages
    path.write_bytes(content)
    assert mark_at(path) == mark != mark_at(path, 1 << 17) and mark_at(tmp_path / "none") == ""
    path.write_bytes(content[:-1])
    assert mark_at(path).split("-")[0] == str((1 << 20) - 1)


def test_an_index_that_was_put_in_its_place_and_not_told_of_is_not_taken_for_the_one_before(
    made, tmp_path, monkeypatch
):
    folder = shutil.copytree(made.folder, tmp_path / "db")
    line = ["retrieve", f"database={folder}", made.shards, *made.settings]
    write, killed = data.retrieve.write_told, []

    def die(folder, told):
        if "image" in told["indexes"] and told["indexes"]["image"]["cells"] == 2:
            killed.append(told)
            raise KeyboardInterrupt
        write(folder, told)

    monkeypatch.setattr(data.retrieve, "write_told", die)
    assert execute([*line, "index.cells=2"]) != 0 and killed
    monkeypatch.undo()
    index = folder / "image.index"
    assert faiss.read_index(str(index)).nlist == 2 and "image" not in read_told(folder)["indexes"]
    with pytest.raises(ConfigError, match=r"image\.index is none that .*database\.json tells of: run `millrace"):
        Searcher(Database(folder))
    assert execute(line) == 0
    assert faiss.read_index(str(index)).nlist == 3 and answers(folder) == made.answers
