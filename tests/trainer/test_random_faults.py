"""Twenty random faults in a row, each followed by a restart, change nothing of what a run ends with.

Ranks, the launcher and loader workers are killed, the disk fills up, and the newest checkpoint is damaged while the run
is down: at random steps, or while ranks still start. MILLRACE_FAULTS_SEED=<seed> repeats a run of the test, as far as
processes repeat themselves.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from data.run_directory import read_jsonl
from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars
from trainer.checkpoint import format as files
from trainer.checkpoint.storage import VerifiedReader

FAULTS = 20
KINDS = ("rank", "launcher", "worker", "full disk", "damage")
# Between two faults; checkpoints are saved in the background, so that one that fails is told at the next.
STEPS_BETWEEN = 4
EVERY = 2
STEPS = (FAULTS + 1) * STEPS_BETWEEN
DISK_BYTES = 16 << 20


class Disturbed:
    """A run of two ranks, a loader worker each, that is started again wherever it has ended.

    Args:
        folder: with drawn scenes; for what is no part of the run.
        runs: for the run, on a disk of its own where there is one.
    """

    def __init__(self, folder: Path, runs: Path, name: str):
        self.run = runs / name
        self.output = folder / f"{name}.txt"
        self._limit = folder / f"{name}.limit"
        self._folder, self._runs, self._name = folder, runs, name
        self.launcher: psutil.Popen | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, f"name={self._name}", f"runs={self._runs}"),
            *(f"data.sources.scenes.shards={self._folder}/scenes", f"data.cache_folder={self._folder}/cache"),
            *("cluster.processes=2", "cluster.restarts=1000", "data.workers=1", f"steps={STEPS}"),
            *("ema=constant", "data.holdout=0.2", "validation.every=10", "validation.samples=8"),
            *(f"checkpoint.every={EVERY}", "objective._target_=tests.trainer.faulty.HeldAt"),
            f"+objective.limit={self._limit}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        with self.output.open("a") as file:
            self.launcher = psutil.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def let_go_on_to(self, step: int) -> None:
        scratch = self._limit.with_suffix(".tmp")
        scratch.write_text(str(step))
        scratch.replace(self._limit)

    @property
    def step(self) -> int:
        """The last that is logged."""
        metrics = self.run / "metrics.jsonl"
        rows = read_jsonl(metrics) if metrics.exists() else []
        return rows[-1]["step"] if rows else 0

    def ranks(self) -> list[psutil.Process]:
        assert self.launcher is not None
        return [child for child in _children(self.launcher) if "tools.cli" in _command(child)]

    def workers(self) -> list[psutil.Process]:
        """Loader workers, which are forks of ranks."""
        return [child for rank in self.ranks() for child in _children(rank) if _command(child) == _command(rank)]

    def newest_checkpoint(self) -> Path | None:
        return next((path for path in files.step_folders(self.run / "checkpoints") if files.is_committed(path)), None)

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert self.launcher is not None and self.launcher.poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.02)

    def told(self) -> str:
        return self.output.read_text()[-4000:]

    def end(self) -> None:
        """Kill it with all that it has started."""
        if self.launcher is not None:
            family = [self.launcher, *self.launcher.children(recursive=True)] if self.launcher.is_running() else []
            for process in family:
                _kill(process)
            psutil.wait_procs(family, timeout=30)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def disturb(run: Disturbed, kind: str, rng: random.Random) -> None:
    """Do it, and return when the ranks of before are gone and the run starts, or has started, again."""
    ranks = run.ranks()
    if kind == "rank":
        _kill(rng.choice(ranks))
    elif kind == "worker":
        _kill(rng.choice(run.workers()))
    elif kind == "launcher":  # the ranks save and leave, while the run is started again already
        _kill(run.launcher)
        run.start()
    elif kind == "full disk":
        filler = run.run.parent / "filler"
        spare = rng.choice([0, 1 << 16, 1 << 20])
        run.wait_for(lambda: fill(filler, spare) or not all(map(_alive, ranks)))
        filler.unlink()
    elif kind == "damage":
        run.end()
        path = run.newest_checkpoint()
        assert path is not None
        damage(rng.choice(sorted(path.iterdir())), rng)
        run.start()
    run.wait_for(lambda: not any(map(_alive, ranks)))


def fill(filler: Path, spare: int) -> None:
    """Leave so many bytes free of the file's disk; anew as others free some."""
    with filler.open("ab") as file, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(filler.parent).free) > spare:
            file.write(bytes(min(free - spare, 1 << 16)))
            file.flush()


