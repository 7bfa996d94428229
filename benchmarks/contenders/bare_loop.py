"""The bare loop: PyTorch, transformers' model, PEFT's adapter and nothing else, on packed rows. `bare_loop.py
job.json`.

It says how fast the arithmetic alone is: no collator, no logging, no callbacks, no checks.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sitecustomize import measured
from transformers import AutoModelForCausalLM, AutoTokenizer

job = json.loads(Path(sys.argv[1]).read_text())
train, device = job["train"], "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(train["seed"])
tokenizer: Any = AutoTokenizer.from_pretrained(job["base"])
base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **job["lora"])).to(device)

rows: list[tuple[list[int], int]] = []  # (ids, how many of them are the prompt's)
for line in Path(job["rows"]).read_text().splitlines():
    row = json.loads(line)
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    rows.append((whole[: train["max_length"]], len(asked)))

bins: list[list[tuple[list[int], int]]] = []  # best fit, the longest row first
for ids, prompt in sorted(rows, key=lambda row: -len(row[0])):
    room = [train["max_length"] - sum(len(own) for own, _ in packed) for packed in bins]
    fits = [(left, n) for n, left in enumerate(room) if left >= len(ids)]
    if fits:
        bins[min(fits)[1]].append((ids, prompt))
    else:
        bins.append([(ids, prompt)])
random.Random(train["seed"]).shuffle(bins)

steps = []
for packed in bins:
    ids = [token for own, _ in packed for token in own]
    places = [place for own, _ in packed for place in range(len(own))]
    labels = [-100 if at < prompt else token for own, prompt in packed for at, token in enumerate(own)]
    steps.append([torch.tensor([values], device=device) for values in (ids, places, labels)])
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=train["learning_rate"], weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
model.train()
with measured() as found:
    total = torch.zeros((), device=device)
    for input_ids, position_ids, wanted in steps:
        loss = model(input_ids=input_ids, position_ids=position_ids, labels=wanted, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
    found.update(steps=len(steps), loss=total.item() / len(steps))
    found["tokens"] = found["positions"] = sum(step[0].numel() for step in steps)
model.save_pretrained(train["output_dir"])
