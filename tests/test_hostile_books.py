# SPDX-License-Identifier: Apache-2.0
# Settings, members and state changed by hand, rubbish in a state_dict, and what a program may have
# switched on around us. Refused before anything changes, and usable again once corrected.
"""Hostile settings, states and surroundings."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn

import hift_ext

NAN, INF = float("nan"), float("inf")


def trained(steps: int = 3, **options) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2, **options)
    models.train(model, optimizer, models.batches(steps))
    return model, optimizer


def frozen_copy(optimizer: hift_ext.HiFTOptimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def assert_same_state(a: dict, b: dict) -> None:
    assert a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)


# Settings -----------------------------------------------------------------------------------------

SETTINGS = [
    ("lr", NAN, r"\['lr'\] is nan"),
    ("lr", INF, r"\['lr'\] is inf"),
    ("lr", "0.1", r"\['lr'\] is '0.1'"),
    ("lr", None, r"\['lr'\] is None"),
    ("lr", torch.tensor([0.1, 0.2]), r"\['lr'\] is tensor\(\[0.1"),
    ("betas", (1.0, 0.9), r"betas=\(1.0, 0.9\).*division by zero"),
    ("betas", (0.9, 2.0), r"betas=\(0.9, 2.0\)"),
    ("betas", (NAN, 0.9), r"betas=\(nan, 0.9\).*not finite"),
    ("betas", (0.9,), r"betas=\(0.9,\)"),
    ("eps", NAN, "eps=nan"),
    ("eps", "small", "eps='small'.*could not convert"),
    ("weight_decay", INF, "weight_decay=inf"),
    ("weight_decay", None, "NoneType"),
]


@pytest.mark.parametrize(("key", "value", "words"), SETTINGS)
@pytest.mark.parametrize("position", [0, 1])
def test_settings_that_cannot_be_used(key, value, words, position) -> None:
    model, optimizer = trained(3 + position)
    group = optimizer.param_groups[0]
    before, weights, good = frozen_copy(optimizer), models.weights(model), group[key]
    models.loss_of(model, models.batches(1)[0]).backward()
    group[key] = value
    if key == "lr" and position == 1:  # this pass has its rate; the next one would fail
        optimizer.step()
        assert optimizer.current_lr == 1e-2
        return
    with pytest.raises(
        ValueError, match=rf"(?s)param_groups\[0\].*{words}|{words}.*changed nothing"
    ):
        optimizer.step()
    assert not models.changed(weights, model)
    group[key] = good
    assert_same_state(optimizer.state_dict(), before)
    optimizer.step()
    assert models.changed(weights, model) == set(optimizer.groups[position].names)


def test_settings_that_torch_takes_too() -> None:
    """torch checks signs when an optimizer is made, and never again."""
    results = []
    for ours in (True, False):
        p = nn.Parameter(torch.linspace(-1, 1, 9))
        if ours:
            optimizer = hift_ext.AdamW([p], lr=0.1, layers_per_group="all")
        else:
            optimizer = torch.optim.AdamW([p], lr=0.1, foreach=False)
        for settings in ({"lr": -0.1}, {"lr": 0.1, "eps": -1e-3}, {"weight_decay": -0.5}):
            optimizer.param_groups[0].update(settings)
            p.grad = torch.ones(9)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_rate_that_is_a_tensor_is_read_where_a_pass_begins() -> None:
    model, optimizer = trained(3)
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = rate
    for expected in (0.5, 0.25):
        models.train(model, optimizer, models.batches(1))
        rate.mul_(0.5)
        models.train(model, optimizer, models.batches(1))
        assert optimizer.current_lr == expected
        models.train(model, optimizer, models.batches(1))
    other = hift_ext.SGD([nn.Parameter(torch.ones(2))], lr=rate, layers_per_group="all")
    assert other.current_lr == pytest.approx(0.125)


# Members and state --------------------------------------------------------------------------------


def take_out(groups: list[dict]) -> None:
    groups[0]["params"] = groups[0]["params"][:3]


def put_in(groups: list[dict]) -> None:
    groups[0]["params"].append(nn.Parameter(torch.ones(3)))


def exchange(groups: list[dict]) -> None:
    groups[0]["params"][0] = nn.Parameter(torch.ones(50, 24))


def append_group(groups: list[dict]) -> None:
    groups.append({"params": [nn.Parameter(torch.ones(3))]})


@pytest.mark.parametrize("change", [take_out, put_in, exchange, append_group, list.clear])
def test_members_changed_by_hand(change) -> None:
    model, optimizer = trained(3)
    good = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    before, weights = frozen_copy(optimizer), models.weights(model)
    change(optimizer.param_groups)
    models.loss_of(model, models.batches(1)[0]).backward()
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"changed by hand.*add_param_group"):
            call()
    assert not models.changed(weights, model)
    optimizer.param_groups[:] = good
    assert_same_state(optimizer.state_dict(), before)
    optimizer.step()
    assert models.changed(weights, model) == set(optimizer.groups[0].names)


EDITS: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "set": lambda state, p: state.__setitem__(p, {}),
    "del": lambda state, p: state.__delitem__(p),
    "clear": lambda state, p: state.clear(),
    "pop": lambda state, p: state.pop(p),
    "update": lambda state, p: state.update({p: {}}),
    "setdefault": lambda state, p: state.setdefault(p, {}),
}


@pytest.mark.parametrize("edit", sorted(EDITS))
def test_entries_of_the_state_cannot_be_set(edit) -> None:
    model, optimizer = trained(3)
    before = frozen_copy(optimizer)
    with pytest.raises(TypeError, match=r"cannot be set or removed.*in place.*load_state_dict"):
        EDITS[edit](optimizer.state, model.head.weight)
    assert_same_state(optimizer.state_dict(), before)


def test_a_state_that_was_replaced_is_told() -> None:
    model, optimizer = trained(3)
    state, weights = optimizer.state, models.weights(model)
    optimizer.state = {}
    models.loss_of(model, models.batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="replaced by a dict"):
        optimizer.step()
    assert not models.changed(weights, model)
    optimizer.state = state
    optimizer.step()


@pytest.mark.parametrize("store", ["ram", "device"])
def test_tensors_of_the_state_may_be_changed_in_place(store) -> None:
    model, optimizer = trained(3, store=store)
    copied = models.twin(model)
    plain = torch.optim.AdamW(copied.parameters(), lr=1e-2, foreach=False)
    plain.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (copied, plain)):
        o.state[m.embedding.weight]["exp_avg"].zero_()
        o.state[m.embedding.weight]["exp_avg_sq"].fill_(2.0)
        m.embedding.weight.grad = torch.ones(50, 24)
        o.step()
    torch.testing.assert_close(model.embedding.weight, copied.embedding.weight)


# Loading ------------------------------------------------------------------------------------------


def in_state(key: str, value: Any) -> Callable[[dict], dict]:
    def change(saved: dict) -> dict:
        new = value(saved["state"][0]["exp_avg"]) if callable(value) else value
        return {**saved, "state": {**saved["state"], 0: {**saved["state"][0], key: new}}}

    return change


def in_group(key: str, value: Any) -> Callable[[dict], dict]:
    def change(saved: dict) -> dict:
        group = dict(saved["param_groups"][0])
        group[key] = {**group["hift"], **value} if isinstance(value, dict) else value
        return {**saved, "param_groups": [group]}

    return change


LOADS: dict[str, tuple[Callable[[dict], Any], type[Exception], str]] = {
    "none": (lambda s: None, TypeError, "not a NoneType"),
    "list": (lambda s: [1], TypeError, "not a list"),
    "empty": (lambda s: {}, TypeError, "'state' is None"),
    "no groups": (lambda s: {"state": {}}, TypeError, "'param_groups' is None"),
    "no params": (lambda s: {**s, "param_groups": [{}]}, TypeError, r"\[0\].*no 'params'"),
    "entry": (lambda s: {**s, "state": {0: None}}, TypeError, r"state\[0\].*None"),
    "step nan": (in_state("step", torch.tensor(NAN)), ValueError, "step of .*nan.*whole number"),
    "step -3": (in_state("step", torch.tensor(-3.0)), ValueError, "step of .*-3"),
    "step 1.5": (in_state("step", 1.5), ValueError, "step of .*1.5"),
    "step text": (in_state("step", "two"), ValueError, "step of .*'two'"),
    "no step": (in_state("step", None), ValueError, "step of .*None"),
    "no tensor": (in_state("exp_avg", [1.0]), TypeError, "exp_avg of .*not a tensor"),
    "sparse": (in_state("exp_avg", torch.Tensor.to_sparse), TypeError, "sparse_coo tensor"),
    "complex": (in_state("exp_avg", lambda t: t + 1j), TypeError, "complex64"),
    "meta": (in_state("exp_avg", lambda t: t.to("meta")), TypeError, "not on 'meta'"),
    "schedule": (in_group("hift", "x"), ValueError, "no schedule: 'x'"),
    "order": (in_group("hift", {"order": "abc"}), ValueError, "no schedule"),
    "rate": (in_group("hift", {"lr": [NAN]}), ValueError, "no number"),
    "rates": (in_group("hift", {"lr": []}), ValueError, "no number"),
    "pass": (in_group("hift", {"pass": -1}), ValueError, "pass below 0"),
}


@pytest.mark.parametrize("name", sorted(LOADS))
def test_rubbish_is_refused_before_anything_changes(name) -> None:
    change, error, words = LOADS[name]
    model, optimizer = trained(4)
    before = frozen_copy(optimizer)
    with pytest.raises(error, match=words):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    assert_same_state(optimizer.state_dict(), before)
    models.train(model, optimizer, models.batches(2))


def test_state_of_another_size_than_was_laid_out_is_refused() -> None:
    model, optimizer = trained(3)
    saved = frozen_copy(optimizer)
    model.head.bias.data = torch.zeros(7)
    saved["state"][10].update(exp_avg=torch.zeros(7), exp_avg_sq=torch.zeros(7))
    with pytest.raises(ValueError, match=r"7 elements, and pages were laid out for 50"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("store", ["ram", "disk", "device"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_state_of_other_types_is_cast_and_nan_is_kept(store, dtype) -> None:
    _, optimizer = trained(3, store=store)
    saved = frozen_copy(optimizer)
    for entry in saved["state"].values():
        entry["exp_avg"] = (entry["exp_avg"] * 1000).to(dtype)
        entry["exp_avg_sq"][...] = NAN
    optimizer.load_state_dict(saved)
    for index, entry in optimizer.state_dict()["state"].items():
        assert entry["exp_avg"].dtype == torch.float32
        assert torch.equal(entry["exp_avg"], saved["state"][index]["exp_avg"].float())
        assert entry["exp_avg_sq"].isnan().all()


# The end ------------------------------------------------------------------------------------------


def test_a_closed_optimizer_says_that_its_state_is_gone() -> None:
    _, optimizer = trained(3)
    optimizer.close()
    calls = {
        "step": optimizer.step,
        "state_dict": optimizer.state_dict,
        "load": lambda: optimizer.load_state_dict({}),
        "add": lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        "copy": lambda: copy.deepcopy(optimizer),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match=r"closed, and its state is gone"):
            call()
    assert len(optimizer.param_groups) == 1
    optimizer.zero_grad()


def test_shallow_copies_are_refused_and_deep_ones_work_in_mid_pass() -> None:
    model, optimizer = trained(4, store="disk")
    weights = models.weights(model)
    with pytest.raises(TypeError, match=r"copy.deepcopy\(\(model, optimizer\)\)"):
        copy.copy(optimizer)
    alone = copy.deepcopy(optimizer)  # with parameters of its own
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    other, loaded = torch.load(file, weights_only=False)
    models.train(other, loaded, models.batches(5))
    models.train(model, optimizer, models.batches(5))
    assert models.same(model, other)
    assert torch.equal(alone.param_groups[0]["params"][0], weights["embedding.weight"])


@pytest.mark.parametrize("how", ["closure", "pre hook", "forward", "backward"])
def test_an_exception_in_user_code_leaves_the_turn(how) -> None:
    model, optimizer = trained(4)
    before, weights = frozen_copy(optimizer), models.weights(model)

    def fail(*_: object) -> None:
        raise ZeroDivisionError(how)

    if how == "pre hook":
        handle = optimizer.register_step_pre_hook(fail)
    elif how == "forward":
        handle = model.blocks[0].register_forward_hook(fail)
    else:
        handle = model.blocks[0].register_full_backward_hook(fail)

    def closure() -> torch.Tensor:
        if how == "closure":
            fail()
        loss = models.loss_of(model, models.batches(1)[0])
        loss.backward()
        return loss

    with pytest.raises(ZeroDivisionError, match=how):
        optimizer.step(closure)
    handle.remove()
    assert not models.changed(weights, model)
    assert_same_state(optimizer.state_dict(), before)
    optimizer.zero_grad()
    models.train(model, optimizer, models.batches(2))


# Surroundings -------------------------------------------------------------------------------------


@pytest.fixture(params=["float64", "meta", "deterministic", "anomaly", "one autograd thread"])
def surroundings(request):
    """What a program may have switched on."""
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
    elif request.param == "meta":
        torch.set_default_device("meta")
    elif request.param == "deterministic":
        torch.use_deterministic_algorithms(True)
    anomaly = torch.autograd.set_detect_anomaly(request.param == "anomaly")
    threads = torch.autograd.set_multithreading_enabled(request.param != "one autograd thread")
    with anomaly, threads:
        yield request.param
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict, dict, dict]:
    """Weights before and after training, and the optimizer's state_dict."""
    start = models.tiny(blocks=1).state_dict()
    model, optimizer = trained(8, order="random")
    return start, models.weights(model), frozen_copy(optimizer)


@pytest.mark.parametrize("store", ["ram", "disk", "device"])
def test_surroundings_do_not_matter(store, undisturbed, surroundings) -> None:
    with torch.device("cpu"):
        model, data = models.tiny(blocks=1).float(), models.batches(8)
    start, weights, state = undisturbed
    model.load_state_dict(start)
    optimizer = hift_ext.AdamW(model, lr=1e-2, order="random", store=store, page_bytes=4096)
    models.train(model, optimizer, data[:4])
    saved = frozen_copy(optimizer)
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.load_state_dict(saved)
    models.train(model, optimizer, data[4:])
    assert not models.changed(weights, model)
    assert_same_state(optimizer.state_dict(), state)
    assert re.search("disk|ram|device", optimizer.state.engine.description)
    for entry in optimizer.state.values():
        assert {(v.dtype, v.device.type) for v in entry.values()} == {(torch.float32, "cpu")}
    adagrad = hift_ext.Adagrad([next(model.parameters()).detach().clone().requires_grad_()],
                               layers_per_group="all")  # fmt: skip
    assert next(iter(adagrad.state.values()))["sum"].device.type == "cpu"
