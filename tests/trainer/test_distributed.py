"""Who a process is among others: launchers' environments, joining without one, and an end that launchers accept."""

import os
import subprocess
import sys
import textwrap

import pytest

from trainer.distributed import first_host, read_environment


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        # The shell that sbatch or salloc gives is no task of a step.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, None),
        # torchrun started by a SLURM task is what counts.
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
            | {"SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
            (1, 2, 1),
        ),
    ],
)
def test_reads_the_launchers_environment(environment, place):
    assert read_environment(environment) == place


def test_a_launchers_environment_in_part_is_an_error():
    with pytest.raises(ValueError, match="lacks WORLD_SIZE, LOCAL_RANK"):
        read_environment({"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[003-005,9],login", "gpu003"), ("a[7,9]-ib,b", "a7-ib")],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


SCRIPT = textwrap.dedent(
    """
    from trainer import distributed
    with distributed.joined("cpu") as world:
        total = distributed.all_reduce_sum({"rank": world.rank, "one": 1.0})
        assert total == {"rank": sum(range(world.size)), "one": world.size}, total
        if world.is_main:
            print("size", world.size, "launched", world.launched)
    """
)


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_joins_with_and_without_a_launcher_and_ends_clean(launcher, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment |= {"PYTHONPATH": os.getcwd(), "TMPDIR": str(temporary)}  # noqa: PTH109
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ("size 2 launched True" if launcher else "size 1 launched False") in done.stdout
    assert launcher or not list(temporary.iterdir()), "alone, it leaves nothing behind"
