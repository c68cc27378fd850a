"""Lines of a run's record files that belong to steps: which keys each slice held, and what went to quarantine.

Workers attach them to what they deliver, the loader collects them, and the training loop gathers all ranks' to one
writer. A step that is trained on again after a crash is recorded once: opening a file for a resume at step s drops its
lines of step s and later, and a line that was cut off.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeysLine:
    """What the slice (step, lane) held, in the order of its slots and with replacements made."""

    step: int
    lane: int
    source: str
    bucket: str
    keys: list[str]


@dataclass(frozen=True)
class QuarantineLine:
    """A sample that could not be used, and the one that took its slot of the slice (step, lane); None where the slice
    had no other, which ends the run."""

    step: int
    lane: int
    slot: int
    source: str
    shard: str
    key: str
    reason: str
    replaced_by: str | None


@dataclass(frozen=True)
class Records:
    """What happened over some slices; picklable, so that ranks can gather them."""

    keys: list[KeysLine] = field(default_factory=list)
    quarantine: list[QuarantineLine] = field(default_factory=list)


class RecordWriter:
    """Writes `keys.jsonl` and `quarantine.jsonl` in a run's folder: one process of a run does.

    Args:
        folder: the run's.
        start_step: the first step that will be recorded; lines of it and later ones are dropped.
    """

    def __init__(self, folder: Path | str, start_step: int = 0) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._keys = folder / "keys.jsonl"
        self._quarantine = folder / "quarantine.jsonl"
        for path in (self._keys, self._quarantine):
            _drop_from(path, start_step)

    def write(self, gathered: list[Records]) -> None:
        """Append the records of all ranks over the same steps, in order of step and lane."""
        _append(self._keys, [line for records in gathered for line in records.keys])
        _append(self._quarantine, [line for records in gathered for line in records.quarantine])


def write_quarantine(folder: Path | str, lines: Sequence[QuarantineLine]) -> None:
    """Append one rank's lines to `quarantine.jsonl`, which any process may do: what a run that fails leaves behind."""
    _append(Path(folder) / "quarantine.jsonl", lines)


def _append(path: Path, lines: Sequence[KeysLine | QuarantineLine]) -> None:
    if lines:
        ordered = sorted(lines, key=lambda line: (line.step, line.lane))  # stable: slots stay in order
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in ordered))


def _drop_from(path: Path, step: int) -> None:
    """Cut the file before its first line of `step` or a later one: lines stand in order of steps, so bisect."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        low, high = 0, size
        while low < high:
            middle = (low + high) // 2
            file.seek(max(middle - 1, 0))
            if middle > 0:
                file.readline()  # to the start of the first line at or after the middle
            start = file.tell()
            line = file.readline()
            if start < high and _step_of(line, path) < step:
                low = start + len(line)
            else:
                high = middle
        if low < size:
            file.truncate(low)


def _step_of(line: bytes, path: Path) -> float:
    """The line's step; infinity for one that a crash cut off."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        logger.warning("%s: dropping everything from a damaged line on: %r", path, line[:200])
        return math.inf
