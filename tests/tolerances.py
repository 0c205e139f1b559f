# SPDX-License-Identifier: Apache-2.0
# The one table of tolerances, in ulp (unit in the last place of float32) of the largest magnitude
# an element has had so far. What must be equal to the bit has no entry here.

from __future__ import annotations

import numpy as np

ULPS = {
    # One step from the same weights and state, against float64 with unrounded hyper-parameters.
    "reference, one step, weights": 8.0,
    "reference, one step, state": 5.0,
    # A run of its own: 1 - lr * weight_decay is rounded once and then errs in one direction, up to
    # half an ulp a step.
    "reference, a run": 12.0,
    "reference, each step of a run": 1.0,
    # torch.optim in float32, a run of its own of 50 steps: its root is not correctly rounded, and
    # it divides by the bias correction where we multiply.
    "torch, weights": 16.0,
    "torch, state": 8.0,
    "torch fused, weights": 16.0,
    "torch fused, state": 32.0,
    # One step of torch.optim from our weights and state; only the weights may differ.
    "torch, one step, weights": 8.0,
    # 20 steps of training, where gradients depend on the weights and so on earlier differences.
    "torch, training": 16.0,
}

MOVED_ULPS = 1000.0
"""What the steps of every element must add up to: an update that is hardly there fails."""


def ulps(error: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """`error` in ulp of `magnitude`, element by element."""
    unit = np.spacing(np.maximum(magnitude, np.finfo(np.float32).tiny).astype(np.float32))
    return np.abs(error) / unit.astype(np.float64)
