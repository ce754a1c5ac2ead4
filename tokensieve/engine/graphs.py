"""A decode step's inputs on the device, and on a GPU the step itself as a CUDA graph.

A step of a large model is thousands of kernels, each of a few microseconds: launched one by one, the processor would be slower than the
GPU. A graph is launched at once, but has fixed shapes and places: batch and page table are rounded up to powers of two, and inputs are
copied to where the graph was recorded to read them. A size is recorded when it first occurs.

Legend: B rows (sequences, and padding), P pages that a row of the page table names, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokensieve.ops.quant import PAGE_TOKENS

LEAST_PAGES = 16  # of a recorded page table


class StepInputs:
    """tokens, lengths, slots (B) and page_table (B, P), all int32 and beside each other, so that one copy brings them to the device."""

    def __init__(self, rows: int, pages: int, device: torch.device):
        pinned = device.type == "cuda"
        self._host = torch.zeros(rows * (3 + pages), dtype=torch.int32, pin_memory=pinned)
        self._device = self._host.to(device) if pinned else self._host
        self._parts = (rows, rows, rows, rows * pages)
        self.tokens, self.lengths, self.slots, table = self._device.split(self._parts)
        self.page_table = table.view(rows, pages)
        self._row_pages: list[tuple[Sequence[int], int]] = [((), 0)] * rows  # whose pages a row holds, and how many
        self._copied = torch.cuda.Event() if pinned else None

    def fill(self, tokens: Sequence[int], lengths: Sequence[int], pages: Sequence[list[int]]) -> None:
        """Of the first rows; the others are padding, which is nowhere written and sees nothing."""
        if self._copied is not None:
            self._copied.synchronize()  # the last copy reads what is written now
        host_tokens, host_lengths, host_slots, table = self._host.split(self._parts)
        B = len(lengths)
        slots = [row[(n - 1) // PAGE_TOKENS] * PAGE_TOKENS + (n - 1) % PAGE_TOKENS for row, n in zip(pages, lengths)]
        host_tokens.numpy()[:B], host_lengths.numpy()[:B], host_slots.numpy()[:B] = tokens, lengths, slots
        host_lengths[B:], host_slots[B:] = 0, -1
        rows = table.numpy().reshape(len(self._row_pages), -1)
        for b, mine in enumerate(pages):
            # A sequence's list of pages only grows: what was written of it for the last step is still right.
            held, count = self._row_pages[b]
            count = count if held is mine else 0
            most = min(len(mine), rows.shape[1])
            rows[b, count:most] = mine[count:most]
            self._row_pages[b] = mine, most
        if self._copied is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._copied.record()


class Graphs:
    """run: from inputs to logits (B, V), by the selector's name, on the GPU, the same every time but for what the inputs say."""

    def __init__(self, run: Callable[[StepInputs, str], Tensor], device: torch.device):
        self._run, self._device = run, device
        self._inputs: dict[tuple[int, int], StepInputs] = {}
        self._recorded: dict[tuple[int, int, str], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(
        self, tokens: Sequence[int], lengths: Sequence[int], pages: Sequence[list[int]], selector: str
    ) -> Tensor:
        size = _power_of_two(len(lengths)), max(LEAST_PAGES, _power_of_two(-(-max(lengths) // PAGE_TOKENS)))
        if size not in self._inputs:
            self._inputs[size] = StepInputs(*size, self._device)
        inputs = self._inputs[size]
        inputs.fill(tokens, lengths, pages)
        if (*size, selector) not in self._recorded:
            self._recorded[*size, selector] = self._record(inputs, selector)
        graph, logits_BV = self._recorded[*size, selector]
        graph.replay()
        return logits_BV[: len(lengths)]

    def _record(self, inputs: StepInputs, selector: str) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Runs once before: kernels are compiled then, which cannot be recorded. A step may run twice: it writes the same again."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._run(inputs, selector)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits_BV = self._run(inputs, selector)
        return graph, logits_BV


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
