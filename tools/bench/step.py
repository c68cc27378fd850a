"""MMDiT's forward and backward against diffusers' SD3Transformer2DModel: same weights, inputs, threads and layout.

Contestants take turns, in an order that flips from round to round, so that whatever else the machine does meets both.
Beside them runs the floor: the matrix products, convolutions and attentions of our own pass, recorded and called again
with nothing in between. On a GPU, SD3-medium's size is added, with the share of a matmul peak measured in the same run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from models.initialization import initialize
from models.mmdit import MMDiT

CONTEXT = 154
MEDIUM: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
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
) -> dict:
    """Seconds of a forward and backward pass, by width and mode, ours and diffusers', and our share of theirs.

    Args:
        widths: multiples of 64, the size of a head.
        layers: blocks; the time grows in proportion.
        latents: side of the latents, in latent pixels (32 is 256 px).
        batch: samples.
        repeats: rounds; times are medians, ratios are medians over the rounds' own ratios.
        threads: CPU threads.
        qk_norm: SD3.5's RMS norm of queries and keys.
        modes: "eager" and "compiled" (each block by torch.compile).
        clock: "process" counts this process's CPU time, for a machine that others use; with one thread only.
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
        case = _Case(config, latents, batch, torch.device("cpu"), torch.float32)
        results["cpu"][f"width_{width}"] = {mode: _compare(case, mode, repeats, clock) for mode in modes}
    if torch.cuda.is_available():
        results["gpu"] = _on_gpu(repeats)
    return results


@dataclass(frozen=True)
class _Case:
    """A network and its input: what both contestants get."""

    config: dict[str, Any]
    latents: int
    batch: int
    device: torch.device
    dtype: torch.dtype


def _compare(case: _Case, mode: str, repeats: int, clock: str) -> dict[str, Any]:
    """Median seconds of ours, diffusers' and (in eager mode) the floor, and their ratios."""
    ours, theirs = _pair(case)
    if mode == "compiled":
        torch._dynamo.reset()
        for block in (*ours.blocks, *theirs.transformer_blocks):
            block.compile(fullgraph=True)
    inputs = _inputs(ours, case)
    with torch.no_grad():
        reference = _call_diffusers(theirs, inputs).float()
        error = ((ours(**inputs).float() - reference).norm() / reference.norm()).item()

    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: _backward(ours, ours(**inputs)),
        "diffusers": lambda: _backward(theirs, _call_diffusers(theirs, inputs)),
    }
    if mode == "eager":
        contestants["floor"] = _floor(contestants["ours"])
    seconds = _take_turns(contestants, repeats, case.device, clock)
    result: dict[str, Any] = {
        "tokens": (case.latents // 2) ** 2 + CONTEXT,
        "batch": case.batch,
        "output_error": error,
        **{name: statistics.median(times) for name, times in seconds.items()},
        "ratio": _median_ratio(seconds["ours"], seconds["diffusers"]),
    }
    if "floor" in seconds:
        result["floor_share"] = _median_ratio(seconds["floor"], seconds["ours"])
    return result


def _median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _on_gpu(repeats: int) -> dict[str, Any]:
    """SD3-medium in bfloat16, compiled, at 256, 512 and 1024 px: seconds, share of diffusers' time, MFU."""
    device = torch.device("cuda")
    peak = _matmul_peak(device)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "matmul_peak_flops": peak}
    for pixels, batch in ((256, 32), (512, 16), (1024, 4)):
        case = _Case(MEDIUM, pixels // 8, batch, device, torch.bfloat16)
        result = _compare(case, "compiled", repeats, "wall")
        with torch.device("meta"):
            flops = 3 * batch * MMDiT(**MEDIUM).flops(case.latents, case.latents, CONTEXT)
        for name in ("ours", "diffusers"):
            result[f"mfu_{name}"] = flops / result[name] / peak
        results[f"{pixels}px"] = result
    return results


def _matmul_peak(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _take_turns({"matmul": lambda: a @ b}, repeats, device)["matmul"]
    return 2 * size**3 / min(seconds)


def _pair(case: _Case) -> tuple[MMDiT, Any]:
    """Our network and diffusers', with the same random weights."""
    import diffusers

    counterpart: Any = diffusers.SD3Transformer2DModel
    with case.device:
        ours = initialize(MMDiT(**case.config), seed=0)
        theirs = counterpart(**{k: v for k, v in ours.config.items() if k not in MMDiT.own_config})
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    state = {key: part for name, t in ours.state_dict().items() for key, part in ours.to_diffusers(name, t).items()}
    theirs.load_state_dict(state)
    return ours.to(case.dtype), theirs.to(case.dtype)


def _inputs(network: MMDiT, case: _Case) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, device=case.device).to(case.dtype)

    return {
        "x": normal(network.in_channels, case.latents, case.latents),
        "timestep": torch.rand(case.batch, device=case.device) * 1000,
        "context": normal(CONTEXT, network.config["joint_attention_dim"]),
        "pooled": normal(network.config["pooled_projection_dim"]),
    }


def _call_diffusers(network: Any, inputs: dict[str, Tensor]) -> Tensor:
    return network(
        hidden_states=inputs["x"],
        encoder_hidden_states=inputs["context"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["timestep"],
        return_dict=False,
    )[0]


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
