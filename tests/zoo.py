# SPDX-License-Identifier: Apache-2.0
# Models of many families from tiny configurations: real Hugging Face classes and plain modules.
# Random weights, nothing downloaded.
from __future__ import annotations

from collections import OrderedDict

import torch
import transformers
from torch import nn

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
