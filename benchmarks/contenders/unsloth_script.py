"""The TRL script as Unsloth's pages have it. `unsloth_script.py job.json`; needs a GPU and the package."""

import json
import sys
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  # before TRL, which it changes
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

job = json.loads(Path(sys.argv[1]).read_text())
model, tokenizer = FastLanguageModel.from_pretrained(
    job["base"], max_seq_length=job["train"]["max_length"], load_in_4bit=job["quantize"] == "nf4"
)
model = FastLanguageModel.get_peft_model(model, **job["lora"], use_gradient_checkpointing=False)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(**job["train"]),
    train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
    processing_class=tokenizer,
)
trainer.train()
