# SPDX-License-Identifier: Apache-2.0
# From layers to groups: m layers a group, groups given by hand, what is left out, what is refused.
# Whatever the module, every trainable parameter is in exactly one group.
from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import bert, blocks, llama, lora, sequential

from hift_ext.layers import Group, find_layers, make_groups


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_frozen_and_foreign_parameters_are_left_out():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    model.bert.encoder.layer[2].attention.requires_grad_(False)
    head = set(model.classifier.parameters())
    groups = make_groups(model, [p for p in trainable(model) if p not in head])
    assert [g.name for g in groups] == [
        "bert.encoder.layer.0",
        "bert.encoder.layer.2",
        "bert.pooler",
    ]
    assert not any("attention" in n for n in groups[1].names)


def test_what_is_left_of_a_layer_after_freezing_may_be_tiny():
    model = llama()
    model.lm_head.requires_grad_(False)
    groups = make_groups(model, trainable(model))
    assert groups[-1].name == "model.layers.2 + model.norm"


def test_only_adapters_trained():
    groups = make_groups(model := lora(llama()), trainable(model))
    assert [g.name for g in groups] == blocks("base_model.model.model.layers.", 3)
    assert all("lora_" in n for g in groups for n in g.names)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 100])
def test_layers_per_group(m):
    model = bert()
    layers = find_layers(model)
    groups = make_groups(model, trainable(model), layers_per_group=m)
    assert len(groups) == math.ceil(len(layers) / m)
    for i, group in enumerate(groups):
        joined = [p for layer in layers[i * m : i * m + m] for p in layer.params]
        assert list(map(id, group.params)) == list(map(id, joined))
    assert len({g.name for g in groups}) == len(groups)


def test_names_of_joined_layers():
    groups = make_groups(model := bert(), trainable(model), layers_per_group=2)
    assert [g.name for g in groups] == [
        "bert.embeddings .. bert.encoder.layer.0",
        "bert.encoder.layer.1 .. bert.encoder.layer.2",
        "bert.pooler + classifier",
    ]


@pytest.mark.parametrize("m", [0, -1, True, 1.0, "2", None])
def test_bad_layers_per_group(m):
    with pytest.raises(ValueError, match='positive integer or "all", got ' + repr(m)):
        make_groups(model := bert(), trainable(model), layers_per_group=m)


def test_all_needs_no_names():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))]
    (group,) = make_groups(None, params, layers_per_group="all")
    assert (group.name, group.names, group.numel) == ("all", ("", ""), 3)
    assert group.params == tuple(params)


def test_nothing_to_train():
    assert make_groups(bert(), []) == []
    assert make_groups(None, [], layers_per_group="all") == []


def test_neither_names_nor_groups():
    with pytest.raises(ValueError, match="bare parameters") as error:
        make_groups(None, [nn.Parameter(torch.zeros(2))])
    for cure in ("AdamW(model", "model=model", "named_parameters()", "groups=", '"all"'):
        assert cure in str(error.value)


def test_given_groups():
    model = bert()
    embeddings = list(model.bert.embeddings.parameters())
    groups = make_groups(
        model,
        trainable(model),
        groups=[
            ["bert.encoder.layer.2.", "classifier"],
            ["bert.encoder.layer.0", "bert.encoder.layer.1", *embeddings[1:]],
            [embeddings[0], "bert.pooler.dense.weight", "bert.pooler.dense.bias"],
        ],
    )
    assert groups[0].name == "bert.encoder.layer.2 + classifier"
    assert groups[0].names[-2:] == ("classifier.weight", "classifier.bias")
    assert len(groups[0].names) == 18
    assert groups[2].params[0] is embeddings[0]
    assert groups[2].names[1:] == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def test_given_groups_of_bare_parameters():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    groups = make_groups(None, [a, b], groups=[[b], [a]])
    assert [(g.name, g.params, g.names) for g in groups] == [
        ("group 0", (b,), ("",)),
        ("group 1", (a,), ("",)),
    ]


def test_prefixes_see_through_compile():
    model = torch.compile(sequential())
    groups = make_groups(model, trainable(model), groups=[["0"], ["_orig_mod.1", "3"]])
    assert groups[1].names[0] == "_orig_mod.1.weight"


def test_prefix_ends_at_a_dot():
    model = nn.Module()
    model.layer1, model.layer10 = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = make_groups(model, trainable(model), groups=[["layer1"], ["layer10"]])
    assert [g.names[0] for g in groups] == ["layer1.weight", "layer10.weight"]


