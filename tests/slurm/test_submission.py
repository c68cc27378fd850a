"""Runs that are submitted: on two nodes, through either launcher, as on this machine; and what is refused."""

import pytest

from tests.slurm.submitting import Submitted
from tests.trainer.jobs import train_on

HSDP = ["engine=hsdp", "engine.replicas=2"]  # a group of shards on each node


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(("launcher", "ranks", "more"), [("srun", 1, []), ("torchrun", 2, []), ("srun", 2, HSDP)])
def test_two_nodes_give_the_losses_of_one_process(lab, folder, launcher, ranks, more):
    name = f"{launcher}_{ranks}"
    alone = train_on(1, folder, f"data.sources.scenes.shards={folder}/scenes", f"name=alone_{name}")
    nodes = ["cluster.nodes=2", f"cluster.launcher={launcher}", f"cluster.ranks_per_node={ranks}"]
    run = Submitted(lab, folder, name, *nodes, *more)
    assert f"job {run.job}" in run.done.stdout
    assert run.wait() == "COMPLETED", run.told()
    assert run.losses() == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert run.events() == ["started", "ended"] and run.chain()[-1]["outcome"] == "finished"
