"""The inputs of a decode step on the device, and on a GPU the step itself as a CUDA graph.

A step of a large model is thousands of kernels of a few microseconds each. If they were launched one by one, the
processor would be slower than the GPU. A graph is launched at once, but its shapes and addresses are fixed. So the
batch and the page table are rounded up to powers of two, and inputs are copied to where the graph reads them. A size
is recorded when it first occurs.

Legend: B rows (sequences, and padding), P pages in a row of the page table, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokensieve.ops.quant import PAGE_TOKENS

LEAST_PAGES = 16  # width of the smallest page table that is recorded


class StepInputs:
    """Inputs of a step: tokens, lengths, slots (B) and page_table (B, P), all int32.

    They lie beside each other, so that one copy brings them to the device.
    """

    def __init__(self, rows: int, pages: int, device: torch.device):
        pinned = device.type == "cuda"
        self._host = torch.zeros(rows * (3 + pages), dtype=torch.int32, pin_memory=pinned)
        self._device = self._host.to(device) if pinned else self._host
        self._parts = (rows, rows, rows, rows * pages)
        self.tokens, self.lengths, self.slots, table = self._device.split(self._parts)
        self.page_table = table.view(rows, pages)
        # of each row: the list that it was filled from, and how many of its pages it holds
        self._row_pages: list[tuple[Sequence[int], int]] = [((), 0)] * rows
        self._copied = torch.cuda.Event() if pinned else None

    def fill(self, tokens: Sequence[int], lengths: Sequence[int], pages: Sequence[list[int]]) -> None:
        """Fills the first rows, one per sequence. The other rows are padding: they write no entry and see no key.

        lengths: tokens of each sequence, with the new one. pages: pages of each sequence, in order.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last copy must have read the memory that is written now
        host_tokens, host_lengths, host_slots, table = self._host.split(self._parts)
        B = len(lengths)
        slots = [row[(n - 1) // PAGE_TOKENS] * PAGE_TOKENS + (n - 1) % PAGE_TOKENS for row, n in zip(pages, lengths)]
        host_tokens.numpy()[:B], host_lengths.numpy()[:B], host_slots.numpy()[:B] = tokens, lengths, slots
        host_lengths[B:], host_slots[B:] = 0, -1
        rows = table.numpy().reshape(len(self._row_pages), -1)
        for b, sequence in enumerate(pages):
            # A sequence's list of pages only grows, so the part that was written for the last step is still right.
            source, count = self._row_pages[b]
            count = count if source is sequence else 0
            end = min(len(sequence), rows.shape[1])
            rows[b, count:end] = sequence[count:end]
            self._row_pages[b] = sequence, end
        if self._copied is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._copied.record()


class Graphs:
    """Recorded decode steps, one per batch size, page table width and selector.

    run: step from inputs and the selector's name to logits (B, V). It runs on the GPU, and everything in it but the
        values of the inputs is the same every time.
    """

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
        """Graph of a step, and the logits that it writes.

        The step runs once before it is recorded, to compile its kernels, because compilation cannot be recorded. A step
        may run twice: it writes the same again.
        """
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
    """Smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
