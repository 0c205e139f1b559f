# SPDX-License-Identifier: Apache-2.0
# Layers of real model families and of plain modules, from the module and from names alone.
# Every case says which parameters go together; names shown to users are checked where they matter.

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from zoo import (
    MLP,
    MoE,
    ResNet,
    TinyViT,
    bert,
    blocks,
    encoder,
    gpt2,
    hf_resnet,
    llama,
    lora,
    mixtral,
    nested,
    sequential,
    swin,
    t5,
    vit,
)

from hift_ext.layers import find_layers

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
