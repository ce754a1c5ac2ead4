"""What kernels that copy 16 bytes at a time ask of a tensor."""

from torch import Tensor


def aligned(x: Tensor) -> Tensor:
    """`x`, any shape and dtype, contiguous and at an address that is a multiple of 16 bytes; copied only where it is not so."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