def test_frozen_members_of_given_groups_are_left_out():
    model = sequential()
    model[1].requires_grad_(False)
    groups = make_groups(model, trainable(model), groups=[["0", *model[1].parameters()], ["3"]])
    assert groups[0].names == ("0.weight", "0.bias")


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ([["0", "1"], ["3", "0.weight"]], ValueError, "'0.weight'.*in two groups, '0 . 1' and"),
        ([["0", "1"]], ValueError, "'3.weight' of shape .2, 4..*never be trained"),
        ([["0", "1"], ["3.wieght", "3.bias"]], ValueError, "'3.wieght'.*near it: 3.weight"),
        ([["0", "1"], ["zzz"]], ValueError, "'zzz'.*near it: 0, 1, 3"),
        ([["0", "1", "3"], []], ValueError, r"groups\[1\] = \[\] holds no parameter"),
        (["0", "1"], TypeError, r"groups\[0\] must be a list.*'0'"),
        ([["0", 1]], TypeError, r"groups\[0\] must hold.*1 \(int\)"),
        (
            [[nn.Parameter(torch.zeros(7))]],
            ValueError,
            "unnamed parameter of shape .7,..*not among",
        ),
    ],
)
def test_bad_groups(groups, error, words):
    with pytest.raises(error, match=words):
        make_groups(model := sequential(), trainable(model), groups=groups)


def test_group_of_frozen_parameters_only():
    model = sequential()
    model[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"groups\[1\] = 3 holds no parameter to train"):
        make_groups(model, trainable(model), groups=[["0", "1"], ["3"]])


def test_prefix_without_names():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="names 'a', but no parameter names are known"):
        make_groups(None, [p], groups=[["a"]])


def test_groups_and_layers_per_group():
    with pytest.raises(ValueError, match="layers_per_group=2 cannot"):
        make_groups(model := sequential(), trainable(model), groups=[["0"]], layers_per_group=2)


def test_parameter_outside_the_module():
    model = sequential()
    stray = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"unnamed parameter of shape \(3, 5\) would never"):
        make_groups(model, [*trainable(model), stray])


def test_bad_sources():
    with pytest.raises(TypeError, match=r"module or named parameters, got 3 \(int\)"):
        find_layers(3)
    with pytest.raises(TypeError, match=r"pairs, got a tensor of shape \(2,\)"):
        find_layers([torch.zeros(2)])
    with pytest.raises(TypeError, match="pairs, got"):
        find_layers([("a", 1)])
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))


def test_groups_compare_by_identity():
    p = nn.Parameter(torch.zeros(2))
    assert Group("a", (p,), ("",)) != Group("a", (p,), ("",))


class Custom(nn.Module):
    pass


LEAVES = [
    lambda: nn.Linear(2, 3),
    lambda: nn.LayerNorm(4),
    lambda: nn.Embedding(300, 2),
    lambda: nn.ReLU(),
    lambda: nn.MultiheadAttention(4, 2),
]


@st.composite
def modules(draw, depth=3):
    kind = draw(st.sampled_from(["leaf", "list", "sequential", "dict", "custom", "repeat"]))
    if depth == 0 or kind == "leaf":
        return draw(st.sampled_from(LEAVES))()
    if kind == "repeat":
        block = draw(modules(depth - 1))
        return nn.ModuleList([block, copy.deepcopy(block), draw(modules(depth - 1))])
    children = draw(st.lists(modules(depth - 1), min_size=1, max_size=4))
    if kind == "list":
        return nn.ModuleList(children)
    if kind == "sequential":
        return nn.Sequential(*children)
    if kind == "dict":
        return nn.ModuleDict({f"m{i}": c for i, c in enumerate(children)})
    model = Custom()
    for i, child in enumerate(children):
        model.add_module(draw(st.sampled_from(["a", "b", "0", "1"])) + str(i), child)
    if draw(st.booleans()):
        model.own = nn.Parameter(torch.zeros(draw(st.sampled_from([(), (3,), (1, 4), (0,)]))))
    return model


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(model=modules(), data=st.data())
def test_every_trainable_parameter_is_in_one_group(model, data):
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(linears) > 1 and data.draw(st.booleans(), label="tied"):
        linears[-1].weight = linears[0].weight
    params = list(model.parameters())
    wanted = [p for p in params if data.draw(st.integers(0, 3), label="train")]
    m = data.draw(st.integers(1, 4), label="m")
    for source in (model, list(model.named_parameters())):
        ones = make_groups(source, wanted)
        groups = make_groups(source, wanted, layers_per_group=m)
        assert len(groups) == math.ceil(len(ones) / m)
        # One partition, in registration order: the groups laid end to end are the parameters.
        for cut in (ones, groups):
            assert [id(p) for g in cut for p in g.params] == [id(p) for p in wanted]
            assert len({g.name for g in cut}) == len(cut)
            assert all(g.params and g.name for g in cut)
