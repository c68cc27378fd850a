"""First values: of a seed, a network's name and a parameter's name, and of nothing else."""

import torch
from torch import nn

from models.initialization import initialize
from models.mmdit import MMDiT

TINY = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 6,
}


def drawn(network: nn.Module) -> list[torch.Tensor]:
    """Parameters that start at random, and not at a constant."""
    return [p for p in network.parameters() if p.unique().numel() > 1]


def test_two_networks_of_one_class_start_apart_and_a_namesake_starts_equal():
    teacher, student, again = (initialize(MMDiT(**TINY), 3, name) for name in ("teacher", "student", "teacher"))
    pairs = list(zip(drawn(teacher), drawn(student), strict=True))
    assert len(pairs) > 10 and not any(torch.equal(one, other) for one, other in pairs)
    assert all(torch.equal(one, same) for one, same in zip(teacher.parameters(), again.parameters(), strict=True))


def test_another_seed_gives_other_values():
    pairs = zip(drawn(initialize(MMDiT(**TINY), 3)), drawn(initialize(MMDiT(**TINY), 4)), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)


def test_a_networks_other_parameters_do_not_matter():
    short, deep = initialize(MMDiT(**TINY), 3), initialize(MMDiT(**TINY | {"num_layers": 5}), 3)
    parameters = dict(deep.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in short.named_parameters() if not n.startswith("blocks.1.text"))
