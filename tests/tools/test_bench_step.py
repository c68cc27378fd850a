"""The step benchmark runs, compares the same computation, and its floor is the arithmetic alone."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.mmdit import MMDiT
from tools.bench import step


def test_a_small_run_reports_ratios_of_equal_computations():
    results = step.run(widths=(64,), layers=1, latents=8, batch=1, repeats=3, modes=("eager",))
    (entry,) = results["cpu"].values()
    eager = entry["eager"]
    assert eager["output_error"] < 1e-5
    assert 0 < eager["floor"] < eager["ours"]
    assert eager["ratio"] > 0


def test_the_floor_does_all_the_flops_of_a_pass_and_nothing_else():
    case = step._Case({"num_layers": 2, "num_attention_heads": 1}, 8, 2, torch.device("cpu"), torch.float32)
    ours, _ = step._pair(case)
    inputs = step._inputs(ours, case)
    floor = step._floor(lambda: step._backward(ours, ours(**inputs)))
    with FlopCounterMode(display=False) as whole:
        step._backward(ours, ours(**inputs))
    with FlopCounterMode(display=False) as alone:
        floor()
    assert alone.get_total_flops() == whole.get_total_flops() > 2 * MMDiT(**case.config).flops(8, 8, step.CONTEXT)


def test_process_time_is_refused_with_several_threads():
    with pytest.raises(ValueError, match="threads=1"):
        step.run(threads=2, clock="process")
