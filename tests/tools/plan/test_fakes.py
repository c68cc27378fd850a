"""The account of fake tensors: what it counts of allocations that are known."""

import torch

from tools.plan.fakes import ACTIVATIONS, GATHERED, GRADIENTS, STATES, Account, Fakes, fake_world

MIB = 2**20


def test_the_peak_is_the_most_at_once():
    with Fakes(), Account() as account:
        a = torch.zeros(MIB, dtype=torch.uint8)
        b = torch.zeros(2 * MIB, dtype=torch.uint8)
        view = b[:10].view(2, 5)
        del a, b
        assert account.bytes(ACTIVATIONS) == 2 * MIB  # the view holds it
        del view
        c = torch.zeros(MIB // 2, dtype=torch.uint8)
        assert account.bytes(ACTIVATIONS) == c.numel() == MIB // 2
    assert account.peak == 3 * MIB


def test_what_is_settled_does_not_count_again():
    with Fakes(), Account() as account:
        weights = torch.zeros(MIB)
        account.settle(STATES)
        account.start()
        kept = weights * 2
        account.settle(GRADIENTS)
        weights.mul_(2)
        assert (account.bytes(STATES), account.bytes(GRADIENTS), account.bytes(ACTIVATIONS)) == (4 * MIB, 4 * MIB, 0)
        del kept
        assert account.bytes(GRADIENTS) == 0
    assert account.peak == 4 * MIB


def test_resized_storages_are_gathered_ones_and_resizing_is_as_it_was_afterwards():
    resize = torch.UntypedStorage.resize_
    with Fakes(), Account() as account:
        whole = torch.zeros(MIB, dtype=torch.uint8)
        whole.untyped_storage().resize_(0)
        assert account.bytes(ACTIVATIONS) == account.bytes(GATHERED) == 0
        whole.untyped_storage().resize_(MIB)
        assert account.bytes(GATHERED) == MIB and account.at_peak == {ACTIVATIONS: MIB, GATHERED: 0}
    assert torch.UntypedStorage.resize_ is resize


def test_collectives_count_whole_tensors_and_leave_gradients():
    with fake_world(4), Fakes(), Account() as account:
        shard, whole = torch.zeros(256), torch.zeros(1024)
        torch.distributed.all_gather_into_tensor(whole, shard)
        torch.distributed.reduce_scatter_tensor(shard, whole)
        torch.distributed.all_reduce(shard)
    assert account.traffic == {"all_gather": 4096, "reduce_scatter": 4096, "all_reduce": 1024}
    assert account.bytes(GRADIENTS) == 1024 and account.bytes(GATHERED) == 4096


def test_flops_of_products_and_attention_are_counted():
    query = torch.empty(2, 4, 10, 64)
    with Fakes(), Account() as account:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
        assert account.flops == 2 * 3 * 5 * 7
        account.start()
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert account.flops == 2 * 2 * (2 * 4) * 10 * 10 * 64


def test_modules_can_be_moved_and_cast():
    with Fakes():
        module = torch.nn.Linear(3, 4).to(torch.bfloat16).float()
        with torch.device("meta"):
            later = torch.nn.Linear(3, 4)
        later.to(torch.bfloat16).to_empty(device="cpu").to("cpu")
    assert module.weight.dtype == torch.float32
    assert later.weight.device.type == "cpu" and later.weight.dtype == torch.bfloat16
