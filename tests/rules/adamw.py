# SPDX-License-Identifier: Apache-2.0
# AdamW and Adam, each with and without AMSGrad. The reference follows arXiv 1412.6980, 1711.05101
# and 1904.09237, eps outside the root, the maximum taken before the bias correction, as in torch.

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

import hift_ext
from rules import Case, decays, log_floats, rates


def reference(p, g, state, t, *, decoupled, lr, betas, eps, weight_decay, amsgrad, maximize):
    beta1, beta2 = betas
    g = -g if maximize else g
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g * g
    new = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = new["max_exp_avg_sq"] = np.maximum(v, state.get("max_exp_avg_sq", 0.0))
    return p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), new


def case(rule, ours, theirs, *, decoupled, amsgrad):
    fixed = {"amsgrad": amsgrad}
    hypers = st.fixed_dictionaries(
        {
            "lr": rates(),
            # Below 0.5 torch's lerp counts from the other end.
            "betas": st.tuples(st.floats(0.0, 0.999), st.floats(0.3, 0.9999)),
            "eps": log_floats(1e-12, 1e-2),
            "weight_decay": decays(),
            "amsgrad": st.just(amsgrad),
            "maximize": st.booleans(),
        }
    )
    typical = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "maximize": False,
        **fixed,
    }
    return Case(rule, ours, theirs, hypers, typical, True, partial(reference, decoupled=decoupled))


ADAMW, ADAM = (hift_ext.AdamW, torch.optim.AdamW), (hift_ext.Adam, torch.optim.Adam)

CASES = [
    case("adamw", *ADAMW, decoupled=True, amsgrad=False),
    case("adamw_amsgrad", *ADAMW, decoupled=True, amsgrad=True),
    case("adam", *ADAM, decoupled=False, amsgrad=False),
    case("adam_amsgrad", *ADAM, decoupled=False, amsgrad=True),
]
