"""A compiler that was killed leaves a lock, which torch waits for without end."""

import os
import time

import pytest

from trainer.engines.deepspeed_start import LONGEST_COMPILE_S, refuse_abandoned_locks


def test_a_lock_that_was_left_behind_is_refused_and_one_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    refuse_abandoned_locks()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()  # torch's own, as it lies beside what is compiled
    refuse_abandoned_locks()
    before = time.time() - LONGEST_COMPILE_S - 60
    os.utime(lock, (before, before))
    with pytest.raises(ValueError, match=r"deepspeed_shm_comm/lock is 16 minutes old.*Remove the file"):
        refuse_abandoned_locks()


def test_torch_waits_for_this_very_file(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    waited = []

    class Baton:
        def __init__(self, path: str, **options: object) -> None:
            waited.append(path)
            raise InterruptedError

    monkeypatch.setattr(cpp_extension, "FileBaton", Baton)
    with pytest.raises(InterruptedError):
        cpp_extension.load("deepspeed_shm_comm", sources=[__file__])
    assert waited == [str(tmp_path / "deepspeed_shm_comm" / "lock")]
