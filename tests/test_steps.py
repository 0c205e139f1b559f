# SPDX-License-Identifier: Apache-2.0
# The update loops through the raw binding, where every count, misalignment, thread and instruction
# set is within reach. Results are compared to the bit, and with them what lies between spans.

from __future__ import annotations

import itertools

import _hift_ext
import pytest
import torch
from spans import CASES, NAMES, PAIRS, Buffers, hyper_of, on_baseline

from hift_ext import ops

WIDTH = 17  # one more than the lanes of the widest vector


def pair_name(pair) -> str:
    return "-".join(NAMES[t] for t in pair)


each_rule = pytest.mark.parametrize("rule", list(ops.RULES))
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=pair_name)


def placements(buffers: int) -> list[tuple[int, list[int]]]:
    """Every count of 0..2 vectors, with every misalignment of each buffer alone and of all."""
    starts = [[0] * buffers]
    for offset in range(1, WIDTH):
        starts += [[offset * (b == other) for b in range(buffers)] for other in range(buffers)]
        starts += [[offset] * buffers, [(offset * (b + 3)) % WIDTH for b in range(buffers)]]
    return list(itertools.product(range(2 * WIDTH + 1), starts))


@each_rule
@each_pair
def test_every_count_and_misalignment(rule, pair, isa):
    """Nothing but the span changes, and the span as in one long aligned one."""
    # A slot begins 64-byte aligned; 14 elements or more lie between one span and the next.
    slot, buffers = 64, ops.RULES[rule][1] + 2
    cases = placements(buffers)
    arena = Buffers.random(rule, pair, slot * (len(cases) + 1))
    assert all(t.data_ptr() % 64 == 0 for t in arena.all)
    hyper = hyper_of(CASES[rule])
    counts = torch.tensor([count for count, _ in cases])
    starts = torch.tensor([offsets for _, offsets in cases])
    starts += slot * torch.arange(len(cases))[:, None] + 8
    spans = [
        arena.span(count, start, hyper)
        for count, start in zip(counts.tolist(), starts.tolist(), strict=True)
    ]
    # Element j of span i, in every buffer.
    element = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(
        counts
    )
    index = [column.repeat_interleave(counts) + element for column in starts.T]
    param, grad, *state = (t[i] for t, i in zip(arena.all, index, strict=True))
    gathered = on_baseline(Buffers(rule, param, grad, state))
    expected = arena.clone()
    for whole, part, i in zip(expected.all, gathered.all, index, strict=True):
        whole[i] = part
    assert (expected.param != arena.param).sum() > len(index[0]) // 2
    _hift_ext.step_spans(spans)
    arena.assert_equal(expected)


@each_rule
@each_pair
def test_one_element_at_a_time(rule, pair, isa):
    """Many spans in one call, one call for each, and one span over all: the same."""
    count = 67
    whole = Buffers.random(rule, pair, count)
    at_once, in_turn = whole.clone(), whole.clone()
    hyper, places = hyper_of(CASES[rule]), [[i] * len(whole.all) for i in range(count)]
    _hift_ext.step_spans([at_once.span(1, place, hyper) for place in places])
    for place in places:
        _hift_ext.step_spans([in_turn.span(1, place, hyper)])
    whole.step()
    at_once.assert_equal(whole)
    in_turn.assert_equal(whole)


@each_rule
@each_pair
def test_special_values(rule, pair, isa):
    """NaN, infinities, subnormal, tiny and huge values, in every combination."""
    values = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-41, -1e-45, 1e-20, 0.0, -0.0, 1.0]
    buffers = ops.RULES[rule][1] + 2
    grid = torch.tensor(list(itertools.product(values, repeat=min(buffers, 4)))).T.contiguous()
    rows = [grid[b % 4].clone() for b in range(buffers)]
    before = Buffers(rule, rows[0].to(pair[0]), rows[1].to(pair[1]), rows[2:])
    expected, got = on_baseline(before.clone()), before.clone().step()
    # Which NaN comes out of two is the processor's choice.
    got.assert_equal(expected, payloads=False)
    finite = torch.stack([t.float().isfinite() for t in expected.all])
    assert finite.any(1).all()
    assert not finite.all(1).any()


@each_rule
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2]], ids=pair_name)
def test_threads(rule, pair):
    """1, 2, 3 and 7 threads, over spans that are cut and spans that are not."""
    counts = [0, 1, 33, 100_003, 65_543, 1, 90_001, 5]
    before = Buffers.random(rule, pair, sum(counts) + 3)
    hyper = [hyper_of(CASES[rule], visit) for visit in range(1, len(counts) + 1)]
    starts = list(itertools.accumulate(counts, initial=3))

    def step(threads: int) -> Buffers:
        b = before.clone()
        spans = [
            b.span(count, [start] * len(b.all), h)
            for count, start, h in zip(counts, starts, hyper, strict=False)
        ]
        _hift_ext.step_spans(spans, threads=threads)
        return b

    one = step(1)
    assert (one.param != before.param).float().mean() > 0.5
    assert (one.param != before.param)[-5:].any()
    for threads in (2, 3, 7):
        step(threads).assert_equal(one)


