"""Trains a small Llama by transformers' Trainer and by accelerate; split over the grid where torchrun has started it.

    python tests/training/trainers.py FOLDER     # prints {case: losses and norms of gradients} as JSON

accelerate takes no ParallelismConfig on CPUs. Here that check is lifted, so that what GPUs would run is run by Gloo.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import two_level_mha as tlm

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
SPLIT = "RANK" in os.environ


def model_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    return tlm.parallelize(model, tlm.init_mesh("cpu", (2, 2))) if SPLIT else model


def data() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": x, "labels": x} for x in torch.randint(64, (64, 16), generator=draw)]


def trainer_of(case: str, folder: Path) -> Trainer:
    """With accumulated gradients, evaluation, and files every 4th step."""
    arguments = TrainingArguments(
        output_dir=str(folder / case), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=8,
        learning_rate=1e-2, logging_steps=1, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        save_only_model=case != "resumable", bf16=case == "bfloat16", seed=0, use_cpu=True, disable_tqdm=True,
        report_to=[],
    )  # fmt: skip
    return Trainer(model=model_of(case), args=arguments, train_dataset=data(), eval_dataset=data()[:8])


def by_trainer(case: str, folder: Path) -> list[float]:
    trainer = trainer_of(case, folder)
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss")
    return [float(row[name]) for row in trainer.state.log_history for name in names if name in row]


def refusal(case: str, folder: Path) -> str:
    try:
        trainer_of(case, folder)
    except ValueError as error:
        return str(error)
    return ""


def by_accelerate(case: str, folder: Path) -> list[float]:
    """Batches that differ between steps, and would between ranks if accelerate took them for data parallel."""
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=4) if SPLIT else None)
    model = model_of(case)
    optimizer = torch.optim.AdamW(tlm.param_groups(model), lr=1e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=8))
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        tlm.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.unwrap_model(model).save_pretrained(folder / case)
    return losses


CASES = {
    "trainer": by_trainer, "bfloat16": by_trainer, "lora": by_trainer, "accelerate": by_accelerate,
    "resumable": refusal,
}  # fmt: skip


def main(folder: Path) -> None:
    ParallelismConfig._validate_accelerator = lambda *_: None
    if SPLIT:
        dist.init_process_group("gloo")
    found = {}
    for case, run in CASES.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        found[case] = run(case, folder)
    if not SPLIT or dist.get_rank() == 0:
        print(json.dumps(found))
    if SPLIT:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
