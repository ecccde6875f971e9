"""Hardware utilization: FLOPs of the model's products as a share of the device's peak."""

import torch

from bdh.model import BDHConfig

# Dense FLOP/s of one GPU by a part of its name, the longer names first: in bfloat16 on tensor cores, and in float32.
PEAK_FLOPS = {
    "B200": (2250e12, 75e12),
    "H200": (989.4e12, 66.9e12),
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX 6000 Ada": (364.2e12, 91.1e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def flops_per_token(config: BDHConfig, length: int, carry_state: bool = False) -> float:
    """Floating-point operations that training on one token takes: forward, and twice as much backward.

    Only matrix products are counted, a product and a sum as two; recomputed layers are not counted again. A layer costs
    2 * 3nD for encoder, encoder_v and decoder, and attention by the form that `attend` takes: T tokens at once
    2 * T * (n + hD), masked half included; a read and a write of the synapses 2 * nD each. Each gate of the heads takes
    2 * hD, and the triangular system of the delta rule as much as a product with a matrix of (T, T). Once a token comes
    the head, 2 * DV.

    Args:
        config: The model's.
        length: Tokens of a sequence (T).
        carry_state: Whether sequences go on from synapses, and leave some.
    """
    n, D, h = config.n_neurons, config.n_embd, config.n_head
    chunked = length > config.chunk_size
    within = 2 * min(length, config.chunk_size) * (n + h * D)
    synapses = 4 * n * D if chunked or carry_state else 0
    gates = 2 * h * D * (config.decay == "gated")
    if config.write == "delta":
        gates += 2 * h * D * (1 + min(length, config.chunk_size))
    return 3.0 * (config.n_layer * (6 * n * D + within + synapses + gates) + 2 * D * config.vocab_size)


def peak_flops(device: torch.device, bfloat16: bool) -> float | None:
    """Peak FLOP/s of one device; None if it is not known."""
    if device.type != "cuda":
        return None
    name = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    found = next((peaks for part, peaks in PEAK_FLOPS.items() if f" {part} " in name), None)
    if found is None or " Laptop " in name:
        return None
    return found[0 if bfloat16 else 1]
