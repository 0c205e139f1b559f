# SPDX-License-Identifier: Apache-2.0
# One call that looks at all of a group's tensors stands for the closer look at each: what it
# accepts gets the same bits, and what it does not accept gets the same error.

from __future__ import annotations

import pytest
import torch
from torch import nn

import hift_ext
from hift_ext import ops


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


def double(p: nn.Parameter) -> None:
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.ones_like(p)


def sparse(p: nn.Parameter) -> None:
    p.grad = p.grad.to_sparse()


def resized(p: nn.Parameter) -> None:
    p.grad = None
    p.data = torch.zeros(7)
    p.grad = torch.ones(7)


def transposed(p: nn.Parameter) -> None:
    p.data = p.data.t().contiguous().t()


def expanded(p: nn.Parameter) -> None:
    p.grad = torch.randn(3, 1).expand(3, 4)


def transposed_grad(p: nn.Parameter) -> None:
    p.grad = p.grad.t().contiguous().t()


def half(p: nn.Parameter) -> None:
    p.grad = None
    p.data = p.data.half()
    p.grad = torch.ones_like(p)


def subclass(p: nn.Parameter) -> None:
    p.grad = p.grad.as_subclass(Named)


def absent(p: nn.Parameter) -> None:
    p.grad = None


def offset(p: nn.Parameter) -> None:
    p.data = torch.randn(13)[1:].view(3, 4)


def plain(p: nn.Parameter) -> None:
    pass


CHANGES = (
    plain,
    absent,
    offset,
    half,
    transposed,
    transposed_grad,
    expanded,
    subclass,
    double,
    sparse,
    resized,
)
ACCEPTED = (plain, absent, offset, half)


