# SPDX-License-Identifier: Apache-2.0
# Clipping by norm and gradient scaling, as users write them: beside plain torch, where nothing may
# change at all, and to the bit against the order of additions that csrc/core/norm.h promises.

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import models
import pytest
import torch
from reference import ReferenceHiFT
from torch import nn

import hift_ext
from hift_ext.clipping import clip

INF, NAN = float("inf"), float("nan")
OURS = [(hift_ext.AdamW, torch.optim.AdamW, 1e-2), (hift_ext.SGD, torch.optim.SGD, 0.5)]
each_rule = pytest.mark.parametrize(("ours", "theirs", "lr"), OURS, ids=["adamw", "sgd"])


def promised_norm(gradients) -> torch.Tensor:
    """The norm as csrc/core/norm.h has it added up, in float32."""
    total = 0.0
    for gradient in gradients:
        flat = gradient.detach().double().flatten()
        rows = nn.functional.pad(flat, (0, -flat.numel() % 4096)).view(-1, 32, 128)
        column = torch.zeros(len(rows), 128, dtype=torch.float64)
        for row in range(32):
            column += rows[:, row] * rows[:, row]
        while column.shape[1] > 1:
            half = column.shape[1] // 2
            column = column[:, :half] + column[:, half:]
        for block in column[:, 0].tolist():
            total += block
    return torch.tensor(math.sqrt(total), dtype=torch.float32)


def everything(model: nn.Module, optimizer: Any) -> list[Any]:
    """What a step may change: weights, state, counts, turn, latched rates."""
    saved = optimizer.state_dict()
    state = [
        (key, name, value.tolist())
        for key, entry in sorted(saved["state"].items())
        for name, value in sorted(entry.items())
    ]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in saved["param_groups"]]
    turn = optimizer.active, optimizer.pass_index, optimizer._schedule.latched
    weights = [p.tolist() for p in models.weights(model).values()]
    return [weights, state, groups, turn]


def assert_unchanged(before: list[Any], model: nn.Module, optimizer: Any) -> None:
    after = everything(model, optimizer)
    for name, a, b in zip(("weights", "state", "settings", "turn"), before, after, strict=True):
        assert a == b, f"the {name} changed"


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_near(model: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_has_the_promised_bits(isa, dtype, threads) -> None:
    torch.manual_seed(0)
    shapes = [(300, 400), (3,), (0, 5), (), (4096,), (7, 4097), (65536,)]
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    torch.set_num_threads(threads)
    with hift_ext.SGD(params, lr=1.0, layers_per_group="all", max_grad_norm=0.5) as optimizer:
        for scale in (0.1, 30.0):
            for p in params:
                p.grad = (scale * torch.randn(p.shape).exp()).to(dtype)
            optimizer.step()
            assert optimizer.grad_norm is not None
            assert optimizer.grad_norm.shape == ()
            assert torch.equal(optimizer.grad_norm, promised_norm(p.grad for p in params))


def test_gradients_of_any_strides_count_once() -> None:
    torch.manual_seed(0)
    image = nn.Parameter(torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last))
    matrix, vector = nn.Parameter(torch.zeros(40, 30)), nn.Parameter(torch.zeros(30))
    image.grad = torch.randn(8, 3, 5, 5)
    matrix.grad = torch.randn(30, 40).t()
    vector.grad = torch.randn(1).expand(30)
    params = [image, matrix, vector]
    optimizer = hift_ext.SGD(params, lr=1.0, layers_per_group="all", max_grad_norm=1.0)
    expected = nn.utils.get_total_norm([p.grad for p in params])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected)
    stepped = torch.cat([p.detach().flatten() for p in params]).norm()
    torch.testing.assert_close(stepped, torch.tensor(1.0))


@each_rule
def test_clipped_training_is_torchs(ours, theirs, lr) -> None:
    model = models.tiny(blocks=2)
    plain = models.twin(model)
    with ours(model, lr=lr, max_grad_norm=0.05) as optimizer:
        names = [
            [n for p in g.params for n, q in model.named_parameters() if q is p]
            for g in optimizer.groups
        ]
        named = dict(plain.named_parameters())
        reference = ReferenceHiFT([[named[n] for n in group] for group in names], theirs, lr=lr)
        clipped = 0
        for tokens in models.batches(9):
            models.loss_of(model, tokens).backward()
            kept = [g.clone() for g in grads_of(model)]
            optimizer.step()
            assert all(map(torch.equal, kept, grads_of(model)))  # no gradient is written
            optimizer.zero_grad()
            reference.freeze()
            models.loss_of(plain, tokens).backward()
            active = reference.groups[reference.order[reference.position]]
            norm = nn.utils.clip_grad_norm_(active, 0.05)
            torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-4, atol=0)
            clipped += bool(norm > 0.05)
            reference.step()
        assert clipped > 4
        assert_near(model, plain)


