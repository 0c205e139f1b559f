# SPDX-License-Identifier: Apache-2.0
# torch's own inputs and error inputs for each of its classes that we have: the same training, the
# same exceptions in the same words.

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from rules import find_cases
from tolerances import MOVED_ULPS, ULPS, ulps
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import hift_ext
from hift_ext import HiFTOptimizer

OURS = {case.theirs: case.ours for case in find_cases()}
INFOS = [info for info in optim_db if info.optim_cls in OURS]
FLAGS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
REFUSED = [{"capturable": True}, {"differentiable": True}]


def named(info, desc: str) -> str:
    return f"{info.optim_cls.__name__}-{desc}"


def inputs():
    for info in INFOS:
        for given in info.optim_inputs_func(device="cpu", dtype=torch.float32):
            yield pytest.param(info, given.kwargs, id=named(info, given.desc))


def error_inputs():
    for info in INFOS:
        for given in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            yield pytest.param(info, given, id=named(info, given.optimizer_error_input.desc))


def outcome(build) -> tuple[object, BaseException | None]:
    """What `build()` returns, or how it fails; a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return build(), None
        except Exception as error:
            return None, error


def problem():
    """A model of a matrix and a scalar factor, and the loss of a batch."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((10, 5), (10,), ())]
    data = torch.randn(20, 5, generator=generator)
    weight, bias, factor = params

    def loss():
        return ((data @ weight.T * factor + bias).pow(2)).mean()

    return params, loss


def as_params(params: list, form: str):
    """The same parameters, as each form in which torch takes them."""
    if form == "groups":
        return [{"params": params[:1], "lr": 0.02}, {"params": params[1:], "weight_decay": 0.2}]
    return [(f"p{i}", p) for i, p in enumerate(params)] if form == "named" else params


def trained(optimizer_of, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights before and after 20 steps."""
    params, loss = problem()
    before = torch.cat([p.detach().reshape(-1) for p in params]).numpy()
    optimizer = optimizer_of(as_params(params, form))

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(20):
        optimizer.step(closure)
    return before, torch.cat([p.detach().reshape(-1) for p in params]).numpy()


def test_every_class_is_in_the_database():
    assert {info.optim_cls for info in INFOS} == set(OURS)
    public = (getattr(hift_ext, name) for name in hift_ext.__all__)
    classes = {c for c in public if isinstance(c, type) and issubclass(c, HiFTOptimizer)}
    assert classes - {HiFTOptimizer} == set(OURS.values())


@pytest.mark.parametrize(("info", "kwargs"), list(inputs()))
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("form", ["list", "groups", "named"])
def test_trains_as_torch_does(info, kwargs, flags, form):
    kwargs = {**kwargs, **flags}

    def theirs(params):
        return info.optim_cls(params, **kwargs)

    def ours(params):
        return OURS[info.optim_cls](params, **kwargs, layers_per_group="all")

    wanted, error = outcome(lambda: trained(theirs, form))
    if error is not None:  # some rates as tensors are refused with foreach or fused
        with pytest.raises(type(error), match=re.escape(str(error))):
            trained(ours, form)
        return
    before, after = wanted
    got = trained(ours, form)[1]
    largest = np.maximum(np.abs(before), np.abs(after))
    assert ulps(got - after, largest).max() <= ULPS["torch, training"]
    assert np.median(ulps(after - before, largest)) >= MOVED_ULPS


@pytest.mark.parametrize(("info", "given"), list(error_inputs()))
def test_fails_as_torch_does(info, given):
    params, kwargs = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
    assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if params is None:
        params = [torch.nn.Parameter(torch.randn(2, 3))]
    _, theirs = outcome(lambda: info.optim_cls(params, **kwargs))
    _, ours = outcome(lambda: OURS[info.optim_cls](params, **kwargs, layers_per_group="all"))
    assert isinstance(theirs, given.error_type)
    assert type(ours) is type(theirs)
    assert re.search(given.error_regex, str(ours))
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(("info", "kwargs"), list(inputs()))
@pytest.mark.parametrize("flag", REFUSED, ids=str)
def test_capturable_and_differentiable_are_refused(info, kwargs, flag):
    params, _ = problem()
    name = next(iter(flag))
    if name == "capturable" and not info.has_capturable_arg:
        with pytest.raises(TypeError, match="capturable"):
            OURS[info.optim_cls](params, **kwargs, **flag, layers_per_group="all")
        return
    with pytest.raises(ValueError, match=f"{name}=True is not offered"):
        OURS[info.optim_cls](params, **kwargs, **flag, layers_per_group="all")
