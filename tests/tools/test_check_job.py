"""What `cluster=slurm` refuses, and on how many nodes a run may start."""

import pytest

from conf.errors import ConfigError
from tests.trainer.jobs import SMALL
from tools.submission import check_job


@pytest.fixture
def run(tmp_path):
    data = [f"data.sources.scenes.shards={tmp_path}", f"runs={tmp_path}/runs", "name=run"]
    return [*SMALL, *data, "cluster=slurm", "cluster.gpus_per_node=0"]


def test_a_run_is_checked_with_the_ranks_that_it_will_have(run):
    assert check_job("train", [*run, "cluster.nodes=4"]).node_counts == [4]
    with pytest.raises(ConfigError, match="lanes"):
        check_job("train", [*run, "cluster.nodes=3"])
    with pytest.raises(ConfigError, match="lanes"):
        check_job("train", [*run, "cluster.nodes=1", "cluster.gpus_per_node=8"])


def test_a_run_that_may_start_on_fewer_nodes_starts_where_ranks_divide_the_lanes(run):
    checked = check_job("train", [*run, "cluster.nodes=4", "cluster.min_nodes=1"])
    assert checked.node_counts == [1, 2, 4]
    assert checked.resources.options()["nodes"] == "1-4"
    with pytest.raises(ConfigError, match="min_nodes"):
        check_job("train", [*run, "cluster.min_nodes=2"])


def test_a_run_that_does_not_fit_its_gpus_is_refused(run):
    assert check_job("train", [*run, "cluster.nodes=2", "cluster.gpu=A100"]).node_counts == [2]
    large = [*run, "cluster.nodes=2", "model.num_layers=24", "model.attention_head_dim=512"]
    large += ["model.num_attention_heads=24", "model.joint_attention_dim=64"]
    with pytest.raises(ConfigError, match=r"on 2 nodes a rank would need .* GiB, and A100 has 79 GiB"):
        check_job("train", [*large, "cluster.gpu=A100"])
    with pytest.raises(ConfigError, match="H100"):
        check_job("train", [*run, "cluster.gpu=abacus"])


def test_what_this_machine_lacks_is_not_refused(run):
    check_job("train", [*run, "device=cuda"])


@pytest.mark.parametrize(
    "secret",
    [
        "data.storage_options.s3.secret=verysecret",
        "data.sources.scenes.shards=https://me:verysecret@host/a.tar",
        "cluster.env.WANDB_API_KEY=verysecret",
    ],
)
def test_a_secret_that_would_get_onto_the_disk_is_refused(run, secret, tmp_path):
    with pytest.raises(ConfigError, match="environment variable") as refusal:
        check_job("train", [*run, secret])
    assert "verysecret" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_a_secret_of_the_environment_passes_by_name(run, monkeypatch):
    monkeypatch.setenv("S3_SECRET", "verysecret")
    checked = check_job("train", [*run, "data.storage_options.s3.secret='${oc.env:S3_SECRET}'"])
    assert "verysecret" not in " ".join(checked.overrides)


def test_options_of_sbatch_are_named_and_left_out_as_asked(run):
    overrides = ["cluster.sbatch.mail-type=FAIL", "cluster.sbatch.requeue=false", "cluster.nodes=2", "cluster.mem=64G"]
    options = check_job("train", [*run, *overrides]).resources.options()
    assert options["mail_type"] == "FAIL" and "requeue" not in options and options["mem"] == "64G"
    assert "partition" not in options and options["cpus_per_task"] == 8


def test_curation_in_tasks_gets_a_node_for_each(tmp_path):
    checked = check_job("curate", [f"shards={tmp_path}", f"runs={tmp_path}", "cluster=slurm", "cluster.tasks=7"])
    assert checked.in_tasks and checked.node_counts == [1] and checked.resources.tasks == 7
    with pytest.raises(ConfigError, match=r"cluster\.tasks"):
        check_job("curate", [f"shards={tmp_path}", "cluster=slurm", "cluster.tasks=0"])
