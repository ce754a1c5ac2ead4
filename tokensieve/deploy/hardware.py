"""The machines that engines are set up for here: devices, memory, SGLang's image and options."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hardware:
    """One machine.

    label: its name in messages. devices: how many it has. memory: bytes of one device. image: SGLang's container image.
    arguments: SGLang's options, for every model. sparse_arguments, sparse_environment: its options and environment
    variables for sparse models, in addition. fp8: whether the devices have FP8.
    """

    label: str
    devices: int
    memory: float
    image: str
    arguments: tuple[str, ...] = ()
    sparse_arguments: tuple[str, ...] = ()
    sparse_environment: Mapping[str, str] = field(default_factory=dict)
    fp8: bool = True


_NPU = (
    *("--attention-backend", "ascend", "--mem-fraction-static", "0.85"),
    *("--chunked-prefill-size", "32768", "--disable-radix-cache"),
)
HARDWARE = {
    "h200": Hardware("H200", 8, 141e9, "lmsysorg/sglang:dsv32"),
    "mi350": Hardware(
        "MI350",
        8,
        288e9,
        "lmsysorg/sglang:dsv32-rocm",
        sparse_arguments=(
            *("--disable-cuda-graph", "--mem-fraction-static", "0.85", "--page-size", "64"),
            *("--nsa-prefill", "tilelang", "--nsa-decode", "aiter"),
        ),
        sparse_environment={
            "SGLANG_NSA_FUSE_TOPK": "false",
            "SGLANG_NSA_KV_CACHE_STORE_FP8": "false",
            "SGLANG_NSA_USE_REAL_INDEXER": "true",
            "SGLANG_NSA_USE_TILELANG_PREFILL": "True",
        },
    ),
    "npu-a2": Hardware("A2 NPU", 8, 64e9, "lmsysorg/sglang:dsv32-a2", _NPU, fp8=False),
    "npu-a3": Hardware("A3 NPU", 16, 64e9, "lmsysorg/sglang:dsv32-a3", _NPU, fp8=False),
}
