# SPDX-License-Identifier: Apache-2.0
# Layers of real model families and of plain modules, from the module and from names alone.
# Every case says which parameters go together; names shown to users are checked where they matter.

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from hift_ext.layers import Group, find_layers, make_groups

H = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT = {**H, "vocab_size": 100}


def bert(layers=3, kind=transformers.BertForSequenceClassification):
    return kind(transformers.BertConfig(**{**TEXT, "num_hidden_layers": layers}))


def gpt2(**kw):
    # Wide enough for ln_f to be what it is in a real model: far below 1 % of a block.
    config = transformers.GPT2Config(n_layer=3, n_embd=128, n_head=2, vocab_size=100, **kw)
    return transformers.GPT2LMHeadModel(config)


def llama(**kw):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TEXT, "hidden_size": 128, **kw})
    )


def t5():
    config = transformers.T5Config(
        d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=2, vocab_size=100
    )
    return transformers.T5ForConditionalGeneration(config)


def vit(layers=3):
    config = transformers.ViTConfig(
        **{**H, "num_hidden_layers": layers}, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def mixtral():
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_key_value_heads=2)
    return transformers.MixtralForCausalLM(config)


def swin():
    config = transformers.SwinConfig(
        embed_dim=16, depths=[1, 2], num_heads=[1, 2], image_size=32, window_size=2
    )
    return transformers.SwinForImageClassification(config)


def hf_resnet():
    config = transformers.ResNetConfig(
        hidden_sizes=[8, 16], depths=[2, 3], embedding_size=8, layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


class Basic(nn.Module):
    """A residual block; the first of a stage carries a projection, as ResNet's do."""

    def __init__(self, cin, cout):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3), nn.BatchNorm2d(cout)
        if cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16), Basic(16, 16))
        self.fc = nn.Linear(16, 10)


class Expert(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(d, d, bias=False) for _ in range(3))


class MoEBlock(nn.Module):
    """Experts in a ModuleList, most of the block's parameters: still no layers."""

    def __init__(self, d=16, experts=8):
        super().__init__()
        self.attn = nn.ModuleDict({k: nn.Linear(d, d) for k in ("q", "k", "v", "o")})
        self.gate = nn.Linear(d, experts)
        self.experts = nn.ModuleList(Expert(d) for _ in range(experts))
        self.norm = nn.LayerNorm(d)


class MoE(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(MoEBlock() for _ in range(blocks))
        self.head = nn.Linear(16, 50)


class MLP(nn.Module):
    def __init__(self, root_params=False):
        super().__init__()
        if root_params:
            self.scale = nn.Parameter(torch.ones(()))
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)


class TinyViT(nn.Module):
    """Parameters on the root, and blocks named by words."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos = nn.Parameter(torch.zeros(1, 5, 16))
        self.patch = nn.Conv2d(3, 16, 4)
        self.blocks = nn.Sequential(
            OrderedDict((f"block_{i}", nn.TransformerEncoderLayer(16, 2, 32)) for i in range(3))
        )
        self.head = nn.Linear(16, 10)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


def lora(model):
    """Wraps as adapter libraries do: base frozen, A and B beside each Linear, a long prefix."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_proj") and isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child))
    outer = nn.Module()
    outer.base_model = nn.Module()
    outer.base_model.model = model
    return outer


def sequential():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))


def nested():
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(3)))


def blocks(prefix, n):
    return [f"{prefix}{i}" for i in range(n)]


