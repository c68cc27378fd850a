"""MMDiT's and the UNet's forward and backward against diffusers' classes: same weights, inputs and threads, theirs in
the memory layout that is faster.

Contestants take turns, in an order that flips from round to round, so that whatever else the machine does meets both.
Beside them runs the floor: the matrix products, convolutions and attentions of our own pass, recorded and called again
with nothing in between. On a GPU, SD3-medium's and SDXL's sizes are added, with the share of a matmul peak measured in
the same run.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tools.bench.denoisers import SD3, SDXL, Case, small_unet
from trainer.engines.networks import blocks_of, compile_all

# Operators that do the arithmetic; what else a pass calls is overhead to a floor.
ARITHMETIC = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "attention")


def run(
    widths: Sequence[int] = (384, 768, 1536),
    layers: int = 2,
    latents: int = 32,
    batch: int = 2,
    repeats: int = 7,
    threads: int = 1,
    qk_norm: bool = False,
    modes: Sequence[str] = ("eager", "compiled"),
    clock: Literal["wall", "process"] = "wall",
    unets: Sequence[Literal["sd", "sdxl"]] = ("sd", "sdxl"),
    unet_width: int = 128,
) -> dict:
    """Seconds of a forward and backward pass, by network and mode, ours and diffusers', and our share of theirs.

    Args:
        widths: of MMDiTs, multiples of 64, the size of a head.
        layers: blocks; the time grows in proportion.
        latents: side of the latents, in latent pixels (32 is 256 px).
        batch: samples.
        repeats: rounds; times are medians, ratios are medians over the rounds' own ratios.
        threads: CPU threads.
        qk_norm: SD3.5's RMS norm of queries and keys.
        modes: "eager" and "compiled" (each block by torch.compile).
        clock: "process" counts this process's CPU time, for a machine that others use; with one thread only.
        unets: levels like Stable Diffusion 1's, or SDXL's.
        unet_width: channels of their finest level.
    """
    if clock == "process" and threads != 1:
        raise ValueError("clock=process adds up the threads' time: use it with threads=1")
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"threads": threads, "clock": clock, "cpu": {}}
    for width in widths:
        config = {
            "num_layers": layers,
            "num_attention_heads": width // 64,
            "sample_size": latents,
            "pos_embed_max_size": latents // 2,
            "qk_norm": "rms_norm" if qk_norm else None,
        }
        case = Case("mmdit", config, latents, batch, torch.device("cpu"), torch.float32)
        results["cpu"][f"width_{width}"] = {mode: _compare(case, mode, repeats, clock) for mode in modes}
    for name in unets:
        case = Case("unet", small_unet(name, unet_width), latents, batch, torch.device("cpu"), torch.float32)
        results["cpu"][f"unet_{name}"] = {mode: _compare(case, mode, repeats, clock) for mode in modes}
    if torch.cuda.is_available():
        results["gpu"] = _on_gpu(repeats)
    return results


def _compare(case: Case, mode: str, repeats: int, clock: str) -> dict[str, Any]:
    """Median seconds of ours, diffusers' in each memory layout, and (in eager mode) the floor; and our ratios."""
    ours, theirs = case.pair()
    channels_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    if mode == "compiled":
        torch._dynamo.reset()
        compile_all(blocks_of(ours), getattr(ours, "compiler_options", None))
        for network in (theirs, channels_last):
            compile_all(case.blocks_of_diffusers(network))
    inputs = case.inputs(ours)
    with torch.no_grad():
        reference = case.call_diffusers(theirs, inputs).float()
        error = ((ours(**inputs).float() - reference).norm() / reference.norm()).item()

    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: _backward(ours, ours(**inputs)),
        "diffusers": lambda: _backward(theirs, case.call_diffusers(theirs, inputs)),
    }
    if case.kind == "unet":  # only convolutions know of layouts
        strided = inputs | {"x": inputs["x"].to(memory_format=torch.channels_last)}
        contestants["diffusers_channels_last"] = lambda: _backward(
            channels_last, case.call_diffusers(channels_last, strided)
        )
    if mode == "eager":
        contestants["floor"] = _floor(contestants["ours"])
    seconds = _take_turns(contestants, repeats, case.device, clock)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in seconds if name.startswith("diffusers")), key=medians.__getitem__)
    result: dict[str, Any] = {
        "batch": case.batch,
        "output_error": error,
        **medians,
        "ratio": _median_ratio(seconds["ours"], seconds[best]),
    }
    if "floor" in seconds:
        result["floor_share"] = _median_ratio(seconds["floor"], seconds["ours"])
    return result


def _median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _on_gpu(repeats: int) -> dict[str, Any]:
    """SD3-medium and SDXL in bfloat16, compiled, at several sizes: seconds, share of diffusers' time, MFU."""
    device = torch.device("cuda")
    peak = _matmul_peak(device)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "matmul_peak_flops": peak}
    sizes = [(256, 32), (512, 16), (1024, 4)]
    cases = {f"sd3_{pixels}px": Case("mmdit", SD3, pixels // 8, n, device, torch.bfloat16) for pixels, n in sizes}
    cases |= {f"sdxl_{pixels}px": Case("unet", SDXL, pixels // 8, n, device, torch.bfloat16) for pixels, n in sizes}
    for name, case in cases.items():
        result = _compare(case, "compiled", repeats, "wall")
        flops = 3 * case.batch * case.flops()
        for contestant in ("ours", "diffusers"):
            result[f"mfu_{contestant}"] = flops / result[contestant] / peak
        results[name] = result
    return results


def _matmul_peak(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _take_turns({"matmul": lambda: a @ b}, repeats, device)["matmul"]
    return 2 * size**3 / min(seconds)


def _backward(network: nn.Module, prediction: Tensor) -> None:
    """Backward from a prediction, whose own values stand in for the loss's gradient; then forget the gradients."""
    prediction.backward(prediction.detach())
    network.zero_grad(set_to_none=True)


def _take_turns(
    contestants: dict[str, Callable[[], Any]], repeats: int, device: torch.device, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of `repeats` rounds, after one round unmeasured."""
    now = time.process_time if clock == "process" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name in sorted(contestants, reverse=turn % 2 == 1):
            _synchronize(device)
            start = now()
            contestants[name]()
            _synchronize(device)
            if turn > 0:
                seconds[name].append(now() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class _Like:
    """What a recorded tensor looked like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Recorder(TorchDispatchMode):
    """Writes down every arithmetic operator and what its arguments look like."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call the operator, and write it down if it is arithmetic."""
        kwargs = kwargs or {}
        if any(word in func.__name__ for word in ARITHMETIC):
            args_like, kwargs_like = tree_map_only(Tensor, _like, (args, kwargs))
            self.calls.append((func, args_like, kwargs_like))
        return func(*args, **kwargs)


def _like(tensor: Tensor) -> _Like:
    return _Like(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _floor(step: Callable[[], None]) -> Callable[[], None]:
    """The arithmetic of `step` alone: its operators again, in order, on random tensors of the same strides."""
    with _Recorder() as recorder:
        step()
    tensors: dict[_Like, Tensor] = {}

    def stand_in(like: _Like) -> Tensor:
        if like not in tensors:
            tensors[like] = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device).normal_()
        return tensors[like]

    calls = [(func, *tree_map_only(_Like, stand_in, (args, kwargs))) for func, args, kwargs in recorder.calls]

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return replay
