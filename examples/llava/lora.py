"""Fine-tunes the tiny LLaVA of this folder with LoRA, on four ranks: two for the tower, two for the language model.

    python examples/llava/make.py FOLDER --train 2000
    torchrun --nproc-per-node 4 examples/llava/lora.py FOLDER

FOLDER/adapter is then an adapter that peft loads. transformers' arguments need accelerate.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import TrainingArguments

from mimogrid.adapters.huggingface import Job, Trainer


folder = Path(sys.argv[1])
store = json.loads((folder / "train.json").read_text(encoding="utf-8"))
for record in store:
    if "image" in record:
        record["image"] = str(folder / "images" / record["image"])

job = Job.from_pretrained(
    folder / "checkpoint",
    grids={"vision": {"dp": 2}, "language": {"tp": 2}},
    modules={
        "vision": {"trainable": ["projector.*"]},
        "language": {"lora": {"rank": 8, "alpha": 16, "targets": ["all-linear"]}},
    },
)
args = TrainingArguments(
    str(folder / "adapter"),
    max_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 200,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=20,
    save_steps=100,
    use_cpu=True,
)
with Trainer(job, args, train_dataset=store[100:], eval_dataset=store[:100]) as trainer:
    trainer.train()
    metrics = trainer.evaluate()
    if dist.get_rank() == 0:
        print(metrics)
    trainer.save_model(folder / "adapter")
dist.destroy_process_group()
