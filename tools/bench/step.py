"""MMDiT's forward and backward against diffusers' SD3Transformer2DModel: same weights, inputs, threads and layout.

Contestants take turns, in an order that flips from round to round, so that whatever else the machine does meets both.
Beside them runs the floor: the matrix products, convolutions and attentions of our own pass, recorded and called again
with nothing in between. On a GPU, SD3-medium's size is added, with the share of a matmul peak measured in the same run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from models.initialization import initialize
from models.mmdit import MMDiT

CONTEXT = 154
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
# Operators that do the arithmetic; what else a pass calls is overhead to a floor.
ARITHMETIC = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "attention")


def run(
    widths: tuple[int, ...] = (384, 768, 1536),
    layers: int = 2,
    latents: int = 32,
    batch: int = 2,
    repeats: int = 7,
    threads: int = 1,
    qk_norm: bool = False,
    modes: tuple[str, ...] = ("eager", "compiled"),
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
    results: dict[str, Any] = {
        "threads": threads,
        "torch": torch.__version__,
        "cpu": {
            f"width_{width}": _compare(
                _config(layers, width // 64, latents, qk_norm),
                latents,
                batch,
                repeats,
                modes,
                torch.device("cpu"),
                clock=clock,
            )
            for width in widths
        },
    }
    if torch.cuda.is_available():
        results["gpu"] = _on_gpu(repeats)
    return results


def _config(layers: int, heads: int, latents: int, qk_norm: bool) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "sample_size": latents,
        "pos_embed_max_size": latents // 2,
        "qk_norm": "rms_norm" if qk_norm else None,
    }


def _compare(
    config: dict[str, Any],
    latents: int,
    batch: int,
    repeats: int,
    modes: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    clock: str = "wall",
) -> dict[str, Any]:
    results: dict[str, Any] = {"tokens": (latents // 2) ** 2 + CONTEXT, "batch": batch}
    for mode in modes:
        ours, theirs = _pair(config, device, dtype)
        if mode == "compiled":
            torch._dynamo.reset()
            for block in (*ours.blocks, *theirs.transformer_blocks):
                block.compile(fullgraph=True)
        inputs = _inputs(ours, latents, batch, device, dtype)
        contestants = {
            "ours": lambda net=ours, kw=inputs: _step(net, net(**kw)),
            "diffusers": lambda net=theirs, kw=inputs: _step(net, _call_diffusers(net, kw)),
        }
        if mode == "eager":
            contestants["floor"] = _floor(contestants["ours"])
        seconds = _take_turns(contestants, repeats, device, clock)
        entry = {name: statistics.median(times) for name, times in seconds.items()}
        entry["ratio"] = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True))
        if "floor" in seconds:
            share = [a / b for a, b in zip(seconds["floor"], seconds["ours"], strict=True)]
            entry["floor_share"] = statistics.median(share)
        results[mode] = entry
    return results


def _on_gpu(repeats: int) -> dict[str, Any]:
    """SD3-medium in bfloat16, compiled, at 256, 512 and 1024 px: seconds, share of diffusers' time, MFU."""
    device = torch.device("cuda")
    peak = _matmul_peak(device)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "matmul_peak_flops": peak}
    for pixels, batch in ((256, 32), (512, 16), (1024, 4)):
        latents = pixels // 8
        entry = _compare(MEDIUM, latents, batch, repeats, ("compiled",), device, torch.bfloat16)
        with torch.device("meta"):
            flops = 3 * batch * MMDiT(**MEDIUM).flops(latents, latents, CONTEXT)
        for name in ("ours", "diffusers"):
            entry[f"mfu_{name}"] = flops / entry["compiled"][name] / peak
        results[f"{pixels}px"] = entry
    return results


def _matmul_peak(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _take_turns({"matmul": lambda: a @ b}, repeats, device)["matmul"]
    return 2 * size**3 / min(seconds)


def _pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[MMDiT, Any]:
    """Our network and diffusers', with the same random weights."""
    import diffusers

    counterpart: Any = diffusers.SD3Transformer2DModel
    with torch.device(device):
        ours = initialize(MMDiT(**config), seed=0)
        theirs = counterpart(**{k: v for k, v in ours.config.items() if k not in MMDiT.own_config})
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.add_(noise, alpha=0.02)
    state = {key: part for name, t in ours.state_dict().items() for key, part in ours.to_diffusers(name, t).items()}
    theirs.load_state_dict(state)
    return ours.to(dtype), theirs.to(dtype)


def _inputs(network: MMDiT, latents: int, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device).to(dtype)

    return {
        "x": normal(network.in_channels, latents, latents),
        "timestep": torch.rand(batch, generator=generator, device=device) * 1000,
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


def _step(network: nn.Module, prediction: Tensor) -> None:
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
