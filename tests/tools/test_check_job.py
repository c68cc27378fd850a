"""What `cluster=slurm` refuses, and on how many nodes a run may start."""

import pytest

from conf.errors import ConfigError
from slurm.work import Progress
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
    room = r"on 2 x 1 GPUs a rank would need \d+\.\d GiB, and A100 has room for 71\.\d \(its memory less 10%"
    with pytest.raises(ConfigError, match=room):
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
    curate = [f"shards={tmp_path}", f"runs={tmp_path}", "cluster=slurm", "cluster.gpus_per_node=0"]
    checked = check_job("curate", [*curate, "cluster.tasks=7"])
    assert checked.node_counts == [1] and checked.resources.tasks == 7 and checked.resources.ranks == 1
    assert checked.task(3) == ["cluster=tasks", "cluster.tasks=7", "cluster.task=3"]
    assert checked.task(None) == ["cluster=tasks", "cluster.tasks=8"]  # its cores
    with pytest.raises(ConfigError, match=r"cluster\.tasks"):
        check_job("curate", [*curate, "cluster.tasks=0"])


def test_a_task_that_is_one_process_is_not_started_for_each_gpu(tmp_path):
    curate = [f"shards={tmp_path}", f"runs={tmp_path}", "cluster=slurm", "cluster.tasks=7"]
    assert check_job("curate", [*curate, "cluster.gpus_per_node=1"]).resources.ranks == 1
    assert check_job("retrieve", ["database=x", *curate, "cluster.gpus_per_node=1"]).task_keys == "cluster"
    with pytest.raises(ConfigError, match=r"cluster\.gpus_per_node=8 would start as many"):
        check_job("curate", curate)
    with pytest.raises(ConfigError, match=r"cluster\.ranks_per_node=2 would start as many"):
        check_job("pack", ["out=x", *curate[1:], "cluster.gpus_per_node=0", "cluster.ranks_per_node=2"])


def test_encoding_in_tasks_has_ranks_in_each(run):
    encode = [*run, "first_stage=kl_tiny", "data.crop=center", "data.encoded=one", "model.in_channels=4"]
    encode += ["encode.conditions=false", "cluster.ranks_per_node=4"]
    assert check_job("encode", encode).task_keys is None  # one job, whose ranks share all
    checked = check_job("encode", [*encode, "cluster.tasks=3", "cluster.nodes=2"])
    assert checked.node_counts == [2] and checked.resources.ranks == 4
    assert checked.task(2) == ["cluster=local", "encode.tasks=3", "encode.task=2"]
    assert checked.task(None) == ["cluster=local"]


def test_a_job_that_does_not_split_into_tasks_is_not_submitted_as_some(run):
    with pytest.raises(ConfigError, match=r"cluster\.tasks=4: train does not split into tasks"):
        check_job("train", [*run, "cluster.tasks=4"])


def test_tasks_have_come_as_far_as_their_newest_starts_found_done(tmp_path):
    checked = check_job(
        "curate", [f"shards={tmp_path}", f"runs={tmp_path}", "cluster=slurm", "cluster.gpus_per_node=0"]
    )
    tell = checked.work([], tmp_path, checked.chain, tasks=[0, 8]).progress
    assert tell is not None and tell() == Progress(0, None) and not tell().finished
    for task, skipped in ((0, (0, 30)), (8, (20,))):
        part = checked.folder / f"task_{task}"
        part.mkdir(parents=True)
        rows = [f'{{"samples": 90, "skipped": {count}}}\n' for count in skipped]
        (part / "metrics.jsonl").write_text("".join(rows))
    assert tell() == Progress(50, None)
