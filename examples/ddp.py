# SPDX-License-Identifier: Apache-2.0
# HiFT on several GPUs, or on two processes of one CPU:
# `torchrun --nproc_per_node 2 examples/ddp.py`
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hift_ext

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")

torch.manual_seed(0)  # the same model everywhere
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 4)
ddp = DistributedDataParallel(model.to(device), find_unused_parameters=True)
optimizer = hift_ext.AdamW(model, lr=1e-2)
reduction = hift_ext.distributed.reduce_active(ddp, optimizer)

generator = torch.Generator().manual_seed(dist.get_rank())  # each process its own data
for step in range(12):
    x = torch.randn(16, 8, 32, generator=generator).to(device)
    loss = nn.functional.mse_loss(ddp(x), x.flip(1))
    loss.backward()
    group = optimizer.groups[optimizer.active]
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        sent, all_gradients = reduction.stats()["bytes"], reduction.stats()["ddp_bytes"]
        print(f"step {step}: {group.name}, loss {loss:.3f}, sent {sent} of {all_gradients} bytes")
dist.destroy_process_group()