def damage(file: Path, rng: random.Random) -> None:
    """Cut it short, or flip a bit."""
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        file.write_bytes(content[:place])
    else:
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path | None]:
    """A small file system of its own; None where none can be had."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def runs(tmp_path, disk) -> Iterator[Callable[[str], Disturbed]]:
    """Makes runs by name; what they started is killed at the end."""
    write_tars(tmp_path / "scenes", 60, seed=0, per_shard=30)
    made: list[Disturbed] = []

    def make(name: str) -> Disturbed:
        made.append(Disturbed(tmp_path, disk or tmp_path / "runs", name))
        return made[-1]

    yield make
    for run in made:
        run.end()


def state(run: Disturbed) -> dict[str, Tensor]:
    """All tensors of the last checkpoint: weights, moments, averages."""
    path = files.step_folder(run.run / "checkpoints", STEPS)
    files.check_files(path)
    tensors = {}
    for name, stored in VerifiedReader(path).read_metadata().storage_data.items():
        with (path / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            chunk = io.BytesIO(file.read(stored.length))
        tensors[f"{name.fqn} {tuple(name.offset)}"] = torch.load(chunk, weights_only=True)
    return tensors


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_random_faults_in_a_row_change_nothing_of_what_a_run_ends_with(runs, disk):
    undisturbed = runs("undisturbed")
    undisturbed.let_go_on_to(STEPS)
    undisturbed.start()
    assert undisturbed.launcher.wait(900) == 0, undisturbed.told()

    seed = int(os.environ.get("MILLRACE_FAULTS_SEED", random.SystemRandom().randrange(2**32)))
    print(f"MILLRACE_FAULTS_SEED={seed}")
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if disk is not None or kind != "full disk"]
    faults = [kinds[i % len(kinds)] for i in range(FAULTS)]
    rng.shuffle(faults)
    run = runs("disturbed")
    run.let_go_on_to(STEPS_BETWEEN)
    run.start()
    for number, kind in enumerate(faults):
        begin, end = number * STEPS_BETWEEN, (number + 1) * STEPS_BETWEEN
        run.wait_for(lambda: len(run.ranks()) == 2)
        starting = kind in ("rank", "launcher", "full disk") and rng.random() < 0.25
        if not starting:
            target = rng.randint(begin + 1, end)
            run.wait_for(lambda target=target: run.step >= target and run.workers() and run.newest_checkpoint())
        delay = rng.uniform(0, 3 if starting else 0.2)
        time.sleep(delay)
        print(f"{number}: {kind}, {delay:.2f} s after {'ranks were started' if starting else f'step {run.step}'}")
        run.let_go_on_to(end + STEPS_BETWEEN)
        disturb(run, kind, rng)
    run.let_go_on_to(STEPS)
    assert run.launcher.wait(900) == 0, run.told()

    assert run.output.read_text().count("checkpoint refused") >= faults.count("damage")
    expected, found = state(undisturbed), state(run)
    assert found.keys() == expected.keys()
    kinds_of_state = {name.partition("/")[0] for name in expected if "/" in name}
    assert kinds_of_state > {"exp_avg", "exp_avg_sq"} and any(kind.startswith("ema.") for kind in kinds_of_state)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    told = ("step", "loss", "grad_norm", "val/loss", "samples")
    rows, others = (read_jsonl(r.run / "metrics.jsonl") for r in (undisturbed, run))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [{k: row.get(k) for k in told} for row in others] == [{k: row.get(k) for k in told} for row in rows]
    assert (run.run / "keys.jsonl").read_bytes() == (undisturbed.run / "keys.jsonl").read_bytes()
    if disk is None:
        pytest.skip("all faults but the full disk, for which a tmpfs must be mounted, as root")
