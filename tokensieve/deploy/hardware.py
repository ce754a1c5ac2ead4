"""The machines that engines are set up for here: devices, memory, SGLang's image and options."""

from dataclasses import dataclass
from typing import Literal

from tokensieve.cost import GPUS


@dataclass(frozen=True)
class Hardware:
    """One machine.

    label: its name in messages. devices: how many it has. memory: bytes of one device. image: SGLang's container image.
    arguments: SGLang's options, for every model. sparse_arguments: its options for sparse models, in addition.
    fp8: whether the devices have FP8. maker: whose devices they are, which decides what a container needs.
    """

    label: str
    devices: int
    memory: float
    image: str
    arguments: tuple[str, ...] = ()
    sparse_arguments: tuple[str, ...] = ()
    fp8: bool = True
    maker: Literal["nvidia", "amd", "npu"] = "nvidia"


_NPU = (
    *("--attention-backend", "ascend", "--mem-fraction-static", "0.85"),
    *("--chunked-prefill-size", "32768", "--disable-radix-cache"),
)
_ROCM = ("--nsa-prefill-backend", "tilelang", "--nsa-decode-backend", "tilelang")  # one for each phase
HARDWARE = {
    "h200": Hardware("H200", 8, GPUS["h200"].memory, "lmsysorg/sglang:latest"),
    "b200": Hardware("B200", 8, GPUS["b200"].memory, "lmsysorg/sglang:latest"),
    "mi300": Hardware("MI300X", 8, 192e9, "lmsysorg/sglang:v0.5.8-rocm700-mi30x", sparse_arguments=_ROCM, maker="amd"),
    "mi350": Hardware(
        "MI350",
        8,
        GPUS["mi350"].memory,
        "lmsysorg/sglang:v0.5.8-rocm700-mi35x",
        sparse_arguments=_ROCM,
        maker="amd",
    ),
    "npu-a2": Hardware("A2 NPU", 8, 64e9, "lmsysorg/sglang:dsv32-a2", _NPU, fp8=False, maker="npu"),
    "npu-a3": Hardware("A3 NPU", 16, 64e9, "lmsysorg/sglang:dsv32-a3", _NPU, fp8=False, maker="npu"),
}
