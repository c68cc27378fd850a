"""The `retrieve` job: a database of embeddings of shards, an index over it, the neighbours of samples, and answers.

Three steps, each shared by tasks and each going on where it was stopped: embed every shard, build the indexes, find the
neighbours. The files are clip-retrieval's (see `data.retrieval.database`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, mistakes
from data.index import ensure_indexed
from data.manifest import Manifest
from data.parquet import told_at
from data.retrieval.database import (
    SIDES,
    VERSION,
    Database,
    Side,
    embedding_path,
    index_path,
    local_folder,
    metadata_path,
    read_told,
    told_path,
    write_told,
)
from data.retrieval.embedding import Embedding, PartWriter, part_names
from data.retrieval.index import IndexBuilder, IndexSettings, Searcher
from data.retrieval.neighbours import OwnRows, due, find_neighbours, recipe_of
from data.store import Store, redact, remove_leftovers
from data.tasks import Tasks, run_tasks
from data.tracking import LogConfig, RunLog, job_log


@dataclass
class Config:
    """What `millrace retrieve` takes.

    Args:
        database: its folder.
        shards: that it is made of (patterns, see `Store.expand`); null: it is there.
        embedding: how pictures become embeddings.
        index: what indexes are to be.
        neighbours_of: shards whose samples get a column of neighbours; null: none.
        column: its name.
        k: how many neighbours.
        without_itself: leave out of a sample's neighbours its own picture, and patches of it.
        query: a text, or a picture's file, whose `k` nearest pictures a contact sheet shows; null: none.
        out: that sheet, a PNG.
        report: a folder, or URL of one, for a page of neighbours of random samples, recall and latency; null: none.
        dry_run: tell what the index would take, from smaller ones that are built and measured, and stop.
        rows: that a dry run tells of; null: those of the shards, or of the database.
        width: of the embeddings that a dry run tells of; null: of the database's, or the model's.
        trial: rows of the largest index that a dry run builds.
        cluster: tasks that share the work.
        manifest_folder: where manifests go; beside the shards if null.
        max_errors: share of a shard's samples that may lack a picture that can be embedded.
        store: where shards lie.
        name: of the run, which writes what it tells of itself to <runs>/<name>.
        runs: folder of runs.
        log: whether in W&B too.
    """

    database: str
    embedding: Embedding
    shards: str | list[str] | None = None
    index: IndexSettings = field(default_factory=IndexSettings)
    neighbours_of: str | list[str] | None = None
    column: str = "neighbours"
    k: int = 20
    without_itself: bool = False
    query: str | None = None
    out: str = "retrieved.png"
    report: str | None = None
    dry_run: bool = False
    rows: int | None = None
    width: int | None = None
    trial: int = 50_000
    cluster: Tasks = field(default_factory=Tasks)
    manifest_folder: str | None = None
    max_errors: float = 0.1
    store: Store = field(default_factory=Store)
    name: str = "retrieve"
    runs: str = "runs"
    log: LogConfig = field(default_factory=LogConfig)


def run(config: Config) -> None:
    """Do what is not done of the three steps, and say what there is.

    Raises:
        ConfigError: there is nothing to do, no shards, or settings that do not go together.
        ValueError: too many samples of a shard cannot be embedded.
        StoreError: a store fails.
    """
    from conf.schema import build

    started = time.perf_counter()
    with mistakes():
        tasks = Tasks(config.cluster.tasks, config.cluster.task)
        embedding, settings, store = build(config.embedding), build(config.index), build(config.store)
        if config.dry_run:
            print(_forecast(config, embedding, settings, store))
            return
        if not any((config.shards, config.neighbours_of, config.query, config.report)):
            raise ConfigError("there is nothing to do: give shards=, neighbours_of=, query= or report=")
        if not 0 <= config.max_errors <= 1 or config.k < 1:
            raise ConfigError(f"max_errors={config.max_errors} is a share, and k={config.k} at least 1")
        folder = local_folder(config.database)
        made_of = _manifests(config.shards, store, config.manifest_folder)
        asked = _manifests(config.neighbours_of, store, config.manifest_folder)
    with job_log(config, tasks.part) as log:
        if made_of:
            make_database(made_of, folder, embedding, settings, store, config.max_errors, tasks, log)
        whole = tasks.task is None or not made_of
        if asked and whole:
            with mistakes():
                database = Database(folder)
                one = replace(embedding, patches=None, texts=False)
                database.check_model(one.fingerprint(), one.model)
                if config.k > database.rows:
                    raise ConfigError(f"k={config.k} neighbours of a database of {database.rows} rows: choose fewer")
                own = OwnRows(database) if config.without_itself else None
                is_due = due(asked, config.column, recipe_of(database, one, config.k, own is not None), store)
            work = partial(find_neighbours, asked, is_due, database, one, config.column, config.k, own, store)
            run_tasks(work, tasks, tasks.totals([m.rows for m in asked]), "neighbours", log)
        if whole and (config.query or config.report):
            with mistakes():
                _show(config, Database(folder), embedding, store, log)
    if whole:
        print(summary(Database(folder), asked, config.column, time.perf_counter() - started))
    else:
        print("the shards of this task are embedded: the same command without cluster.task builds the index")


def _forecast(config: Config, embedding: Embedding, settings: IndexSettings, store: Store) -> str:
    """What the index would take, told from rows of the database, or of clusters where there is none yet."""
    from data.retrieval.forecast import clustered, forecast, rows_of

    folder, patches = local_folder(config.database), embedding.patches
    database = Database(folder) if (folder / "img_emb").is_dir() else None
    each = patches.per_picture if patches is not None else 1
    of_shards = each * sum(m.rows for m in _manifests(config.shards, store, config.manifest_folder))
    rows = config.rows or of_shards or (database.rows if database is not None else 0)
    if rows < 1 or config.trial < 1:
        raise ConfigError("dry_run=true tells of rows=..., of shards=... or of a database, with a positive trial")
    if database is not None:
        width = database.width
        if config.width not in (None, width):
            raise ConfigError(f"width={config.width}, and the database {folder} has embeddings of {width} numbers")
        told = forecast(rows, width, settings, rows_of(database), config.trial)
    else:
        width = config.width or embedding.width()
        told = forecast(rows, width, settings, lambda n: clustered(n, width, max(1, n // 100)), config.trial)
    of = f"rows of {folder}" if database is not None else "100 rows around each of random centres: there is no database"
    disk = 2 * rows * width / (1 << 30)
    return f"{told}\nmeasured on {of}; the embeddings take {disk:.2f} GiB on disk"


def _show(config: Config, database: Database, embedding: Embedding, store: Store, log: RunLog) -> None:
    """Answer the query, write the page."""
    from data.retrieval.looking import Shelf, answer, page

    if config.query:
        database.check_model(embedding.fingerprint(), embedding.model)
        searcher = Searcher(database)
        try:
            ids, similarities = answer(config.query, searcher, embedding, min(config.k, database.rows))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"query: {error}") from error
        texts = [f"{similarity:.3f}" for similarity in similarities.tolist()]
        png = Shelf(database, store, config.manifest_folder).draw(ids.tolist(), texts)
        store.write(config.out, png)
        log.log_image("query", png, database.rows, config.query)
        print(f"the nearest to {config.query!r}: {config.out}")
    if config.report:
        made = page(database, database.sides, store, config.k, config.manifest_folder, seed=0)
        print(f"report: {redact(made.write(config.report, store))}")
        made.show(log, database.rows)


def make_database(
    manifests: Sequence[Manifest],
    folder: Path,
    embedding: Embedding,
    settings: IndexSettings,
    store: Store,
    max_errors: float,
    tasks: Tasks,
    log: RunLog | None = None,
) -> None:
    """Bring a database and its indexes up to date. A single task of several embeds its shards, and no more.

    Raises:
        ConfigError: an index that does not fit its memory, or a folder that holds what Millrace did not write.
        ValueError: too many samples of a shard cannot be embedded.
    """
    _refuse_others(folder)
    for inside in (folder, *(path for path in folder.glob("*") if path.is_dir())):
        remove_leftovers(str(inside))
    recipe, names = embedding.recipe(), part_names(len(manifests))
    known = _known(folder)
    writer = PartWriter(folder, embedding, store, max_errors, known.get("files", {}))
    if not all(writer.is_done(m, name) for m, name in zip(manifests, names, strict=True)):
        for m, name in zip(manifests, names, strict=True):
            writer.discard_damaged(m, name)
        for side in SIDES:
            index_path(folder, side).unlink(missing_ok=True)  # they are of the parts that there were
        known = {"version": VERSION, "unfinished": True}
        write_told(folder, known)
        writer = replace(writer, marks={})
        run_tasks(partial(writer.write_all, manifests), tasks, tasks.totals([m.rows for m in manifests]), "embed", log)
    if tasks.task is not None:
        return
    _remove_others(folder, names, embedding.sides)
    told: dict[str, Any] = {
        "version": VERSION,
        "model": recipe["model"],
        "model_name": str(Path(embedding.model).resolve()) if Path(embedding.model).is_dir() else embedding.model,
        "recipe": recipe,
        "parts": [[name, m.digest] for name, m in zip(names, manifests, strict=True)],
        "files": {path: mark for name in names for path, mark in writer.files(name).items()},
        "indexes": known.get("indexes", {}),
    }
    write_told(folder, told)
    for side in embedding.sides:
        with mistakes():
            builder = IndexBuilder(Database(folder), side, settings)
        if not builder.done:
            # An index that is put in its place, and not told of yet, must not be taken for the one that was.
            told["indexes"] = {of: one for of, one in told["indexes"].items() if of != side}
            write_told(folder, told)
            index_path(folder, side).unlink(missing_ok=True)
            builder.train(tasks.tasks)
            rows = [sum(part.rows for part in block) for block in builder.blocks]
            run_tasks(builder.add, Tasks(tasks.tasks), Tasks(tasks.tasks).totals(rows), f"index of {side}s", log)
            told["indexes"] = {**told["indexes"], side: builder.finish(tasks.tasks)}
            write_told(folder, told)
        builder.clean()


def summary(database: Database, asked: Sequence[Manifest], neighbours: str, seconds: float) -> str:
    """What there is, for people."""
    lines = [f"{database.folder}: {database.rows} embeddings of {database.width} numbers, {seconds:.1f} s"]
    for side, index in database.told.get("indexes", {}).items():
        searched = ", ".join(f"{key} {value}" for key, value in index["search"].items())
        lines.append(
            f"  {side}.index: {index['factory']}, {index['bytes'] / (1 << 30):.2f} GiB, recall {index['recall']:.3f}"
            + (f" with {searched}" if searched else "")
            + (f", less than the {index['asked']} asked for" if index["recall"] < index["asked"] else "")
        )
    if asked:
        lines.append(f"  column {neighbours!r} beside {len(asked)} shards, {sum(m.rows for m in asked)} samples")
    return "\n".join(lines)


def _manifests(patterns: str | list[str] | None, store: Store, folder: str | None) -> list[Manifest]:
    if patterns is None:
        return []
    return ensure_indexed(store.expand([patterns] if isinstance(patterns, str) else list(patterns)), store, folder)


def _known(folder: Path) -> dict[str, Any]:
    """What the database tells of itself; nothing where that is damaged, which is mended."""
    try:
        return read_told(folder)
    except ConfigError:
        return {}


def _refuse_others(folder: Path) -> None:
    """Refuse to write over what is not ours."""
    metadata = sorted(folder.glob("metadata/*.parquet"))
    there = [*metadata, *sorted(folder.glob("*_emb/*.npy")), *sorted(folder.glob("*.index"))]
    ours = told_path(folder).exists() or any("recipe" in told_at(str(path), Store()) for path in metadata)
    if there and not ours:
        raise ConfigError(
            f"database={folder} has {there[0].relative_to(folder)}, and was not written by Millrace, which would write"
            " over it: leave out shards= to use it as it is, or name another folder"
        )


def _remove_others(folder: Path, names: Sequence[str], sides: Sequence[Side]) -> None:
    """Remove what an earlier database in the folder had more."""
    kept = {metadata_path(folder, name) for name in names}
    kept |= {embedding_path(folder, side, name) for side in sides for name in names}
    for pattern in ("img_emb/img_emb_*.npy", "text_emb/text_emb_*.npy", "metadata/metadata_*.parquet"):
        for path in folder.glob(pattern):
            if path not in kept:
                path.unlink()
    for side in SIDES:
        if side not in sides:
            index_path(folder, side).unlink(missing_ok=True)
            if (folder / "text_emb").is_dir():
                (folder / "text_emb").rmdir()
