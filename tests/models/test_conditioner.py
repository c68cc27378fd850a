"""Parts of a conditioner beside encoders: sizes, maps, what is learned; and what is kept of each."""

import pytest
import torch
from torch import Tensor, nn

from models.conditioner import AbsentEncoder, Conditioner, ConditionMap, LearnedEncoder, SizeIds
from models.given import Given
from models.initialization import initialize


class Numbers(LearnedEncoder):
    """One token of a number's own; 3 stands for none."""

    reads, length, width, pooled_width, nothing = "number", 1, 4, 0, 3

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(inputs)[:, None], torch.zeros(len(inputs), 0)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(generator=generator)


class Grey(ConditionMap):
    reads, channels = ("images",), 1

    def forward(self, given: Given) -> Tensor:
        return given.images.float().mean(1, keepdim=True)


def given(n: int = 3) -> Given:
    images = torch.arange(n * 3 * 4 * 6, dtype=torch.uint8).view(n, 3, 4, 6)
    sizes = torch.tensor([[70, 90], [32, 33], [4, 6]])
    return Given([""] * n, (4, 6), images, fields={"number": torch.tensor([2, 0, 1])}, original_size=sizes)


def test_each_part_gives_its_condition_and_what_is_dropped_is_nothing():
    conditioner = initialize(Conditioner([Numbers()], dropped="empty", sizes=SizeIds(), maps=[Grey()]), seed=0)
    assert conditioner.learned and conditioner.parts == 3 and conditioner.concat_channels == 1
    assert conditioner.reads == {"number", "images"}
    whole = conditioner(given())
    table = conditioner.encoder_modules[0].table.weight
    torch.testing.assert_close(whole["context"], table[[2, 0, 1]][:, None])
    assert whole["size_ids"].tolist() == [[70, 90, 0, 0, 4, 6], [32, 33, 0, 0, 4, 6], [4, 6, 0, 0, 4, 6]]
    assert torch.equal(whole["concat"][:, 0], given().images.float().mean(1))
    keep = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    some = conditioner(given(), keep)
    torch.testing.assert_close(some["context"], table[[2, 3, 1]][:, None])
    assert [bool(row.any()) for row in some["size_ids"]] == [False, True, True]
    assert [bool(row.any()) for row in some["concat"]] == [True, True, False]
    null = conditioner(given(), conditioner.unconditional(3))
    torch.testing.assert_close(null["context"], table[[3, 3, 3]][:, None])
    assert torch.equal(null["size_ids"], whole["size_ids"]) and torch.equal(null["concat"], whole["concat"])
    some["context"].sum().backward()
    assert table.grad.any(dim=1).tolist() == [False, True, True, True]


def test_a_field_that_samples_do_not_have_is_as_if_dropped_and_a_map_is_refused():
    conditioner = initialize(Conditioner([Numbers()], dropped="empty"), seed=0)
    table = conditioner.encoder_modules[0].table.weight
    torch.testing.assert_close(conditioner(Given(["", ""]))["context"], table[[3, 3]][:, None])
    zeros = initialize(Conditioner([Numbers()]), seed=0)
    assert not zeros(Given(["", ""]))["context"].any()
    with pytest.raises(ValueError, match="Grey needs 'images'"):
        Conditioner([], maps=[Grey()])(Given([""]))


def test_without_parts_there_are_no_conditions_and_learned_and_frozen_ones_do_not_mix():
    assert Conditioner([])(Given(["", ""])) == {}
    frozen = AbsentEncoder(1, 4)
    assert not Conditioner([frozen]).learned and Conditioner([frozen, Numbers()]).learned
    frozen.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"Numbers learn with the denoiser, AbsentEncoder are frozen"):
        Conditioner([frozen, Numbers()])


def test_the_sizes_of_the_base_end_with_the_target_that_is_asked_for():
    told = Given(["", ""], (8, 8), target_size=torch.tensor([[16, 24], [8, 4]]), crop=torch.tensor([[1, 2], [3, 4]]))
    assert SizeIds()(told).tolist() == [[8, 8, 1, 2, 16, 24], [8, 8, 3, 4, 8, 4]]


def test_the_refiners_sizes_end_with_a_score():
    ids = SizeIds(aesthetic="score")
    told = Given(["", ""], (8, 8), fields={"score": torch.tensor([5.5, 6.25])}, crop=torch.tensor([[1, 2], [3, 4]]))
    assert ids(told).tolist() == [[8, 8, 1, 2, 5.5], [8, 8, 3, 4, 6.25]]
    assert ids(Given([""], (8, 8))).tolist() == [[8, 8, 0, 0, 6.0]]
    assert SizeIds("score", default_aesthetic=4.5)(Given([""], (8, 8))).tolist() == [[8, 8, 0, 0, 4.5]]
