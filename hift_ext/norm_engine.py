# SPDX-License-Identifier: Apache-2.0
"""The norm of a step's gradients, as engines offer it; csrc/core/norm.h has its order.

Apart from ops.py for its length only: it shares that module's face of the extension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hift_ext import ops  # which imports this: its names are there when a step asks for them


class NormEngine:
    """The norm of a step's gradients, by the compiled module."""

    _device: torch.device

    def sum_of_squares(
        self, rows: list[ops.Row], counts: Sequence[int], total: torch.Tensor
    ) -> None:
        """On torch's number of threads, or behind its current stream's work."""
        if self._device.type == "cpu":
            ops.extension.sum_of_squares(rows, counts, total.data_ptr(), torch.get_num_threads())
            return
        blocks = sum(-(-count // ops.extension.norm_block) for count in counts)
        sums = ops.cuda_memory(8 * blocks, self._device)
        place = self._device.index, ops.cuda_stream(self._device)
        ops.extension.cuda_sum_of_squares(rows, counts, sums.data_ptr(), total.data_ptr(), *place)

    def write_clip(
        self, total: torch.Tensor, limit: float, grad_scale: int, result: torch.Tensor
    ) -> None:
        """On the host, or behind the work of torch's current stream."""
        norm = result.data_ptr()
        arguments = total.data_ptr(), limit, grad_scale, norm, norm + 4
        if self._device.type == "cpu":
            ops.extension.write_clip(*arguments)
        else:
            ops.extension.cuda_write_clip(
                *arguments, self._device.index, ops.cuda_stream(self._device)
            )
