"""What kernels that copy 16 bytes at a time ask of a tensor."""

from torch import Tensor


def aligned(x: Tensor) -> Tensor:
    """`x`, any shape and dtype, contiguous and at an address that is a multiple of 16 bytes; copied only where it is not so."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def pages_in_lines(pages: Tensor, token_bytes: int) -> bool:
    """Whether pages of bytes can be read so where they lie: tokens one after the other, pages anywhere at multiples of 16 bytes."""
    return pages.stride()[1:] == (token_bytes, 1) and pages.stride(0) % 16 == 0 and pages.data_ptr() % 16 == 0
