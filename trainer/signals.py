"""A signal asks for the end of a run: after the step under way, the run saves and leaves."""

import logging
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# SLURM sends SIGTERM on cancel and preemption, and what `--signal` asks for before the time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Remembers whether this rank was asked to stop; ranks agree on it, since a signal may reach only one.

    A second SIGINT (Ctrl-C) ends the process at once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.received: int | None = None
        self._earlier: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def __call__(self) -> bool:
        """Whether any rank was asked to stop; collective."""
        flag = torch.tensor([float(self.received is not None)], device=self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flag)
        return bool(flag.item() > 0)

    def restore(self) -> None:
        """Put back the handlers from before."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        log.warning("received %s: saving and leaving after this step", signal.Signals(number).name)
        self.received = number
