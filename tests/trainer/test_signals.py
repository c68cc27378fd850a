"""A request to stop reaches every rank, whichever rank got the signal."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.trainer.ranks import ranks
from trainer.signals import StopSignal


def stop_one(number: int) -> tuple[bool, bool, bool]:
    """What `stopping` says before and after rank 1 got a signal; whether the handlers from before are back."""
    earlier = signal.getsignal(number)
    with StopSignal(torch.device("cpu")) as stopping:
        before = stopping()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), number)
        after = stopping()
        changed = signal.getsignal(number) != earlier
    return before, after, changed and signal.getsignal(number) == earlier


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_ranks_agree_to_stop_when_one_is_asked(number):
    assert ranks(2).run(stop_one, number) == [(False, True, True)] * 2


def test_only_a_second_ctrl_c_ends_at_once():
    with StopSignal(torch.device("cpu")) as stopping:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
