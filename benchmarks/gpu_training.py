"""Part "training": seconds a LoRA training step of a model of GPT-J-6B's shape, on 8-bit weights and on 16-bit ones.

Batch 1 of 2048 tokens, gradient checkpointing, 8-bit AdamW, the cross-entropy in chunks; nothing but the frozen weights
differs. Memory is not limited here.
"""

import statistics
import time

import torch

from .gpu_common import GIB, Report, synchronize
from .gpu_models import Training, build, free

TOKENS, STEPS = 2048, 6


def run(report: Report, device: str, tiny: bool) -> None:
    tokens, steps = (16, 2) if tiny else (TOKENS, STEPS)
    for kind in ("16-bit", "octavo"):
        if report.late(15):
            report.fact(cut_short=True)
            return
        free()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        training = Training(build(kind, device, tiny), tokens, device)
        losses, times = [], []
        for _ in range(steps + 2):
            synchronize(device)
            start = time.perf_counter()
            loss = training.step()
            synchronize(device)
            times.append(time.perf_counter() - start)
            losses.append(float(loss))
        peak = torch.cuda.max_memory_allocated() / GIB if device != "cpu" else 0.0
        report.add(
            model=kind,
            tokens=tokens,
            **{
                "ms a step": statistics.median(times[2:]) * 1e3,
                "fastest": min(times[2:]) * 1e3,
                "peak GiB": peak,
                "first loss": losses[0],
                "last loss": losses[-1],
            },
        )
        report.fact(optimizer=training.optimizer_name, trained=training.trained)
        del training
    plain, octavo = (row["ms a step"] for row in report.rows)
    report.fact(ratio=octavo / plain, target_ratio=1.03)
    # Nothing is measured unless something is trained.
    still = [row["model"] for row in report.rows if not row["last loss"] < row["first loss"]]
    if still:
        raise AssertionError(f"the loss does not fall: {still}")
