"""From results to a prediction that is written down, and what becomes of it."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from conf.errors import ConfigError
from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.power_law import PowerLaw
from tools.study.analyses.scaling import ScalingLaw
from tools.study.prediction import FILE, fix_predictions, read_prediction
from tools.study.results import Result
from tools.study.sheet import Sheet

LAW = PowerLaw(0.05, np.array([0.1 * 1e12**0.3]), np.array([0.3]))
SCALING = ScalingLaw("loss", ["flops"], huber=0.02, replicates=50, widest=0.03)


def fitted() -> list[Result]:
    rng = np.random.default_rng(0)
    return [
        result(
            {"size": f"s{i}"},
            {"flops": flops, "loss": float(LAW(np.array([[flops]]))[0] * np.exp(0.003 * rng.standard_normal()))},
            seed,
        )
        for i, flops in enumerate(1e11 * 2.5 ** np.arange(6))
        for seed in range(3)
    ]


def held_out(folder, loss: float | None = None) -> Result:
    values = {"flops": 1e11 * 2.5**6} | ({} if loss is None else {"loss": loss})
    made = result({"size": "s6"}, values, held_out=True)
    return Result(**(vars(made) | {"folder": folder / made.name, "state": "finished" if loss else "not started"}))


def test_the_prediction_is_fixed_before_the_run_and_held_against_it_afterwards(tmp_path):
    path = fix_predictions({"law": SCALING}, tmp_path, fitted(), [held_out(tmp_path)])
    record = json.loads(path.read_text())
    assert abs(datetime.fromisoformat(record["made"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert record["held_out"] == {"s6_seed0": "not started"} and len(record["runs"]) == 18
    said = record["predictions"]["law"]["runs"]["s6_seed0"]
    truth = float(LAW(np.array([[1e11 * 2.5**6]]))[0])
    assert said["low"] < truth < said["high"] and said["loss"] == pytest.approx(truth, rel=0.01)

    inside, outside = Sheet("law", tmp_path), Sheet("law", tmp_path)
    SCALING.report([*fitted(), held_out(tmp_path, truth)], inside)
    SCALING.report([*fitted(), held_out(tmp_path, truth * 1.1)], outside)
    assert inside.verdicts[1].endswith("inside.") and "no wider than +-3%" in inside.verdicts[1]
    assert outside.verdicts[1].endswith("OUTSIDE.") and "+10" in outside.verdicts[1]
    assert inside.numbers["held_out"]["s6_seed0"]["inside"] and not outside.numbers["held_out"]["s6_seed0"]["inside"]
    # The held-out run takes no part in the fit.
    assert inside.numbers["law"] == outside.numbers["law"]


def test_a_prediction_is_never_made_anew(tmp_path):
    first = fix_predictions({"law": SCALING}, tmp_path, fitted(), [held_out(tmp_path)]).read_text()
    others = [result(r.labels, r.values | {"loss": 2 * r.values["loss"]}, r.seed) for r in fitted()]
    assert fix_predictions({"law": SCALING}, tmp_path, others, [held_out(tmp_path)]).read_text() == first


def test_a_prediction_that_was_touched_is_refused(tmp_path):
    path = fix_predictions({"law": SCALING}, tmp_path, fitted(), [held_out(tmp_path)])
    record = json.loads(path.read_text())
    record["predictions"]["law"]["runs"]["s6_seed0"]["high"] *= 2
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was changed"):
        read_prediction(tmp_path, "law")


def test_a_run_that_began_is_not_predicted_any_more(tmp_path):
    (tmp_path / "s6_seed0").mkdir()
    (tmp_path / "s6_seed0" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="s6_seed0 is held out, but it began"):
        fix_predictions({"law": SCALING}, tmp_path, fitted(), [held_out(tmp_path)])
    assert not (tmp_path / FILE).exists()


def test_what_the_analysis_needs_is_checked_beforehand(tmp_path):
    with pytest.raises(ValueError, match="no column 'flop'; there are flops"):
        ScalingLaw("loss", ["flop"]).check({}, ["flops", "loss"])
    with pytest.raises(TooFewRuns, match="2 sizes"):
        SCALING.report(fitted()[:6], Sheet("law", tmp_path))
