"""What is known of GPUs, from their makers' data sheets: peaks without sparsity, links in one direction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`memory` and bandwidths in bytes (a second), peaks in FLOP/s. `link` joins the GPUs of a host, `network` is one
    GPU's share of what joins hosts."""

    name: str
    memory: float
    bandwidth: float
    peak_bf16: float
    peak_fp32: float
    link: float
    network: float
    per_host: int = 8

    def peak(self, precision: str) -> float:
        return self.peak_bf16 if precision == "bf16" else self.peak_fp32


_GB = 1e9
GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        name="A100 80 GB", memory=80 * 2**30, bandwidth=2039 * _GB, peak_bf16=312e12, peak_fp32=19.5e12,
        link=300 * _GB, network=25 * _GB,
    ),
    "a100_40": Gpu(
        name="A100 40 GB", memory=40 * 2**30, bandwidth=1555 * _GB, peak_bf16=312e12, peak_fp32=19.5e12,
        link=300 * _GB, network=25 * _GB,
    ),
    "h100": Gpu(
        name="H100 SXM 80 GB", memory=80 * 2**30, bandwidth=3350 * _GB, peak_bf16=989e12, peak_fp32=67e12,
        link=450 * _GB, network=50 * _GB,
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB", memory=141 * _GB, bandwidth=4800 * _GB, peak_bf16=989e12, peak_fp32=67e12,
        link=450 * _GB, network=50 * _GB,
    ),
    "b200": Gpu(
        name="B200 180 GB", memory=180 * _GB, bandwidth=8000 * _GB, peak_bf16=2250e12, peak_fp32=80e12,
        link=900 * _GB, network=50 * _GB,
    ),
}  # fmt: skip

# What of a GPU's memory a run may fill: the rest is CUDA's context, NCCL's buffers and the allocator's gaps.
RESERVED = 1.5 * 2**30
USABLE = 0.95


def usable_memory(memory: float) -> float:
    """Bytes of a GPU that weights, state and activations may take."""
    return USABLE * memory - RESERVED
