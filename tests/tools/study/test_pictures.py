"""A whole small study whose runs are evaluated by `millrace evaluate` and ranked by what it says."""

import json
from pathlib import Path

import pytest

from data.run_directory import read_jsonl
from tests.tools.study.test_job import arguments
from tools import cli
from tools.demo.scenes import write_tars
from tools.study.pictures import Drawn, PictureEvaluation


@pytest.mark.slow
def test_runs_are_ranked_by_what_evaluate_says_of_them(tmp_path: Path, capsys):
    write_tars(tmp_path / "scenes", 60, seed=0)
    overrides = [f"reference={tmp_path}/scenes", "samples=10", "reference_samples=20", "batch=5"]
    overrides += ["metric=[fid,composition]", "features=random_stand_in", f"cache_folder={tmp_path}/cache"]
    quoted = ",".join("'" + one + "'" for one in overrides)
    evaluate = (
        "study.evaluate={_target_: tools.study.pictures.PictureEvaluation, averages: [none],"
        " values: {right: composition_accuracy, fid: fid_random_stand_in},"
        f" settings: [{{steps: [2, 3], guidance: [1.0]}}, {{steps: [1], guidance: [2.0]}}], overrides: [{quoted}]}}"
    )
    ranks = (
        "+study.analyses.ranks={_target_: tools.study.analyses.pareto.ParetoRanks, axis: width, higher: right,"
        " lower: fid, settings: [steps, guidance, weights], groups: {}}"
    )
    command = arguments(tmp_path, "drawn", f"+{evaluate}", ranks, "parallel=2")
    assert cli.execute(command) == 0
    study = tmp_path / "runs" / "drawn"
    for name in ("w32_low_seed0", "w64_low_seed0"):
        rows = read_jsonl(study / name / "evaluation.jsonl")
        assert [(row["steps"], row["guidance"], row["weights"]) for row in rows] == [
            (2, 1.0, "raw"), (3, 1.0, "raw"), (1, 2.0, "raw"),
        ]  # fmt: skip
        theirs = [row for i in (0, 1) for row in read_jsonl(study / name / f"evaluation/{i}/evaluation.jsonl")]
        assert [row["fid"] for row in rows] == [row["fid_random_stand_in"] for row in theirs]
    verdicts = json.loads((study / "analysis.json").read_text())["ranks"]["verdicts"]
    assert verdicts and "has been evaluated" not in verdicts[0]
    # Again: nothing is evaluated anew.
    capsys.readouterr()
    assert cli.execute(command) == 0
    assert "evaluation" not in capsys.readouterr().out


def test_commands_are_of_what_is_not_there_yet(tmp_path: Path):
    groups = [Drawn([2], [1.0, 3.0]), Drawn([4], [1.0])]
    evaluation = PictureEvaluation({"fid": "clip_fid"}, groups, ["none", "ema"], ["samples=8"])
    run = tmp_path / "run"
    first, second = evaluation.commands(run)
    assert {f"source={run}", f"runs={tmp_path}", "name=run/evaluation/0", "samples=8"} <= set(first)
    assert {"averages=[none,ema]", "guidance_scales=[1.0,3.0]", "steps=[2]"} <= set(first)
    rows = [
        {"average": average, "guidance": guidance, "steps": 2, "clip_fid": guidance}
        for average in ("none", "ema")
        for guidance in (1.0, 3.0)
    ]
    (run / "evaluation" / "0").mkdir(parents=True)
    (run / "evaluation" / "0" / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert evaluation.commands(run) == [first, second]
    (run / "evaluation" / "0" / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation.commands(run) == [second]
    with pytest.raises(ValueError, match=r"no row of 4 steps, guidance 1\.0 and average none with clip_fid"):
        evaluation.evaluate(run)
