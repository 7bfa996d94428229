"""The raw TRL script: what a person writes by hand from TRL's own page. `trl_script.py job.json`."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

job = json.loads(Path(sys.argv[1]).read_text())
options = {"dtype": getattr(torch, job["dtype"])}
if job["quantize"] == "nf4":
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options["dtype"],
    )
model = AutoModelForCausalLM.from_pretrained(job["base"], **options)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(**job["train"]),
    train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
    processing_class=AutoTokenizer.from_pretrained(job["base"]),
    peft_config=LoraConfig(task_type="CAUSAL_LM", **job["lora"]),
)
trainer.train()
trainer.save_model()
