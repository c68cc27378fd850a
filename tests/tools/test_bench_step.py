"""The step benchmark runs, compares the same computation, and its floor is the arithmetic alone."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools.bench import step
from tools.bench.denoisers import Case, small_unet


@pytest.mark.parametrize("chosen", [{"widths": (64,), "unets": ()}, {"widths": (), "unets": ("sd",)}])
def test_a_small_run_reports_ratios_of_equal_computations(chosen):
    results = step.run(**chosen, unet_width=32, layers=1, latents=8, batch=1, repeats=3, modes=("eager",))
    (entry,) = results["cpu"].values()
    eager = entry["eager"]
    assert eager["output_error"] < 1e-5
    assert 0 < eager["floor"] < eager["ours"]
    assert eager["ratio"] > 0


@pytest.mark.parametrize(
    ("kind", "config"), [("mmdit", {"num_layers": 2, "num_attention_heads": 1}), ("unet", small_unet("sdxl", 64))]
)
def test_the_floor_does_all_the_flops_of_a_pass_and_nothing_else(kind, config):
    case = Case(kind, config, 8, 2, torch.device("cpu"), torch.float32)
    ours, _ = case.pair()
    inputs = case.inputs(ours)
    floor = step._floor(lambda: step._backward(ours, ours(**inputs)))
    with FlopCounterMode(display=False) as whole:
        step._backward(ours, ours(**inputs))
    with FlopCounterMode(display=False) as alone:
        floor()
    assert alone.get_total_flops() == whole.get_total_flops() > 2 * case.flops()


def test_process_time_is_refused_with_several_threads():
    with pytest.raises(ValueError, match="threads=1"):
        step.run(threads=2, clock="process")