@each_rule
@each_pair
@pytest.mark.parametrize(("scale", "clip"), [(None, 0.3), (65536.0, None), (1024.0, 0.7)])
def test_gradient_scale_and_clip(rule, pair, isa, scale, clip):
    """As if the gradients had been float32 and multiplied by clip / scale."""
    before = Buffers.random(rule, pair, 301)
    factor = torch.tensor((1.0 if clip is None else clip), dtype=torch.float32).double()
    factor = (factor / (1.0 if scale is None else scale)).float()
    expected = before.clone()
    expected.grad = expected.grad.float() * factor
    expected.step()
    scalars = {
        name: torch.tensor(value)
        for name, value in (("grad_scale", scale), ("clip", clip))
        if value is not None
    }
    got = before.clone().step(**{name: t.data_ptr() for name, t in scalars.items()})
    expected.grad = before.grad
    got.assert_equal(expected)
    assert not torch.equal(got.param, before.clone().step().param)


@each_rule
def test_maximize_is_the_factor_of_the_gradient(rule, isa):
    before = Buffers.random(rule, PAIRS[0], 133)
    ascent, negated = before.clone(), before.clone()
    hyper = hyper_of(CASES[rule])
    _hift_ext.step_spans([ascent.span(133, hyper=(-1.0, *hyper[1:]))])
    negated.grad.neg_()
    negated.step()
    negated.grad.neg_()
    ascent.assert_equal(negated)


@each_rule
@each_pair
@pytest.mark.parametrize("found", [1.0, -2.0, float("inf"), float("nan")])
def test_found_inf_changes_nothing(rule, pair, found):
    before = Buffers.random(rule, pair, 50)
    flag = torch.tensor(found)
    before.clone().step(found_inf=flag.data_ptr()).assert_equal(before)
    flag.zero_()
    go_on = before.clone().step(found_inf=flag.data_ptr())
    go_on.assert_equal(before.clone().step())
    assert not torch.equal(go_on.param, before.param)


def bad_calls():
    """(name, change of a good row, words of the message)."""
    adamw, f32 = ops.RULES["adamw"][0], torch.float32

    def replace(**fields):
        names = ("param", "grad", "count", "kind", "state", "hyper")
        return lambda row: tuple(fields.get(n, v) for n, v in zip(names, row, strict=True))

    yield "null parameter", replace(param=0), "span of 9 elements for rule adamw has a null"
    yield "null gradient", replace(grad=0), "span of 9 elements for rule adamw has a null"
    yield (
        "null state",
        lambda r: (*r[:4], [r[4][0], 0], r[5]),
        "9 elements for rule adamw has a null",
    )
    yield "negative count", replace(count=-3), "must not be negative: -3"
    yield "unknown rule", replace(kind=200), "rule 200 is not in the list of 7"
    yield "unknown type", replace(kind=adamw | 3 << 8), "dtype code 3"
    yield "unknown gradient type", replace(kind=adamw | 5 << 12), "dtype code 5"
    yield "negative kind", replace(kind=-1), "is not"
    for p, g in itertools.product(ops.DTYPE_CODES, repeat=2):
        if (p, g) not in PAIRS:
            code_p, code_g = ops.DTYPE_CODES[p], ops.DTYPE_CODES[g]
            words = f"parameter type {code_p} with gradient type {code_g}"
            yield f"{p} with {g}", replace(kind=adamw | code_p << 8 | code_g << 12), words
    yield "one state", lambda r: (*r[:4], r[4][:1], r[5]), "takes 2 state streams, not 1"
    yield "three states", lambda r: (*r[:4], [*r[4], r[0]], r[5]), "takes 2 state streams, not 3"
    yield "few hypers", lambda r: (*r[:5], r[5][:-1]), "takes 1 + 7 numbers, not 7"
    yield "many hypers", lambda r: (*r[:5], (*r[5], 1.0)), "takes 1 + 7 numbers, not 9"
    yield "no hypers", replace(hyper=()), "takes 1 + 7 numbers, not 0"
    yield "five fields", lambda r: r[:5], "tuple of six"
    assert f32 in ops.DTYPE_CODES


@pytest.mark.parametrize(("change", "words"), [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_bad_rows_are_errors_that_change_nothing(change, words):
    good, bad = (Buffers.random("adamw", PAIRS[0], 9, seed) for seed in (1, 2))
    before = good.clone(), bad.clone()
    rows = [good.span(9), change(bad.span(9))]
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        _hift_ext.step_spans(rows)
    good.assert_equal(before[0])
    bad.assert_equal(before[1])


@pytest.mark.parametrize("threads", [0, -1])
def test_number_of_threads_is_checked(threads):
    before = Buffers.random("sgd", PAIRS[0], 9)
    after = before.clone()
    with pytest.raises(ValueError, match=f"threads must be at least 1: {threads}"):
        after.step(threads=threads)
    after.assert_equal(before)


def test_nothing_to_do():
    _hift_ext.step_spans([])
    _hift_ext.step_spans([], threads=4)
    empty = (0, 0, 0, ops.kind("sgd", torch.float32, torch.float32), [], hyper_of(CASES["sgd"]))
    _hift_ext.step_spans([empty, empty], threads=4)


def test_unknown_instruction_set():
    offered = ", ".join(ops.build_info()["isas"])
    with pytest.raises(ValueError, match=f"'mmx' is not offered on this processor; .*: {offered}"):
        _hift_ext.use_instruction_set("mmx")