# model -> the layers' names, in order
CASES = {
    "bert": (
        bert,
        ["bert.embeddings", *blocks("bert.encoder.layer.", 3), "bert.pooler + classifier"],
    ),
    "bert, one block": (
        lambda: bert(1),
        ["bert.embeddings", "bert.encoder.layer.0", "bert.pooler + classifier"],
    ),
    "gpt2, tied head": (
        gpt2,
        [
            "transformer.wte + transformer.wpe",
            *blocks("transformer.h.", 2),
            "transformer.h.2 + transformer.ln_f",
        ],
    ),
    "llama": (
        llama,
        ["model.embed_tokens", *blocks("model.layers.", 3), "model.norm + lm_head"],
    ),
    "llama, tied": (
        lambda: llama(tie_word_embeddings=True),
        ["model.embed_tokens", *blocks("model.layers.", 2), "model.layers.2 + model.norm"],
    ),
    "t5": (
        t5,
        [
            "shared",
            "encoder.block.0",
            "encoder.block.1 + encoder.final_layer_norm",
            "decoder.block.0",
            "decoder.block.1 + decoder.final_layer_norm",
        ],
    ),
    "vit": (vit, ["vit.embeddings", *blocks("vit.layers.", 3), "vit.layernorm + classifier"]),
    "mixtral": (
        mixtral,
        ["model.embed_tokens", *blocks("model.layers.", 3), "model.norm + lm_head"],
    ),
    "swin": (
        swin,
        [
            "swin.embeddings",
            "swin.encoder.layers.0.blocks.0",
            "swin.encoder.layers.0.downsample",
            *blocks("swin.encoder.layers.1.blocks.", 2),
            "swin.layernorm + classifier",
        ],
    ),
    "hf resnet": (
        hf_resnet,
        [
            "resnet.embedder",
            *blocks("resnet.encoder.stages.0.layers.", 2),
            *blocks("resnet.encoder.stages.1.layers.", 3),
            "classifier",
        ],
    ),
    "resnet": (ResNet, ["conv1 + bn1", *blocks("layer1.", 2), *blocks("layer2.", 2), "fc"]),
    "experts in a list": (MoE, ["embed", "layers.0", "layers.1", "head"]),
    "experts, one block": (lambda: MoE(1), ["embed", "layers.0", "head"]),
    "encoder": (encoder, blocks("layers.", 3)),
    "model in a Sequential": (
        lambda: nn.Sequential(bert(kind=transformers.BertModel)),
        ["0.embeddings", *blocks("0.encoder.layer.", 3), "0.pooler"],
    ),
    "sequential": (sequential, ["0 + 1", "3"]),
    "nested sequential": (nested, ["0", "1", "2"]),
    "linear": (lambda: nn.Linear(3, 2), ["weight + bias"]),
    "mlp": (MLP, ["fc1 + norm", "fc2"]),
    "mlp, root scalar": (lambda: MLP(root_params=True), ["scale + fc1 + norm", "fc2"]),
    "norms only": (lambda: nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3)), ["0 + 1"]),
    "weight norm": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)
        ),
        ["0", "2"],
    ),
    "lora": (
        lambda: lora(llama()),
        [
            "base_model.model.model.embed_tokens",
            *blocks("base_model.model.model.layers.", 3),
            "base_model.model.model.norm + base_model.model.lm_head",
        ],
    ),
    "compiled": (
        lambda: torch.compile(bert(kind=transformers.BertModel)),
        ["embeddings", *blocks("encoder.layer.", 3), "pooler"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_of(case):
    make, names = CASES[case]
    model = make()
    named = list(model.named_parameters())
    for layers in (find_layers(model), find_layers(iter(named))):
        assert [layer.name for layer in layers] == names
        members = [m for layer in layers for m in zip(layer.names, layer.params, strict=True)]
        assert sorted(n for n, _ in members) == sorted(n for n, _ in named)
        assert len({id(p) for _, p in members}) == len(members)
        assert all(p is dict(named)[n] for n, p in members)
        assert sum(layer.numel for layer in layers) == sum(p.numel() for _, p in named)
        for layer in layers:  # a layer's name tells which parameters it holds
            parts = layer.name.split(" + ")
            for name in layer.names:
                name = name.replace("_orig_mod.", "")
                assert any(name == part or name.startswith(part + ".") for part in parts)


def test_blocks_named_by_words():
    layers = find_layers(TinyViT())
    assert [x.name for x in layers] == [
        "cls_token + pos + patch",
        *blocks("blocks.block_", 3),
        "head",
    ]


def test_names_grouped_by_weight_decay_give_the_same_layers():
    model = bert()
    named = list(model.named_parameters())
    split = [x for x in named if x[1].dim() > 1] + [x for x in named if x[1].dim() < 2]
    expected = [(x.name, set(x.names)) for x in find_layers(model)]
    assert [(x.name, set(x.names)) for x in find_layers(split)] == expected


def test_pooler_of_minilm_is_a_layer():
    with torch.device("meta"):
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        model = transformers.BertForSequenceClassification(config)
    assert len(find_layers(model)) == 8


def test_many_modules_around_a_trunk_are_named_in_short():
    model = nn.Module()
    for name in "abcd":
        model.add_module(name, nn.Linear(4, 4))
    model.layers = encoder().layers
    assert [x.name for x in find_layers(model)] == ["a .. d", *blocks("layers.", 3)]


def test_tied_weight_belongs_to_its_first_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 4
    for source in (model, named):
        first, *rest = find_layers(source)
        assert first.names[0] == "0.weight"
        assert "2.weight" not in [n for layer in rest for n in layer.names]


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