@each_rule
@pytest.mark.parametrize("limit", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
def test_grad_scaler_with_accumulation(ours, theirs, lr, limit, unscaled) -> None:
    """Two micro-batches a step, an overflow now and then, beside the same without a scaler."""
    model = models.tiny(blocks=1)
    plain = models.twin(model)
    optimizer = ours(model, lr=lr, max_grad_norm=limit)
    reference = ours(plain, lr=lr, max_grad_norm=limit)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    data = models.batches(14)
    for step in range(7):
        pair = data[2 * step : 2 * step + 2]
        for tokens in pair:
            scaler.scale(models.loss_of(model, tokens) / 2).backward()
        overflow = step in (0, 3)
        if overflow:
            grads_of(model)[-1].view(-1)[-1] = INF if step else NAN
        if unscaled:
            scaler.unscale_(optimizer)
        before = everything(model, optimizer)
        scaler.step(optimizer)
        scaler.update(1024.0)
        optimizer.zero_grad()
        if overflow:
            assert_unchanged(before, model, optimizer)
            continue
        for tokens in pair:
            (models.loss_of(plain, tokens) / 2).backward()
        reference.step()
        reference.zero_grad()
        assert optimizer.active == reference.active
        if limit is None:
            assert optimizer.grad_norm is reference.grad_norm is None
        else:
            # The norm is of the gradients without the scaler's factor.
            torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-4, atol=0)
    assert_near(model, plain)
    assert models.changed(models.weights(models.tiny(blocks=1)), model)


def test_users_own_clipping_before_the_step() -> None:
    """clip_grad_norm_ after unscale_, as torch's documentation has it."""
    model = models.tiny(blocks=1)
    plain = models.twin(model)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    inside = hift_ext.AdamW(plain, lr=1e-2, max_grad_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for tokens in models.batches(6):
        scaler.scale(models.loss_of(model, tokens)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        models.loss_of(plain, tokens).backward()
        inside.step()
        inside.zero_grad()
        torch.testing.assert_close(inside.grad_norm, norm, rtol=1e-4, atol=0)
    assert_near(model, plain)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("warm", [0, 1, 2, 3])
def test_a_norm_that_is_not_finite_raises_before_anything_changes(value, warm) -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2, max_grad_norm=1.0, error_if_nonfinite=True)
    data = models.batches(warm + 1)
    models.train(model, optimizer, data[:warm])
    models.loss_of(model, data[warm]).backward()
    grads = grads_of(model)
    good = grads[0].clone()
    grads[0].view(-1)[3] = value
    before = everything(model, optimizer)
    versions = [p._version for p in model.parameters()]
    name = optimizer.groups[optimizer.active].name
    with pytest.raises(RuntimeError, match=re.escape(f"{name!r} is non-finite")):
        optimizer.step()
    assert_unchanged(before, model, optimizer)
    assert versions == [p._version for p in model.parameters()]
    assert not optimizer.grad_norm.isfinite()
    grads[0].copy_(good)
    optimizer.step()  # nothing stands in the way of going on
    assert optimizer.grad_norm.isfinite()
    assert optimizer.active != before[3][0] or len(optimizer.groups) == 1


def test_without_the_error_a_norm_that_is_not_finite_does_as_torchs() -> None:
    for value in (NAN, INF):
        results = []
        for inside in (True, False):
            p = nn.Parameter(torch.ones(5))
            p.grad = torch.tensor([1.0, 2.0, value, 0.0, -1.0])
            limit = 0.5 if inside else None
            optimizer = hift_ext.SGD([p], lr=1.0, layers_per_group="all", max_grad_norm=limit)
            if not inside:
                nn.utils.clip_grad_norm_([p], 0.5)
            optimizer.step()
            results.append(p.detach())
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_a_skipped_step_raises_nothing() -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.full((5,), NAN)
    optimizer = hift_ext.SGD(
        [p], lr=1.0, layers_per_group="all", max_grad_norm=1.0, error_if_nonfinite=True
    )
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert torch.equal(p, torch.ones(5))
    assert optimizer.grad_norm is None
    # Where the flag is on a device the step is taken, and changes nothing; no error then either.
    optimizer.found_inf = torch.zeros(1)
    p.grad.fill_(1.0)
    optimizer.step()
    p.grad.fill_(NAN)
    rows = [(0, p.data_ptr(), p.grad.data_ptr(), 0, 0)]
    assert clip(optimizer, rows, [5], None, torch.ones(1)).isnan()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip(optimizer, rows, [5], None, torch.zeros(1))


def test_a_sum_over_processes_comes_before_the_coefficient() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    sums = []

    def reduce(total: torch.Tensor) -> None:
        sums.append((total.dtype, total.item()))
        total += 64.0

    optimizer = hift_ext.SGD([p], lr=1.0, layers_per_group="all", max_grad_norm=1.0)
    optimizer._reduce_norm = reduce
    optimizer.step()
    assert sums == [(torch.float64, 36.0)]
    assert optimizer.grad_norm == 10.0
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.3))


def test_the_norm_that_was_read_stays() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = hift_ext.SGD([p], lr=1.0, layers_per_group="all", max_grad_norm=100.0)
    assert optimizer.grad_norm is None
    norms = []
    for value in (1.0, 2.0, 3.0):
        p.grad = torch.full((4,), value)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert norms == [2.0, 4.0, 6.0]
    assert torch.equal(p.detach(), torch.full((4,), -6.0))  # below the limit nothing is scaled
    p.grad = None
    with pytest.warns(UserWarning, match="no parameter of the active group"):
        optimizer.step()
    assert optimizer.grad_norm == 6.0
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.grad_norm == 6.0


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "-1.0", {"max_grad_norm": -1.0}),
        (ValueError, "nan", {"max_grad_norm": NAN}),
        (TypeError, "'1'", {"max_grad_norm": "1"}),
        (TypeError, "True", {"max_grad_norm": True}),
        (ValueError, "needs max_grad_norm", {"error_if_nonfinite": True}),
        (TypeError, "error_if_nonfinite", {"max_grad_norm": 1.0, "error_if_nonfinite": 1}),
    ],
)
def test_wrong_options_are_refused(error, words, options) -> None:
    with pytest.raises(error, match=words):
        hift_ext.SGD(models.tiny(), **options)
