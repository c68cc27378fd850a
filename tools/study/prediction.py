"""Predictions of the held-out runs, written down before these start and never changed afterwards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from tools.study.analyses.base import Analysis, Predicts
from tools.study.results import Result

FILE = "prediction.json"


def fix_predictions(
    analyses: Mapping[str, Analysis], folder: Path, results: Sequence[Result], held_out: Sequence[Result]
) -> Path:
    """Write what the analyses predict into `prediction.json`, unless it is there.

    The file holds when it was made, the runs that it was made from with a hash of their numbers, the state of the
    held-out runs at that moment, and a hash of the predictions themselves.

    Raises:
        ConfigError: a held-out run has begun, and there is no prediction.
    """
    path = folder / FILE
    if path.exists():
        return path
    for result in held_out:
        if (result.folder / "config.yaml").exists():
            raise ConfigError(
                f"run {result.name} is held out, but it began before it was predicted: remove {result.folder} to have"
                " it predicted first"
            )
    finished = [result for result in results if result.finished]
    predicting = {name: analysis for name, analysis in analyses.items() if isinstance(analysis, Predicts)}
    predictions = {name: analysis.predict(finished, held_out) for name, analysis in predicting.items()}
    record = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [result.name for result in finished],
        "sha256_of_results": digest({result.name: result.values for result in finished}),
        "held_out": {result.name: result.state for result in held_out},
        "predictions": predictions,
        "sha256_of_predictions": digest(predictions),
    }
    with path.open("x") as file:  # never over an earlier one
        file.write(json.dumps(record, indent=2) + "\n")
    return path


def read_prediction(folder: Path, analysis: str) -> dict[str, Any] | None:
    """What an analysis has predicted, with `made` beside it; None where nothing was.

    Raises:
        ValueError: the file was changed after it was written.
    """
    path = folder / FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if digest(record["predictions"]) != record["sha256_of_predictions"]:
        raise ValueError(f"{path} was changed after it was written: its predictions do not have its hash")
    found = record["predictions"].get(analysis)
    return None if found is None else {**found, "made": record["made"]}


def digest(value: Any) -> str:
    """SHA-256 of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
