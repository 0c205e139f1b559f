# SPDX-License-Identifier: Apache-2.0
# State in and out: exchanged with torch.optim both ways, saved in mid-pass, resumed elsewhere.
# To the bit where nothing is converted.
"""state_dict, load_state_dict, resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from torch import nn

import hift_ext

PAIRS = [
    (hift_ext.AdamW, torch.optim.AdamW, {"lr": 1e-2}),
    (hift_ext.AdamW, torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    (hift_ext.Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    (hift_ext.Adagrad, torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.5}),
    (hift_ext.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    (hift_ext.SGD, torch.optim.SGD, {"lr": 1e-2}),
]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        entry.keys() == b[key].keys()
        and all(torch.equal(value, b[key][name]) for name, value in entry.items())
        for key, entry in a.items()
    )


@pytest.mark.parametrize("store", ["ram", "disk", "device"])
@pytest.mark.parametrize(("ours", "theirs", "settings"), PAIRS)
def test_exchange_with_torch_both_ways(ours, theirs, settings, store) -> None:
    model = models.tiny(blocks=2)
    with ours(model, store=store, **settings) as optimizer:
        models.train(model, optimizer, models.batches(3))  # the last group has no visit yet
        saved = optimizer.state_dict()
        plain = models.twin(model)
        other = theirs(plain.parameters(), **settings)
        other.load_state_dict(saved)
        loaded = other.state_dict()
        assert equal(loaded["state"], saved["state"])
        models.train(plain, other, models.batches(2))  # torch goes on with it

    back = models.twin(plain)
    with ours(back, store=store, **settings) as again:
        again.load_state_dict(other.state_dict())
        assert equal(again.state_dict()["state"], other.state_dict()["state"])
        models.train(back, again, models.batches(6))


@pytest.mark.parametrize(("ours", "theirs", "settings"), PAIRS)
def test_one_group_goes_on_like_torch(ours, theirs, settings) -> None:
    model = models.tiny(blocks=1)
    plain = models.twin(model)
    reference = theirs(plain.parameters(), foreach=False, **settings)
    models.train(plain, reference, models.batches(3))
    model.load_state_dict(plain.state_dict())
    optimizer = ours(model, layers_per_group="all", **settings)
    optimizer.load_state_dict(reference.state_dict())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        q.grad = p.grad.clone()
    optimizer.step()
    reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_keys_are_torch_s_and_step_is_a_float32_scalar() -> None:
    model = models.tiny(blocks=1)
    plain = models.twin(model)
    for ours, theirs, settings in PAIRS:
        optimizer = ours(model, layers_per_group="all", **settings)
        reference = theirs(plain.parameters(), **settings)
        models.train(model, optimizer, models.batches(1))
        models.train(plain, reference, models.batches(1))
        saved, expected = optimizer.state_dict(), reference.state_dict()
        assert saved["state"].keys() == expected["state"].keys()
        for key, entry in expected["state"].items():
            assert saved["state"][key].keys() == entry.keys()
            for name, value in entry.items():
                assert saved["state"][key][name].dtype == value.dtype
                assert saved["state"][key][name].shape == value.shape
        ours_keys = saved["param_groups"][0].keys()
        assert ours_keys - expected["param_groups"][0].keys() == {"hift"}


def test_16_bit_parameters_keep_their_float32_state(tmp_path) -> None:
    model = models.tiny(blocks=1).to(torch.bfloat16)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = hift_ext.AdamW(models.twin(model), lr=1e-2)
    again.load_state_dict(saved)
    assert equal(again.state_dict()["state"], optimizer.state_dict()["state"])
    assert again.state_dict()["state"][0]["exp_avg"].dtype == torch.float32


def test_a_state_dict_taken_earlier_keeps_its_cursor() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(2))
    saved = optimizer.state_dict()
    models.train(model, optimizer, models.batches(1))
    assert saved["param_groups"][0]["hift"]["position"] == 2
    assert optimizer.state_dict()["param_groups"][0]["hift"]["position"] == 3


def test_loading_replaces_all_state() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(1))
    early = dict(optimizer.state_dict())
    early["state"] = {
        i: {n: v.clone() for n, v in entry.items()} for i, entry in early["state"].items()
    }
    start = models.weights(model)
    models.train(model, optimizer, models.batches(5))
    after = models.weights(model)
    model.load_state_dict(start)
    optimizer.load_state_dict(early)
    assert equal(optimizer.state_dict()["state"], early["state"])
    models.train(model, optimizer, models.batches(5))
    for name, value in models.weights(model).items():
        assert torch.equal(value, after[name])


@pytest.mark.parametrize("store", ["ram", "disk", "named"])
def test_more_state_than_was_laid_out_is_loaded(store, tmp_path) -> None:
    model = models.tiny(blocks=1)
    with hift_ext.AdamW(models.twin(model), lr=1e-2, amsgrad=True) as other:
        models.train(other._model, other, models.batches(3))
        saved = other.state_dict()
        path = f"disk:{tmp_path / 'pages'}" if store == "named" else store
        with hift_ext.AdamW(model, lr=1e-2, store=path) as optimizer:
            models.train(model, optimizer, models.batches(4))
            optimizer.load_state_dict(saved)
            assert equal(optimizer.state_dict()["state"], saved["state"])
            models.train(model, optimizer, models.batches(3))


def test_what_does_not_fit_changes_nothing() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(3))

    def frozen(saved):
        return {i: {n: v.clone() for n, v in e.items()} for i, e in saved["state"].items()}

    before = frozen(optimizer.state_dict())
    good = optimizer.state_dict()
    wrong_shape = {i: dict(e) for i, e in frozen(good).items()}
    wrong_shape[3]["exp_avg"] = torch.zeros(2)
    lacking = {i: dict(e) for i, e in frozen(good).items()}
    del lacking[2]["exp_avg_sq"]
    group = good["param_groups"][0]
    cases = [
        ({**good, "state": wrong_shape}, r"exp_avg of parameter '.*' has shape \(2,\)"),
        ({**good, "state": lacking}, "lacks exp_avg_sq"),
        ({**good, "param_groups": [group, group]}, "different number of parameter groups"),
        ({**good, "param_groups": [{**group, "params": [0]}]}, "doesn't match the size"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert equal(optimizer.state_dict()["state"], before)
        assert optimizer.param_groups[0]["hift"]["position"] == 0


def test_another_number_of_groups_begins_a_new_pass() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(4))
    saved = optimizer.state_dict()
    optimizer.close()
    again = hift_ext.AdamW(model, lr=1e-2, layers_per_group=2)
    with pytest.warns(UserWarning, match="of 6 groups, this optimizer has 3"):
        again.load_state_dict(saved)
    assert again.active == 0
    assert equal(again.state_dict()["state"], saved["state"])
    models.train(model, again, models.batches(3))


def test_hooks_run_around_loading() -> None:
    model, calls = models.tiny(), []
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(1))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "pre", "post"]


STORES, ORDERS = ("ram", "disk", "device"), ("bottom2up", "top2down", "random")
PARTS = tuple[nn.Module, hift_ext.AdamW, torch.optim.lr_scheduler.LRScheduler]


def make_parts(store: str, order: str) -> PARTS:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, lr=1e-2, order=order, store=store, page_bytes=4096)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def train_parts(parts: PARTS, data: list[torch.Tensor]) -> list[dict]:
    model, optimizer, scheduler = parts
    for tokens in data:
        models.train(model, optimizer, [tokens])
        scheduler.step()
    return [part.state_dict() for part in parts]


def resume(folder: str) -> None:
    """Runs in a new process: goes on from every checkpoint in `folder`."""
    for store in STORES:
        for order in ORDERS:
            path, parts = Path(folder) / f"{store}-{order}", make_parts(store, order)
            for part, saved in zip(parts, torch.load(path, weights_only=True), strict=True):
                part.load_state_dict(saved)
            torch.save(train_parts(parts, models.batches(23)[10:]), path)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """Checkpoints saved here in the middle of the second pass, and trained on in a new process."""
    folder = tmp_path_factory.mktemp("resume")
    for store in STORES:
        for order in ORDERS:
            parts = make_parts(store, order)
            torch.save(train_parts(parts, models.batches(23)[:10]), folder / f"{store}-{order}")
            parts[1].close()
    code = f"import test_state_dict; test_state_dict.resume({str(folder)!r})"
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tests, env=environment)
    return folder


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("store", STORES)
def test_resume_in_a_new_process_is_like_never_having_stopped(store, order, resumed) -> None:
    whole = train_parts(make_parts(store, order), models.batches(23))
    other = torch.load(resumed / f"{store}-{order}", weights_only=True)
    assert all(torch.equal(value, other[0][name]) for name, value in whole[0].items())
    assert equal(whole[1]["state"], other[1]["state"])
    assert whole[1]["param_groups"] == other[1]["param_groups"]
    assert whole[2] == other[2]


def test_frozen_parameters_keep_their_index() -> None:
    model = models.tiny(blocks=1)
    model.embedding.requires_grad_(False)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(2))
    plain = models.tiny(blocks=1)
    plain.embedding.requires_grad_(False)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p in optimizer.state) == (q in other.state)


def test_named_parameters_and_param_groups_round_trip() -> None:
    model = models.tiny(blocks=1)
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "lr": 1e-3},
        {
            "params": [(n, p) for n, p in model.named_parameters() if p.dim() <= 1],
            "weight_decay": 0.0,
        },
    ]
    optimizer = hift_ext.AdamW(groups, lr=1e-2)
    assert len(optimizer.groups) == 3
    models.train(model, optimizer, models.batches(4))
    saved = optimizer.state_dict()
    optimizer.close()
    again = hift_ext.AdamW(groups, lr=1e-2)
    again.load_state_dict(saved)
    assert equal(again.state_dict()["state"], saved["state"])
    assert again.state_dict()["param_groups"] == saved["param_groups"]


def test_layer_like_module_with_one_parameter() -> None:
    model = nn.Linear(3, 2)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    assert len(optimizer.groups) == 1
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
