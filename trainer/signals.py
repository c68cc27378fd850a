"""A signal asks for the end of a run: after the step under way, the run saves and leaves."""

import logging
import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# SLURM sends SIGTERM on cancel and preemption, and what `--signal` asks for before the time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Remembers, while it is entered, whether this rank was asked to stop; ranks agree on it, since a signal may reach
    only one.

    A second SIGINT (Ctrl-C) raises KeyboardInterrupt at once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._received: list[int] = []
        self._earlier: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether any rank was asked to stop; collective."""
        flag = torch.tensor([float(bool(self._received))], device=self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flag)
        return bool(flag.item() > 0)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        if not self._received:
            log.warning("received %s: saving and leaving after this step", signal.Signals(number).name)
        self._received.append(number)
