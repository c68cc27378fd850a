"""`millrace plan` as a command: its text, its figures, its table, its mistakes."""

import json
import tarfile

import pytest

from tools import cli
from tools.demo.scenes import write_tars

SMALL = ["experiment=demo/scenes", "scale=tiny"]


def planned(capsys, *overrides: str) -> dict:
    assert cli.execute(["plan", *overrides, "plan.json=-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_prints_memory_time_and_cost(capsys):
    assert cli.execute(["plan", *SMALL, "cluster.processes=4", "plan.price_per_gpu_hour=2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("demo: 4 ranks on H100, a batch of 8 (1 x 2 a rank)")
    for part in ("denoiser", "optimizer moments", "fits: ", "seconds at 35% MFU", "300 kB a sample, assumed", "cost"):
        assert part in text


def test_time_and_cost_follow_from_flops(capsys):
    outlook = planned(capsys, *SMALL, "plan.device=A100", "plan.mfu=0.5", "plan.price_per_gpu_hour=2", "steps=3600")
    seconds = outlook["estimate"]["model_flops"] / (0.5 * 312e12)
    assert outlook["step_seconds"] == pytest.approx(seconds)
    assert outlook["hours"] == pytest.approx(seconds) and outlook["cost"] == pytest.approx(2 * seconds)
    assert outlook["read_bytes_per_second"] == pytest.approx(8 / seconds * 300_000)


def test_what_does_not_fit_is_said_with_what_to_change(capsys):
    assert cli.execute(["plan", *SMALL, "model.num_attention_heads=100", "plan.memory=0.1"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text and "activation_checkpointing=true" in text
    assert text.index("more ranks share") < text.index("engine.offload=true")


def test_ranks_and_gpus_are_those_of_slurm_nodes(capsys):
    nodes = ["cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=2", "cluster.gpu=L4"]
    outlook = planned(capsys, *SMALL, *nodes)
    assert outlook["estimate"]["ranks"] == 4 and outlook["device"] == "L4"


def test_bytes_of_samples_are_those_of_manifests(capsys, tmp_path):
    source = f"data.sources.scenes.shards={tmp_path}"
    write_tars(tmp_path, 20, seed=0, per_shard=10)
    assert planned(capsys, *SMALL, source)["assumed"]
    assert cli.execute(["index", f"shards={tmp_path}"]) == 0
    capsys.readouterr()
    outlook = planned(capsys, *SMALL, source)
    total = 0
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            total += sum(member.size for member in tar)
    assert not outlook["assumed"] and outlook["sample_bytes"] == pytest.approx(total / 20)


@pytest.mark.slow
def test_all_experiments_stand_in_a_table(capsys, tmp_path):
    file = tmp_path / "table.json"
    arguments = ["plan", "experiment=all", "scale=tiny", "cluster.processes=4", f"plan.json={file}"]
    assert cli.execute(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["experiment", "trained"]
    assert {line.split()[0] for line in lines[1:]} == set(json.loads(file.read_text()))
    assert any(line.startswith("sd3/medium_1024 ") and " yes " in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["cluster.processes=3"], "3 data-parallel ranks do not divide"),
        (["plan.device=abacus"], "plan.device='abacus'"),
        (["plan.mfu=1.5"], "plan.mfu=1.5"),
        (["conditioner=sd3", "conditioner.encoders.2.model=nobody/nothing"], "conditioner.encoders.2.model"),
    ],
)
def test_a_mistake_is_named(capsys, overrides, named):
    assert cli.execute(["plan", *SMALL, *overrides]) == 2
    assert named in capsys.readouterr().err
