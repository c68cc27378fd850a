"""Runs that are submitted: on two nodes, through either launcher, as on this machine; and what is refused."""

import pytest

from tests.slurm.submitting import Submitted
from tests.trainer.jobs import train_on


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_nodes_give_the_losses_of_one_process(lab, folder, launcher):
    alone = train_on(1, folder, f"data.sources.scenes.shards={folder}/scenes", f"name=alone_{launcher}")
    ranks = 2 if launcher == "torchrun" else 1
    run = Submitted(
        lab, folder, launcher, "cluster.nodes=2", f"cluster.launcher={launcher}", f"cluster.ranks_per_node={ranks}"
    )
    assert f"job {run.job}" in run.done.stdout
    assert run.wait() == "COMPLETED", run.told()
    assert run.losses() == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert run.events() == ["started", "ended"] and run.chain()[-1]["outcome"] == "finished"
