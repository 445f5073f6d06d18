"""One process of a distributed run; started by test_training_distributed.py.

    distributed_training.py trainer OUTPUT BATCH_SIZE     `octavo finetune`'s own run, through accelerate
    distributed_training.py fsdp2 OUTPUT BATCH_SIZE       a plain loop under torch's fully_shard

accelerate offers FSDP to accelerators only, so that on CPUs FSDP2 is tested without it.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import octavo
from octavo.training.adapters import add_adapters
from octavo.training.data import collate
from octavo.training.finetune import finetune_model
from octavo.training.loss import language_model_loss
from octavo.training.sharding import leave_together
from tests.models import frozen_bytes
from tests.test_training_run import SMALL, model_and_data, training_losses

STEPS = 3


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of the 8-bit weights that this process holds."""
    parts = (getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters())
    return sum(part.nbytes_stored for part in parts if isinstance(part, octavo.OctavoTensor))


def by_trainer(output: Path, batch_size: int) -> dict:
    model, tokenizer, train, held_out = model_and_data()
    recipe = replace(SMALL, batch_size=batch_size, max_steps=STEPS, lora_dropout=0.0, evaluations=1)
    outcome = finetune_model(model, tokenizer, train, held_out[:3], recipe, output)
    stored = hashlib.sha256(b"".join(frozen_bytes(outcome.model).values())).hexdigest()
    return {
        "losses": training_losses(outcome),
        "before": outcome.before,
        "after": outcome.after,
        "held": held_bytes(outcome.model),
        "stored": stored,
    }


def by_fsdp2(output: Path, batch_size: int) -> dict:
    from torch.distributed.fsdp import fully_shard

    processes = int(os.environ.get("WORLD_SIZE", 1))
    model, _, train, _ = model_and_data()
    torch.manual_seed(0)
    model = add_adapters(octavo.prepare_for_training(model), replace(SMALL, lora_dropout=0.0)).train()
    rank = 0
    if processes > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = {}
    for step in range(STEPS):
        start = step * batch_size * processes + rank * batch_size
        batch = collate(train[start : start + batch_size])
        total, tokens = language_model_loss(model, batch)
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = (total / tokens).detach()
        if processes > 1:
            dist.all_reduce(mean)
        losses[step + 1] = float(mean) / processes
    return {"losses": losses, "held": held_bytes(model)}


def main(kind: str, output: str, batch_size: str) -> None:
    torch.set_num_threads(1)
    result = {"trainer": by_trainer, "fsdp2": by_fsdp2}[kind](Path(output), int(batch_size))
    Path(output, f"result-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
