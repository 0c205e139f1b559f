# SPDX-License-Identifier: Apache-2.0
"""Traces against what torch's own allocator reports when the same step runs for real.

The profiler's memory events know nothing of dispatch modes or fake tensors: they are the oracle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from hift_ext.layers import make_groups
from hift_ext.planning import as_on_gpu, models
from hift_ext.planning.trace import Trace, Workload, trace, trace_full, trace_lora
from hift_ext.planning.workload import loss_of, make_inputs, make_model

LLAMA: dict[str, Any] = {
    **models.PRESETS["llama2-7b"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
GPT2: dict[str, Any] = {
    **models.PRESETS["gpt2"],
    "vocab_size": 3000,  # tied: its gradient from the head waits for the embedding's
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
BF16 = torch.bfloat16


def real_peak(workload: Workload, active: int | None) -> tuple[int, int]:
    """Bytes beyond model and batch that the CPU's allocator had at most, and at the end."""
    model = make_model(workload)
    params = list(model.parameters())
    groups = make_groups(model, params)
    trained = params if active is None else list(groups[active].params)
    for param in params:
        param.requires_grad_(any(param is p for p in trained))
    inputs = make_inputs(workload, model)
    if workload.accumulate:
        for param in trained:
            param.grad = torch.zeros_like(param)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        kind = workload.autocast
        with torch.autocast("cpu", dtype=kind, enabled=kind is not None):
            loss = loss_of(model, inputs)
        loss.backward()
    recorded: Any = profiler.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in recorded.events() if e.name() == "[memory]"]
    level = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        level += size
        peak = max(peak, level)
    return peak, level


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LLAMA, {}),
        (LLAMA, {"dtype": BF16}),
        (LLAMA, {"attention": "eager"}),
        (LLAMA, {"grad_checkpointing": True}),
        (LLAMA, {"accumulate": True}),
        (GPT2, {}),
        (GPT2, {"batch": 1, "seq": 8}),
        (GPT2, {"grad_checkpointing": True, "accumulate": True}),
    ],
    ids=lambda value: value.get("model_type", "-".join(value)),
)
def test_peaks_are_those_of_the_real_allocator(
    config: dict[str, Any], settings: dict[str, Any]
) -> None:
    workload = Workload(**{"model": config, "batch": 8, "seq": 96, **settings})
    for traced in [*trace(workload), trace_full(workload)]:
        peak, end = real_peak(workload, None if traced.index < 0 else traced.index)
        mine = traced.peak.total - traced.start.total
        # Allocations are rounded up to 512 bytes here, and a checkpoint keeps 5,056 bytes of the
        # random generator's state on the host.
        slack = 512 * 80 + (5056 * 4 if workload.grad_checkpointing else 0)
        assert abs(mine - peak) <= max(0.002 * peak, slack if mine > peak else slack // 2), traced
        assert 0 <= traced.end.total - traced.start.total - end <= 512 * (traced.params + 2)


def test_autocasts_copies_are_counted() -> None:
    """Not with the head active, where the CPU's own kernels need one more bfloat16 activation."""
    workload = Workload(LLAMA, 8, 96, autocast=BF16)
    for traced in [*trace(workload, positions=[0, 1, 2]), trace_full(workload)]:
        peak, _ = real_peak(workload, None if traced.index < 0 else traced.index)
        assert abs(traced.peak.total - traced.start.total - peak) <= 2048


def test_categories_add_up_and_weights_stay() -> None:
    workload = Workload(LLAMA, 2, 32)
    model = make_model(workload)
    weights = sum(-(-p.nbytes // 512) * 512 for p in model.parameters())
    buffers = {b.untyped_storage()._cdata: b.nbytes for b in model.buffers()}
    weights += sum(-(-size // 512) * 512 for size in buffers.values())
    for traced in trace(workload):
        for peak in (traced.start, traced.forward, traced.above, traced.own, traced.end):
            assert peak.weights == weights
        gradients = sum(-(-count * 4 // 512) * 512 for count in traced.counts)
        assert (traced.start.gradients, traced.end.gradients) == (0, gradients)
        assert traced.end.activations == 0
        assert traced.backward.total == max(traced.above.total, traced.own.total)


# Hand-made counts ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Like blocks without anything between: every byte can be counted by hand."""

    def __init__(self, width: int, blocks: int, body: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(width, width, bias=False), "act": body(i)})
            for i in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = block["act"](block["fc"](x))
        return x.sum()


def chain(body: Callable[[int], nn.Module], blocks: int = 3, **settings: Any) -> Workload:
    return Workload(
        lambda: Chain(256, blocks, body),
        batch=4,
        seq=32,
        inputs=lambda batch, seq: {"x": torch.zeros(batch * seq, 256)},
        **settings,
    )


def test_what_frozen_layers_keep_is_counted_by_hand() -> None:
    unit = 4 * 32 * 256 * 4  # one activation
    first, second, last = trace(chain(lambda _: nn.ReLU()))
    # Backward begins with every ReLU's result from the active block on, and that block's input,
    # which the ReLU below has made (the first one's is the batch).
    starts = [t.above.activations for t in (first, second, last)]
    assert starts == [3 * unit, 3 * unit, 2 * unit]
    assert first.numel == 256 * 256
    assert first.start.other == unit


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (lambda _: nn.Dropout(0.1), 1),  # a mask of a byte an element, as the GPU's kernel has
        (lambda _: nn.Dropout(0.0), 0),
    ],
)
def test_dropout_keeps_a_byte_an_element(body: Callable[[int], nn.Module], kept: int) -> None:
    elements = 4 * 32 * 256
    last = trace(chain(body), positions=[2])[0]
    below = elements * 4  # the active layer's input
    assert last.above.activations == below + kept * elements


class Attention(nn.Module):
    def __init__(self, kv_heads: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = nn.Linear(64, 64, bias=False, dtype=dtype)
        self.kv = nn.Linear(64, 2 * 16 * kv_heads, bias=False, dtype=dtype)
        self.kv_heads, self.dropout = kv_heads, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 16).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2 * self.kv_heads, 16).transpose(1, 2).chunk(2, 1)
        gqa = self.kv_heads < 4
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout, enable_gqa=gqa
        )
        return out.float().sum()


def attending(length: int, kv_heads: int, dropout: float, dtype: torch.dtype) -> Workload:
    return Workload(
        lambda: Attention(kv_heads, dropout, dtype),
        batch=2,
        seq=length,
        inputs=lambda batch, seq: {"x": torch.zeros(batch, seq, 64, dtype=dtype)},
    )


@pytest.mark.parametrize(
    ("kv_heads", "dropout", "dtype", "matrix"),
    [
        (4, 0.0, torch.float32, False),
        (4, 0.1, torch.float32, False),  # fused on a GPU, though not on the CPU
        (2, 0.0, torch.float32, True),  # no fused kernel on a GPU
        (2, 0.0, BF16, False),
    ],
)
def test_attention_keeps_the_matrix_where_a_gpu_does(
    kv_heads: int, dropout: float, dtype: torch.dtype, matrix: bool
) -> None:
    length = 256
    work = attending(length, kv_heads, dropout, dtype)
    whole = 2 * 4 * length * length * dtype.itemsize
    assert (trace_full(work).backward.activations > whole) == matrix


def test_heads_are_repeated_where_the_cpu_s_kernel_takes_no_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with torch 2.6: keys and values are kept for every head, the matrix is not."""
    whole = trace_full(attending(256, 4, 0.0, BF16)).backward.activations
    monkeypatch.setattr(as_on_gpu, "_SHARES_HEADS", False)
    assert trace_full(attending(256, 2, 0.0, BF16)).backward.activations == whole


# Positions that are not executed ------------------------------------------------------------------


def same(a: Trace, b: Trace) -> bool:
    return dataclasses.replace(a, executed=True) == dataclasses.replace(b, executed=True)


@pytest.mark.parametrize(
    "workload",
    [
        Workload({**LLAMA, "num_hidden_layers": 8}, 2, 64),
        Workload({**LLAMA, "num_hidden_layers": 9}, 2, 64, grad_checkpointing=True),
        chain(lambda _: nn.GELU(), blocks=27, layers_per_group=2),
        chain(lambda _: nn.GELU(), blocks=14, accumulate=True),
    ],
    ids=["llama", "checkpoints", "two_layers", "accumulate"],
)
def test_what_is_not_executed_is_exact(workload: Workload) -> None:
    found = trace(workload)
    followed = [t for t in found if not t.executed]
    assert len(followed) >= 2
    executed = trace(workload, positions=[t.index for t in followed])
    assert all(t.executed for t in executed)
    assert all(map(same, followed, executed))


def test_blocks_that_alternate_are_exact() -> None:
    """Every other block keeps more: like shapes, unlike memory."""
    workload = chain(lambda i: nn.GELU() if i % 2 else nn.Dropout(0.1), blocks=14)
    found = trace(workload)
    assert all(map(same, found, trace(workload, positions=range(14))))


# Compute ------------------------------------------------------------------------------------------


def test_flops_are_those_of_torchs_counter() -> None:
    workload = Workload(LLAMA, 2, 32, attention="eager")
    model = make_model(workload)
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(model, make_inputs(workload, model))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    full = trace_full(workload)
    assert full.forward_flops == forward.get_total_flops()
    assert full.backward_flops == backward.get_total_flops()
    # The fused kernel computes the same products, and the scores once more in backward.
    fused = trace_full(dataclasses.replace(workload, attention="sdpa"))
    scores = 2 * 2 * 2 * 4 * 32 * 32 * 16
    assert fused.forward_flops == full.forward_flops
    assert fused.backward_flops == full.backward_flops + scores


# Models -------------------------------------------------------------------------------------------


def test_a_file_a_folder_a_mapping_and_a_config_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    config = models.config_of(LLAMA)
    want = trace(Workload(LLAMA, 2, 16))
    for source in (file, tmp_path, str(file), config):
        assert trace(Workload(source, 2, 16)) == want
    real = make_model(Workload(LLAMA, 2, 16))
    assert trace(Workload(real, 2, 16)) == want
    assert all(type(p) is nn.Parameter and p.requires_grad for p in real.parameters())
    assert all(p.grad is None for p in real.parameters())


def test_lora_has_its_parameters_and_their_gradients_only() -> None:
    traced = trace_lora(Workload(LLAMA, 2, 16, dtype=BF16), rank=8)
    block = 4 * 8 * (64 + 64) + 3 * 8 * (64 + 176)
    assert traced.numel == 2 * block
    assert set(traced.dtypes) == {torch.float32}
    assert traced.end.gradients == sum(-(-4 * c // 512) * 512 for c in traced.counts)
    gpt2 = trace_lora(Workload(GPT2, 2, 16), rank=8)
    assert gpt2.numel == 2 * 8 * (64 * 4 + 64 * 2 + 64 * 5 * 2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Workload(LLAMA, 0, 8), ValueError, "batch must be .* not 0"),
        (lambda: Workload(LLAMA, 1, True), ValueError, "seq must be .* not True"),
        (lambda: trace(Workload("llama9", 1, 8)), ValueError, "'llama9' is neither .*llama2-7b"),
        (lambda: trace(Workload({"model_type": "nope"}, 1, 8)), ValueError, "'nope'.*not know"),
        (lambda: trace(Workload({"model_type": "llama"}, 1, 8)), ValueError, "`architectures`"),
        (
            lambda: trace(Workload({**LLAMA, "architectures": ["Nope"]}, 1, 8)),
            ValueError,
            "no model class 'Nope'",
        ),
        (lambda: trace(Workload(3, 1, 8)), TypeError, "not 3 \\(int\\)"),
        (lambda: trace(Workload(lambda: 3, 1, 8)), TypeError, "must make an nn.Module"),
        (lambda: trace(Workload(LLAMA, 1, 129)), ValueError, "seq=129 .* 128 positions"),
        (lambda: trace(Workload(LLAMA, 1, 8, attention="flash")), ValueError, "sdpa, eager"),
        (lambda: trace(Workload("gpt-neo-2.7b", 1, 8)), ValueError, "attention='eager'"),
        (lambda: trace(Workload(LLAMA, 1, 8), positions=[5]), IndexError, "5 .* 4 groups"),
        (lambda: trace(Workload(lambda: nn.Linear(2, 2), 1, 8)), ValueError, "pass inputs="),
        (
            lambda: trace(chain(lambda _: nn.ReLU(), grad_checkpointing=True)),
            ValueError,
            "checkpoint inside",
        ),
        (lambda: trace_lora(Workload(LLAMA, 1, 8), 0), ValueError, "at least 1, not 0"),
        (
            lambda: trace(Workload(LLAMA, 1, 8, groups=[["lm_head"]])),
            ValueError,
            "never be trained",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_broken_config_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        models.config_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, not list"):
        models.config_of(tmp_path)


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    trace(Workload(LLAMA, 1, 8), progress=lambda text, share: told.append((text, share)))
    shares = [share for _, share in told]
    assert len(told) == 4
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] < 1
