"""GPUs by name: their memory, and the published peaks of their dense matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..runtime.errors import UserError

# A GPU sold with 12 GB has a little less than 12 x 2^30 bytes available.
SHOWN_BYTES_PER_GB = 0.97 * 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory as it is sold, GB, and dense peaks with sums in fp32, TFLOP/s, without sparsity; fp8 None: not in hardware."""

    name: str
    memory_gb: int
    bf16: float
    fp8: float | None
    fp32: float
    source: str

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * SHOWN_BYTES_PER_GB)

    def seconds(self, flops: Mapping[str, float], share: float) -> float:
        """The time of these operations, by number format, at this share of the peaks."""
        peaks = {"bf16": self.bf16, "fp16": self.bf16, "fp8_e4m3fn": self.fp8 or self.bf16}
        return sum(count / (share * 1e12 * peaks.get(number_format, self.fp32)) for number_format, count in flops.items())


AMPERE = "NVIDIA Ampere GA102 GPU Architecture (whitepaper)"
ADA = "NVIDIA Ada GPU Architecture (whitepaper)"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture (whitepaper)"
GPUS = (
    Gpu("RTX 3090", 24, 71, None, 35.6, AMPERE),
    Gpu("RTX 4070 Ti", 12, 80.2, 160.4, 40.1, ADA),
    Gpu("RTX 4080", 16, 97.5, 194.9, 48.7, ADA),
    Gpu("RTX 4090", 24, 165.2, 330.3, 82.6, ADA),
    Gpu("RTX 5080", 16, 112.6, 225.1, 56.3, BLACKWELL),
    Gpu("RTX 5090", 32, 209.5, 419, 104.8, BLACKWELL),
    Gpu("RTX A6000", 48, 154.8, None, 38.7, AMPERE),
    Gpu("L40S", 48, 362, 733, 91.6, "NVIDIA L40S datasheet, half of the numbers with sparsity"),
    Gpu("A100", 80, 312, None, 19.5, "NVIDIA A100 80GB datasheet"),
    Gpu("H100", 80, 989, 1979, 67, "NVIDIA H100 datasheet, SXM, half of the numbers with sparsity"),
    Gpu("H200", 141, 989, 1979, 67, "NVIDIA H200 datasheet, SXM, half of the numbers with sparsity"),
)


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; case, spaces and the maker's name do not count."""
    key = _key(name)
    for gpu in GPUS:
        if _key(gpu.name) == key:
            return gpu
    raise UserError(
        f"--gpu: {name} is not in the table of GPUs; expected one of {', '.join(gpu.name for gpu in GPUS)}.",
        "name one of these, or give --memory for whether the run fits.",
    )


def _key(name: str) -> str:
    return "".join(name.lower().split()).removeprefix("nvidia").removeprefix("geforce")
