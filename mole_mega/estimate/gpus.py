"""What is known of GPUs, from their makers' data sheets: peaks without sparsity, links in one direction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`memory` and bandwidths in bytes (a second), peaks in FLOP/s. `link` joins the GPUs of a host, `network` is one
    GPU's share of what joins hosts."""

    name: str
    capability: tuple[int, int]
    memory: float
    bandwidth: float
    peak_bf16: float
    peak_fp32: float
    peak_fp8: float | None  # None: it multiplies no FP8
    link: float
    network: float
    per_host: int = 8

    def peak(self, precision: str) -> float:
        """Of products in fp32, bf16 or fp8; where it has none in FP8, of those in bf16."""
        if precision == "fp32":
            return self.peak_fp32
        return self.peak_fp8 or self.peak_bf16 if precision == "fp8" else self.peak_bf16


_GB = 1e9
GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        name="A100 80 GB", memory=80 * 2**30, bandwidth=2039 * _GB, peak_bf16=312e12, peak_fp32=19.5e12,
        capability=(8, 0), peak_fp8=None, link=300 * _GB, network=25 * _GB,
    ),
    "a100_40": Gpu(
        name="A100 40 GB", memory=40 * 2**30, bandwidth=1555 * _GB, peak_bf16=312e12, peak_fp32=19.5e12,
        capability=(8, 0), peak_fp8=None, link=300 * _GB, network=25 * _GB,
    ),
    "h100": Gpu(
        name="H100 SXM 80 GB", memory=80 * 2**30, bandwidth=3350 * _GB, peak_bf16=989e12, peak_fp32=67e12,
        capability=(9, 0), peak_fp8=1979e12, link=450 * _GB, network=50 * _GB,
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB", memory=141 * _GB, bandwidth=4800 * _GB, peak_bf16=989e12, peak_fp32=67e12,
        capability=(9, 0), peak_fp8=1979e12, link=450 * _GB, network=50 * _GB,
    ),
    "b200": Gpu(
        name="B200 180 GB", memory=180 * _GB, bandwidth=8000 * _GB, peak_bf16=2250e12, peak_fp32=80e12,
        capability=(10, 0), peak_fp8=4500e12, link=900 * _GB, network=50 * _GB,
    ),
}  # fmt: skip

# What CUDA calls them, told apart by words that all are in the name. Cards with NVL in it have peaks of their own.
_CUDA_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("A100", "40GB"), "a100_40"), (("A100", "80GB"), "a100"), (("H100", "HBM3"), "h100"), (("H200",), "h200"),
    (("B200",), "b200"),
)  # fmt: skip


def find_gpu(cuda_name: str) -> Gpu | None:
    """The GPU that CUDA calls so ("NVIDIA H100 80GB HBM3"); None for one whose data sheet is not here."""
    words = cuda_name.replace("-", " ").split()
    if "NVL" in words:
        return None
    return next((GPUS[key] for wanted, key in _CUDA_NAMES if set(wanted) <= set(words)), None)


# What of a GPU's memory a run may fill: the rest is CUDA's context, NCCL's buffers and the allocator's gaps.
RESERVED = 1.5 * 2**30
USABLE = 0.95


def usable_memory(memory: float) -> float:
    """Bytes of a GPU that weights, state and activations may take."""
    return USABLE * memory - RESERVED