def steps(change) -> tuple:
    """Weights, visits and error of a step after one on plain tensors and a change."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    params += [nn.Parameter(torch.randn(())), nn.Parameter(torch.empty(0, 3))]
    decayed = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.5, "lr": 0.1}]
    with hift_ext.AdamW(decayed, lr=1e-2, layers_per_group="all") as optimizer:
        error = None
        for turn in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            if turn == 1:
                change(params[1])
            try:
                optimizer.step()
            except (RuntimeError, TypeError) as raised:
                error = (type(raised), str(raised))
                break
        visits = [entry.visits for entry in optimizer.state.entries.values()]
        state = [optimizer.state[p]["exp_avg_sq"].clone() for p in params if p in optimizer.state]
    return [p.detach().clone() for p in params], state, visits, error


@pytest.mark.needs("exchange")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_quick_look_and_closer_look_agree(change, monkeypatch) -> None:
    looks = []
    quick = ops.plain_rows

    def looking(*args):
        rows = quick(*args)
        looks.append(rows is not None)
        return rows

    monkeypatch.setattr(ops, "plain_rows", looking)
    found = steps(change)
    # The first step lays the state out; the second is the one after the change.
    assert looks[0] is (change in ACCEPTED)
    monkeypatch.setattr(ops, "plain_rows", lambda *args: None)
    expected = steps(change)
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
    assert found[2:] == expected[2:]
    assert (expected[3] is not None) == (change in (double, sparse, resized))


@pytest.mark.needs("exchange")
def test_quick_look_tells_addresses_and_kinds() -> None:
    p, q, absent_grad = (nn.Parameter(torch.ones(2, 3).to(t)) for t in (torch.half,) * 3)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    wanted = [(p, 0, 6, 0), (absent_grad, 1, 6, 0), (q, 5, 6, 1)]
    rows = ops.plain_rows(wanted, ["adamw", "sgd"], -1)
    assert list(rows) == [
        (0, p.data_ptr(), p.grad.data_ptr(), ops.kind("adamw", torch.half, torch.half), 0),
        (5, q.data_ptr(), q.grad.data_ptr(), ops.kind("sgd", torch.half, torch.half), 1),
    ]
    assert ops.plain_rows([(p, 0, 7, 0)], ["adamw"], -1) is None
    assert ops.plain_rows([(p, 0, 6, 0)], ["adamw"], 0) is None  # not on CUDA device 0
    with pytest.raises(ValueError, match="hypers 1"):
        ops.plain_rows([(p, 0, 6, 1)], ["adamw"], -1)


class Known:
    """A flag as one that came from a GPU: known late, or at once."""

    def __init__(self, value: bool, known: bool) -> None:
        self.value, self.is_known, self.waited = value, known, False

    def known(self) -> bool:
        return self.is_known

    def raised(self) -> bool:
        self.waited = True
        return self.value


def test_visits_of_skipped_steps_are_taken_back_when_the_flag_is_known() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with hift_ext.AdamW(model, lr=1e-2) as optimizer:
        for _ in range(2):
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        entries, state = optimizer._entries, optimizer.state
        late, skipped, counted = Known(True, False), Known(True, True), Known(False, True)
        for group, flag in ((0, late), (1, skipped), (1, counted)):
            for entry in entries[group]:
                entry.visits += 1
            state.doubt(entries[group], flag)
        # The step of group 0 must know; of others it asks only what has come.
        late.is_known = False
        state.settle(1)
        assert [e.visits for e in entries[1]] == [2, 2]
        assert (late.waited, skipped.waited, counted.waited) == (False, True, True)
        assert [e.visits for e in entries[0]] == [2, 2]
        step = state[model[0].weight]["step"]
        assert late.waited
        assert step == 1
        assert [e.visits for e in entries[0]] == [1, 1]


@pytest.mark.needs("exchange", "grad_dtype")
def test_quick_look_tells_a_gradient_of_another_type() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.ones(4)
    rows = ops.plain_rows([(p, 0, 4, 0)], ["adamw"], -1)
    assert rows is not None
    assert rows[0][3] == ops.kind("adamw", torch.bfloat16, torch.float32)


@pytest.mark.parametrize("quick", [True, False])
def test_every_parameter_counts_its_own_visits(quick, monkeypatch) -> None:
    if not quick:
        monkeypatch.setattr(ops, "plain_rows", lambda *args: None)

    def made() -> list[dict]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, 2)) for _ in range(5)]
        return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.5}]

    settings = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3}
    ours = hift_ext.AdamW(made(), layers_per_group="all", **settings)
    theirs = torch.optim.AdamW(made(), **settings)
    absent: tuple[set[int], ...] = (set(), {1, 4}, set(), {0}, {1, 2, 3, 4}, set(), set(), {2})
    for turn, left_out in enumerate(absent):
        for optimizer in (ours, theirs):
            torch.manual_seed(turn)
            members = [p for group in optimizer.param_groups for p in group["params"]]
            for index, p in enumerate(members):
                grad = torch.randn_like(p)
                p.grad = None if index in left_out else grad
            optimizer.step()
        if turn == 5:  # loaded, the counts are equal at once; and a setting changes
            state = theirs.state_dict()
            for entry in state["state"].values():
                entry["step"] = torch.tensor(9.0)
            for optimizer in (ours, theirs):
                optimizer.load_state_dict(state)
                optimizer.param_groups[1]["eps"] = 1e-2
        for p, q in zip(ours.state.entries, theirs.state, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            assert ours.state[p]["step"] == theirs.state[q]["step"]


def test_state_that_was_not_laid_out_is_refused_at_any_step() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = hift_ext.SGD(
        [{"params": params[:1]}, {"params": params[1:]}], layers_per_group="all"
    )
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["momentum"] = 0.9
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"param_group 1 now needs the state momentum_buffer"):
            optimizer.step()
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[1]["momentum"] = 0
    optimizer.step()
    assert not any(map(torch.equal, params, before))


def test_what_has_no_gradient_is_not_marked_as_changed() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = hift_ext.SGD(params, layers_per_group="all")
    for turn in range(3):
        params[0].grad, params[1].grad = torch.ones(3), torch.ones(3) if turn == 0 else None
        late = (params[1] * params[1].detach().clone().requires_grad_()).sum()
        optimizer.step()
        if turn == 0:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                late.backward()
        else:
            late.backward()


def test_a_layout_made_anew_is_used() -> None:
    """More state is loaded while a parameter is transposed; it is row-major again after."""

    def made() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(3, 4))]

    (p,), (q,) = made(), made()
    ours = hift_ext.Adam([p], lr=0.1, layers_per_group="all")
    theirs = torch.optim.Adam([q], lr=0.1)

    def step() -> None:
        grad = torch.randn(3, 4)
        for optimizer, param in ((ours, p), (theirs, q)):
            param.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    step()
    step()
    theirs = torch.optim.Adam([q], lr=0.1, amsgrad=True)
    q.grad = torch.randn(3, 4)
    theirs.step()
    p.grad = None
    p.data = q.detach().t().contiguous().t()
    ours.load_state_dict(theirs.state_dict())
    step()
    p.grad = None
    p.data = p.detach().contiguous()
    step()
    for key in ("exp_avg", "max_exp_avg_sq"):
        torch.testing.assert_close(ours.state[p][key], theirs.state[q][key], rtol=1e-6, atol=1e-6)
