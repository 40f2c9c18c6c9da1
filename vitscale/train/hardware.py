"""Peak arithmetic of accelerators, for the model FLOPs utilisation."""

from __future__ import annotations

import torch

# Dense bf16 tensor-core FLOP/s of NVIDIA's data sheets, by a part of the device's name; the first match counts.
_PEAK_BF16_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of a device, or ``None`` if it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16_FLOPS.items() if part in name), None)
