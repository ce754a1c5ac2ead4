"""The GPUs that costs are given for, by their makers' published figures.

Peaks are those of dense matrices, without structured sparsity. Bandwidths of links are one way. Sources:

- H100, H200: NVIDIA's data sheets of the SXM boards; peaks are half of what they state with sparsity. The network is
  one 400 Gbit/s adapter a GPU, as in DGX H100 and H200.
- H800: an H100 whose NVLink has 400 GB/s, both ways, instead of 900. The rest is the H100's. DeepSeek-V3's report
  (arXiv 2412.19437, section 3.1) describes eight of them a machine, with InfiniBand between machines.
- All of these are on 16 lanes of PCIe 5.0, 64 GB/s one way, of which the host's memory is read and written.
- B200: NVIDIA's data sheet of HGX B200, an eighth of its eight GPUs. The network is one 400 Gbit/s adapter a GPU.
- MI350: AMD's data sheet of the Instinct MI350X. Seven Infinity Fabric links of 153.6 GB/s both ways. The network is
  one 400 Gbit/s adapter a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokensieve.config import UserError

NODE = 8  # GPUs of one machine, for all of these


@dataclass(frozen=True)
class Gpu:
    """One GPU. bf16, fp8: peak FLOP/s. bandwidth: of its memory, bytes/s. memory: bytes.

    link: bytes/s to the other GPUs of its machine, network: to those of other machines, host: to the host's memory.
    hopper: whether the kernels measured on an H200 are made for it.
    """

    name: str
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    link: float
    network: float
    hopper: bool = False
    host: float = 64e9


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name.lower(): gpu
        for gpu in (
            Gpu("H100", 989.5e12, 1979e12, 3.35e12, 80e9, 450e9, 50e9, hopper=True),
            Gpu("H200", 989.5e12, 1979e12, 4.8e12, 141e9, 450e9, 50e9, hopper=True),
            Gpu("H800", 989.5e12, 1979e12, 3.35e12, 80e9, 200e9, 50e9, hopper=True),
            Gpu("B200", 2250e12, 4500e12, 8e12, 180e9, 900e9, 50e9),
            Gpu("MI350", 2300e12, 4600e12, 8e12, 288e9, 537.6e9, 50e9),
        )
    }
)


def gpu_of(name: str) -> Gpu:
    """The GPU of this name, in any case. UserError for one that is not in the table."""
    if name.lower() not in GPUS:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise UserError(f"GPU {name!r} is unknown; use one of {known}")
    return GPUS[name.lower()]
