# SPDX-License-Identifier: Apache-2.0
# Adagrad. The reference follows Duchi et al. (JMLR 12, 2011), eps outside the root, with
# torch.optim's decay of the rate and start of the sum.

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

import hift_ext
from rules import Case, decays, log_floats, rates


def reference(
    p, g, state, t, *, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize
):
    g = (-g if maximize else g) + weight_decay * p
    total = state.get("sum", initial_accumulator_value) + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(total) + eps), {"sum": total}


CASES = [
    Case(
        rule="adagrad",
        ours=hift_ext.Adagrad,
        theirs=torch.optim.Adagrad,
        hypers=st.fixed_dictionaries(
            {
                "lr": rates(),
                "lr_decay": st.just(0.0) | log_floats(1e-3, 0.1),
                "weight_decay": decays(),
                "initial_accumulator_value": st.just(0.0) | log_floats(1e-3, 10.0),
                "eps": log_floats(1e-12, 1e-2),
                "maximize": st.booleans(),
            }
        ),
        typical={
            "lr": 0.05,
            "lr_decay": 0.01,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.1,
            "eps": 1e-10,
            "maximize": False,
        },
        divides=True,
        reference=reference,
    )
]
