# SPDX-License-Identifier: Apache-2.0
"""The norm of a step's gradients, as engines offer it; csrc/core/norm.h has its order.

Every engine that has the compiled module offers it so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hift_ext import ops


class NormEngine:
    """The norm of a step's gradients, by the compiled module."""

    why: str = ""
    _device: torch.device

    def sum_of_squares(
        self, rows: Sequence[ops.Row], counts: Sequence[int], total: torch.Tensor
    ) -> None:
        """On torch's number of threads, or behind its current stream's work."""
        if self._device.type == "cpu":
            ops.ext.sum_of_squares(rows, counts, total.data_ptr(), torch.get_num_threads())
            return
        blocks = sum(-(-count // ops.ext.norm_block) for count in counts)
        sums = ops.cuda_memory(8 * blocks, self._device)
        place = self._device.index, ops.cuda_stream(self._device)
        ops.ext.cuda_sum_of_squares(rows, counts, sums.data_ptr(), total.data_ptr(), *place)

    def write_clip(
        self, total: torch.Tensor, limit: float, grad_scale: int, result: torch.Tensor
    ) -> None:
        """On the host, or behind the work of torch's current stream."""
        norm = result.data_ptr()
        arguments = total.data_ptr(), limit, grad_scale, norm, norm + 4
        if self._device.type == "cpu":
            ops.ext.write_clip(*arguments)
        else:
            ops.ext.cuda_write_clip(*arguments, self._device.index, ops.cuda_stream(self._device))
