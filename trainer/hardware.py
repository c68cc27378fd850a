"""What devices can do at best."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A kind of GPU.

    Args:
        name: torch's device names contain it.
        peak_flops: dense bf16 matrix FLOP/s, by the vendor's data sheet.
        memory: bytes that torch reports; of kinds with several, the most.
    """

    name: str
    peak_flops: float
    memory: int


# A name that another contains comes after it.
DEVICES = (
    Device("B200", 2250e12, 178 << 30),
    Device("H200", 989e12, 139 << 30),
    Device("H100 PCIe", 756e12, 79 << 30),
    Device("H100 NVL", 835e12, 93 << 30),
    Device("H100", 989e12, 79 << 30),
    Device("A100", 312e12, 79 << 30),
    Device("L40S", 362e12, 44 << 30),
    Device("L4", 121e12, 22 << 30),
    Device("A10G", 70e12, 22 << 30),
)


def device_named(name: str) -> Device | None:
    """The kind of a device of that name; None where it is not known."""
    return next((device for device in DEVICES if device.name in name), None)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device in bf16; None where it is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    known = device_named(torch.cuda.get_device_name(device))
    return known.peak_flops if known is not None else None
