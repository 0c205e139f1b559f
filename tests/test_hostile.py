# SPDX-License-Identifier: Apache-2.0
# Parameters and gradients as hostile code makes them: not finite, strided, aliased, lazily negated,
# of other types, ten thousand of them. The result is torch.optim's, or an error that says why.
"""Hostile parameters and gradients."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from rules import find_cases
from torch import nn

import hift_ext

RULES = [pytest.param(case, id=case.rule) for case in find_cases()]


def pair(case, values: torch.Tensor) -> list[tuple[nn.Parameter, torch.optim.Optimizer]]:
    """The same parameter twice, driven by us and by torch."""
    ours, theirs = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    return [
        (ours, case.ours([ours], layers_per_group="all", **case.typical)),
        (theirs, case.theirs([theirs], foreach=False, **case.typical)),
    ]


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite(case, scaled, value) -> None:
    results = []
    for p, optimizer in pair(case, torch.linspace(-1, 1, 50)):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        scaler.scale(torch.zeros(()))
        for bad in (False, True, False):
            p.grad = torch.linspace(1, 2, 50) * scaler.get_scale()
            if bad:
                p.grad[::7] = value
            scaler.step(optimizer)
            scaler.update()
        state = optimizer.state.get(p, {})
        results.append((p.detach(), {name: v for name, v in state.items() if v is not None}))
    (p, state), (q, expected) = results
    assert p.isfinite().all() == scaled
    torch.testing.assert_close(p, q, equal_nan=True, rtol=1e-5, atol=1e-6)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], equal_nan=True, rtol=1e-5, atol=1e-6)


class Own(torch.Tensor):
    """A subclass without behaviour of its own."""


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda p: torch.arange(24.0).view(6, 4).t(),
    "every second row": lambda p: torch.arange(48.0).view(8, 6)[::2],
    "expanded": lambda p: torch.arange(4.0)[:, None].expand(4, 6),
    "overlapping": lambda p: torch.arange(9.0).as_strided((4, 6), (1, 1)),
    "the parameter itself": lambda p: p.data,
    "negated": lambda p: torch.complex(p.data, torch.arange(24.0).view(4, 6)).conj().imag,
    "with a graph": lambda p: torch.ones(4, 6, requires_grad=True) * 2,
    "subclass": lambda p: torch.ones(4, 6).as_subclass(Own),
}


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_gradients_of_any_layout(case, name) -> None:
    results = []
    for p, optimizer in pair(case, torch.linspace(-1, 1, 24).view(4, 6)):
        for _ in range(2):
            p.grad = GRADIENTS[name](p)
            given = p.grad.clone()
            optimizer.step()
            assert name == "the parameter itself" or torch.equal(p.grad, given)
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_lazily_negated_gradients_of_one_element(shape) -> None:
    results = []
    for p, optimizer in pair(RULES[0].values[0], torch.ones(shape)):
        for _ in range(2):
            p.grad = torch.complex(torch.zeros(shape), torch.full(shape, 0.5)).conj().imag
            assert p.grad.is_neg()
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_what_torch_does_not_let_be_a_gradient() -> None:
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = hift_ext.AdamW([p], layers_per_group="all")
    for bad in (
        torch.ones(24),
        torch.ones(4, 6, dtype=torch.float64),
        torch.ones(4, 6, device="meta"),
    ):
        with pytest.raises(RuntimeError, match="attempting to assign a gradient"):
            p.grad = bad
    p.grad = torch.ones(4, 6)
    optimizer.step()
    assert not torch.equal(p.detach(), torch.ones(4, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_types_that_are_not_offered_change_nothing_of_their_group(dtype) -> None:
    good, bad = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).to(dtype))
    optimizer = hift_ext.SGD([good, bad], lr=0.1, momentum=0.9, layers_per_group="all")
    for p in (good, bad):
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=f"{dtype} parameter"):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(4))
    assert len(optimizer.state) == 0
    bad.grad = None
    optimizer.step()
    assert torch.equal(good.detach(), torch.full((4,), 0.9))


def test_integer_parameters_are_frozen_ones() -> None:
    p, counter = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).int(), requires_grad=False)
    optimizer = hift_ext.SGD([p, counter], lr=0.1, layers_per_group="all")
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(counter, torch.ones(4).int())
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        hift_ext.SGD([counter], layers_per_group="all")


def test_a_parameter_twice_is_updated_once() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = hift_ext.SGD([p, p], lr=0.25, momentum=0.9, layers_per_group="all")
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 0.75))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="more than one parameter group"):
        hift_ext.SGD([{"params": [p]}, {"params": [p]}], layers_per_group="all")
    with pytest.raises(ValueError, match="in two groups"):
        hift_ext.SGD([("a", p)], groups=[["a"], [p]])


def test_parameters_that_share_a_storage() -> None:
    results = []
    for theirs in (False, True):
        flat = torch.linspace(-1, 1, 150)
        views = [nn.Parameter(flat[:100]), nn.Parameter(flat[50:])]  # 50 elements belong to both
        if theirs:
            optimizer = torch.optim.SGD(views, lr=0.25, foreach=False)
        else:
            optimizer = hift_ext.SGD(views, lr=0.25, layers_per_group="all")
        for p in views:
            p.grad = torch.ones(100)
        optimizer.step()
        results.append(flat)
    assert torch.equal(*results)


def test_a_parameter_whose_elements_share_memory_is_refused_as_by_torch() -> None:
    for make in (
        lambda p: hift_ext.SGD([p], lr=0.1, layers_per_group="all"),
        lambda p: torch.optim.SGD([p], lr=0.1, foreach=False),
    ):
        p = nn.Parameter(torch.zeros(1).expand(5))
        p.grad = torch.arange(5.0)
        with pytest.raises(RuntimeError, match="single memory location"):
            make(p).step()
        assert torch.equal(p.detach(), torch.zeros(5))


# Many and none ------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """Python's collector looks at what a test makes, not at all that the tests before have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("own_garbage")
def test_ten_thousand_tiny_parameters_in_a_thousand_groups() -> None:
    def params(count: int) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"layers.{i // 10}.p{i % 10}", nn.Parameter(torch.zeros(2, 2))) for i in range(count)
        ]

    def times(count: int) -> dict[str, float]:
        named = params(count)

        def construct() -> float:
            took, optimizer = seconds(lambda: hift_ext.AdamW(named, lr=0.1))
            optimizer.close()
            return took

        made = min(construct() for _ in range(3))
        optimizer = hift_ext.AdamW(named, lr=0.1)
        assert len(optimizer.groups) == count // 10
        for _, p in named:
            p.requires_grad_(True)
            p.grad = torch.ones(2, 2)
        # The first pass makes the state; of the next ones the quickest is what it costs.
        optimizer.step()

        def quickest(work: Callable[[], object]) -> float:
            return min(seconds(work)[0] for _ in range(3))

        stepped = quickest(lambda: [optimizer.step() for _ in optimizer.groups])
        saved = quickest(optimizer.state_dict)
        state = optimizer.state_dict()
        loaded = quickest(lambda: optimizer.load_state_dict(state))
        assert all(p.detach()[0, 0] != 0 for _, p in named)
        optimizer.close()
        return {"construction": made, "a pass": stepped, "state_dict": saved, "load": loaded}

    few, many = times(1000), times(10_000)
    # Ten times as many may take 25 times as long; quadratic cost takes 100 times.
    for what, took in many.items():
        assert took < 25 * max(few[what], 0.01), (what, few, many)
    named = params(10_000)
    theirs, reference = seconds(lambda: torch.optim.AdamW(named, lr=0.1, foreach=False))
    for _, p in named:
        p.grad = torch.ones(2, 2)
    theirs, _ = seconds(reference.step)
    assert many["a pass"] < 5 * theirs


def test_parameters_without_elements_and_without_dimensions() -> None:
    results = []
    for make in (
        lambda p: hift_ext.AdamW(p, lr=0.1, layers_per_group="all"),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    ):
        params = [nn.Parameter(t) for t in (torch.empty(0, 3), torch.ones(()), torch.ones(1, 1))]
        optimizer = make(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["exp_avg"] for p in params)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
