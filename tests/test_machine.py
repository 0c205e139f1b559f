# SPDX-License-Identifier: Apache-2.0
# Random sequences of what users do, in lockstep with torch.optim: training, skipped and missing
# gradients, rates, freezing, saving, copying, more groups. After every action the two agree.
"""A state machine over the public API."""

from __future__ import annotations

import copy
import io
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import nn

import hift_ext

KINDS = {
    "adamw": (hift_ext.AdamW, torch.optim.AdamW, {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}),
    "amsgrad": (hift_ext.Adam, torch.optim.Adam, {"lr": 0.02, "eps": 1e-3, "amsgrad": True}),
    "adagrad": (hift_ext.Adagrad, torch.optim.Adagrad, {"lr": 0.05, "eps": 1e-3, "lr_decay": 0.1}),
    "momentum": (hift_ext.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "sgd": (hift_ext.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
}
LAYERS, EXTRA, WIDTH = 4, 2, 3  # the last EXTRA layers are added later
BAD_SETTINGS = [("lr", float("nan")), ("lr", "fast"), ("weight_decay", float("inf"))]


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(LAYERS + EXTRA):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers[::2]:
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return nn.Sequential(*layers)


class Reference:
    """What HiFT means, said with one torch optimizer: gradients of other groups do not count."""

    def __init__(self, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.params, self.optimizer = params, optimizer
        self.groups: list[tuple[str, ...]] = []
        self.order: list[int] = []
        self.waiting: list[int] = []  # groups of the next pass
        self.position = self.passes = 0
        self.latched: list[float] | None = None

    @property
    def active(self) -> int:
        return self.order[self.position]

    def step(self) -> None:
        if self.latched is None:
            self.latched = [float(g["lr"]) for g in self.optimizer.param_groups]
        kept = {name: p.grad for name, p in self.params.items()}
        now = [float(g["lr"]) for g in self.optimizer.param_groups]
        for name, p in self.params.items():
            if name not in self.groups[self.active]:
                p.grad = None
        for group, rate in zip(self.optimizer.param_groups, self.latched, strict=False):
            group["lr"] = rate
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, now, strict=True):
            group["lr"] = rate
        for name, p in self.params.items():
            p.grad = kept[name]
        self.position += 1
        if self.position == len(self.order):
            self.order, self.waiting = self.order + self.waiting, []
            self.position, self.latched, self.passes = 0, None, self.passes + 1

    def cursor(self) -> tuple:
        return list(self.order), list(self.waiting), self.position, self.passes, self.latched


class Lockstep(RuleBasedStateMachine):
    """Ours, and the reference beside it."""

    # Set up ---------------------------------------------------------------------------------------

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        store=st.sampled_from(["ram", "disk", "device"]),
        order=st.sampled_from(["bottom2up", "top2down", "random"]),
        layers=st.sampled_from([1, 1, 2, "all"]),
    )
    def make(self, kind, store, order, layers) -> None:
        self.ours, theirs, self.settings = KINDS[kind]
        self.options = {"store": store, "page_bytes": 4096}
        self.model, other = network(), network()
        named = dict(other.named_parameters())
        self.optimizer = self.ours(
            self.split(self.model), model=self.model, order=order, layers_per_group=layers,
            **self.settings, **self.options,
        )  # fmt: skip
        self.reference = Reference(named, theirs(self.split(other), foreach=False, **self.settings))
        self.reference.groups = [group.names for group in self.optimizer.groups]
        self.reference.order = list(self.optimizer.param_groups[0]["hift"]["order"])
        self.generator = torch.Generator().manual_seed(1)
        self.frozen: set[str] = set()  # by the user
        self.added = 0
        self.kept: tuple | None = None

    @staticmethod
    def split(model: nn.Module) -> list[dict]:
        """Matrices and vectors of the first layers, with a rate of their own."""
        first = [p for layer in model[: 2 * LAYERS : 2] for p in layer.parameters()]
        return [
            {"params": [p for p in first if p.dim() > 1]},
            {"params": [p for p in first if p.dim() == 1], "lr": 0.03},
        ]

    @property
    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def give(self, name: str, grad: torch.Tensor | None) -> None:
        self.named[name].grad = grad
        self.reference.params[name].grad = None if grad is None else grad.clone()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    # What users do --------------------------------------------------------------------------------

    @rule(micro=st.integers(1, 2))
    def backward(self, micro) -> None:
        active = set(self.reference.groups[self.reference.active])
        for _ in range(micro):
            loss = self.model(self.random(2, WIDTH)).square().sum()
            for name in active:
                assert self.named[name].requires_grad == (name not in self.frozen)
            if loss.requires_grad:
                loss.backward()
        for name, p in self.named.items():
            assert p.grad is not None or name not in active - self.frozen
            self.give(name, p.grad)

    @rule()
    def step(self) -> None:
        self.optimizer.step()
        self.reference.step()

    @rule()
    def train(self) -> None:
        self.backward(1)
        self.step()
        self.zero(True)

    @rule(to_none=st.booleans())
    def zero(self, to_none) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        for name, p in self.named.items():
            self.give(name, p.grad)

    @rule(data=st.data(), none=st.booleans())
    def grad_by_hand(self, data, none) -> None:
        name = data.draw(st.sampled_from(sorted(self.named)))
        self.give(name, None if none else self.random(*self.named[name].shape))

    @rule(number=st.integers(0, 1), value=st.sampled_from([0.0, 0.01, 0.1]), tensor=st.booleans())
    def rate(self, number, value, tensor) -> None:
        ours = self.optimizer.param_groups[number]
        ours["lr"] = torch.tensor(value, dtype=torch.float64) if tensor else value
        self.reference.optimizer.param_groups[number]["lr"] = value

    @rule(value=st.sampled_from([0.0, 0.3]))
    def decay(self, value) -> None:
        for optimizer in (self.optimizer, self.reference.optimizer):
            optimizer.param_groups[1]["weight_decay"] = value

    @rule(data=st.data())
    def freeze(self, data) -> None:
        names = [n for group in self.reference.groups for n in group if self.named[n].requires_grad]
        if names:
            name = data.draw(st.sampled_from(sorted(names)))
            self.named[name].requires_grad_(False)
            self.frozen.add(name)
            self.give(name, None)

    @precondition(lambda self: self.frozen)
    @rule()
    def thaw(self) -> None:
        for name in self.frozen:
            self.named[name].requires_grad_(True)
        self.frozen.clear()

    @rule(overflow=st.booleans())
    def scaled_step(self, overflow) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        name = self.reference.groups[self.reference.active][0]
        true = self.random(*self.named[name].shape)
        self.give(name, true)
        for p in self.named.values():
            p.grad = None if p.grad is None else p.grad * 1024
        if overflow:
            self.named[name].grad.view(-1)[-1] = float("inf")
        scaler.step(self.optimizer)
        for other, p in self.named.items():
            p.grad = self.reference.params[other].grad
            self.give(other, p.grad)
        if not overflow:
            self.reference.step()

    @rule(setting=st.sampled_from(BAD_SETTINGS))
    def impossible_step(self, setting) -> None:
        key, value = setting
        active = self.reference.groups[self.reference.active]
        self.give(active[0], self.random(*self.named[active[0]].shape))
        groups = self.optimizer.param_groups
        good = [group[key] for group in groups]
        before = copy.deepcopy(groups[0]["hift"])
        for group in groups:
            group[key] = value
        if key != "lr" or self.reference.latched is None:  # a latched rate is in force
            with pytest.raises(ValueError, match=f"{key}.*changed nothing"):
                self.optimizer.step()
        for group, was in zip(groups, good, strict=True):
            group[key] = was
        assert groups[0]["hift"] == before

    @precondition(lambda self: self.added < EXTRA)
    @rule()
    def add_group(self) -> None:
        at = str(2 * (LAYERS + self.added))
        self.added += 1
        names = (f"{at}.weight", f"{at}.bias")
        settings = {"lr": 0.04} if self.added == 1 else {}
        self.optimizer.add_param_group({"params": [self.named[n] for n in names], **settings})
        theirs = [self.reference.params[n] for n in names]
        self.reference.optimizer.add_param_group({"params": theirs, **settings})
        if self.ours is hift_ext.Adagrad:  # torch's own makes no state for such a group
            for p in theirs:
                fresh = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}
                self.reference.optimizer.state[p] = fresh
        self.reference.groups.append(names)
        self.reference.waiting.append(len(self.reference.groups) - 1)
        if self.reference.position == 0 and self.reference.latched is None:
            self.reference.order += self.reference.waiting
            self.reference.waiting = []

    # Saving and copying ---------------------------------------------------------------------------

    @rule()
    def keep(self) -> None:
        saved = io.BytesIO()
        torch.save(self.optimizer.state_dict(), saved)
        r = self.reference
        weights = {name: p.detach().clone() for name, p in self.named.items()}
        theirs = {name: p.detach().clone() for name, p in r.params.items()}
        state = copy.deepcopy(r.optimizer.state_dict())
        self.kept = (saved.getvalue(), weights, theirs, state, r.cursor(), self.added)

    @precondition(lambda self: self.kept is not None and self.kept[-1] == self.added)
    @rule(new=st.booleans(), store=st.sampled_from(["ram", "disk", "device"]))
    def go_back(self, new, store) -> None:
        saved, weights, theirs, state, cursor, _ = self.kept
        r = self.reference
        # Groups that wait for the next pass are not in a saved order: it does not fit any more.
        if cursor[1] or r.waiting:
            return
        if new:
            self.thaw()
            groups = [list(group.params) for group in self.optimizer.groups]
            param_groups = [dict(group) for group in self.optimizer.param_groups]
            for group in param_groups:
                group.pop("hift", None)
            self.optimizer.close()
            assert all(self.named[n].requires_grad for names in r.groups for n in names)
            self.options["store"] = store
            self.optimizer = self.ours(
                param_groups, model=self.model, groups=groups, **self.settings, **self.options
            )
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(weights[name])
                r.params[name].copy_(theirs[name])
        self.optimizer.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        r.optimizer.load_state_dict(copy.deepcopy(state))
        order, waiting, r.position, r.passes, r.latched = cursor
        r.order, r.waiting = list(order), list(waiting)

    @rule(pickled=st.booleans())
    def continue_as_a_copy(self, pickled) -> None:
        pair = self.model, self.optimizer
        model, optimizer = pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
        grads = {name: p.grad for name, p in self.named.items()}
        self.optimizer.close()
        self.model, self.optimizer = model, optimizer
        for name, p in self.named.items():
            p.grad = grads[name]

    @rule()
    def load_rubbish(self) -> None:
        saved = self.optimizer.state_dict()
        bad = {**saved, "param_groups": [{**g, "params": [0]} for g in saved["param_groups"]]}
        with pytest.raises(ValueError, match="doesn't match the size"):
            self.optimizer.load_state_dict(bad)

    # What holds at any time -----------------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        ours, r = self.optimizer, self.reference
        assert (ours.active, ours.pass_index) == (r.active, r.passes)
        latched = r.optimizer.param_groups[0]["lr"] if r.latched is None else r.latched[0]
        assert ours.current_lr == pytest.approx(float(latched))
        for name, p in self.named.items():
            q = r.params[name]
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=2e-6)
            wanted = r.optimizer.state.get(q) or {}
            assert (p in ours.state) == bool(wanted), name
            found = ours.state[p] if wanted else {}
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)

    def teardown(self) -> None:
        if not hasattr(self, "optimizer"):
            return
        self.optimizer.close()
        for name, p in self.named.items():
            assert p.requires_grad == (name not in self.frozen), name


@pytest.mark.filterwarnings("ignore:no parameter of the active group")
@pytest.mark.filterwarnings("ignore:the first pass could not reach")
@pytest.mark.filterwarnings("ignore:pass .* runs at the learning rate 0")
class TestLockstep(Lockstep.TestCase):
    settings = hypothesis.settings(
        max_examples=30,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
    )


def run_machine() -> None:
    settings = hypothesis.settings(TestLockstep.settings, phases=[hypothesis.Phase.generate])
    hypothesis.stateful.run_state_machine_as_test(Lockstep, settings=settings)


@pytest.mark.filterwarnings("ignore")
def test_the_machine_itself_sees_a_rate_that_is_not_latched(monkeypatch) -> None:
    rates = hift_ext.settings.rates
    update = hift_ext.optimizer.update_group

    def unlatched(optimizer, *arguments):
        optimizer._schedule.latch(rates(optimizer))
        return update(optimizer, *arguments)

    monkeypatch.setattr(hift_ext.optimizer, "update_group", unlatched)
    with pytest.raises(AssertionError):
        run_machine()
