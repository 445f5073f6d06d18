"""Part "memory": the 11 GB proof. In a process limited to 11 GiB: 6.05 B parameters, a context of 2048, LoRA training.

The limit counts everything the process takes on the device: what the CUDA context and the loaded code take is measured first
and subtracted from what PyTorch may allocate. A part that goes beyond ends with PyTorch's out-of-memory error.
"""

import time

import torch

from .gpu_common import GIB, Report, synchronize
from .gpu_models import Training, build, free

LIMIT_GIB = 11
TOKENS, NEW_TOKENS, STEPS = 2048, 48, 4


def run(report: Report, device: str, tiny: bool) -> None:
    tokens, new, steps = (24, 4, 2) if tiny else (TOKENS, NEW_TOKENS, STEPS)
    if device != "cpu":
        limit(report)
    start = time.monotonic()
    model = build("octavo", device, tiny)
    synchronize(device)
    parameters = sum(p.numel() for p in model.parameters())
    report.fact(parameters=parameters, limit_gib=LIMIT_GIB)
    note(report, f"load {parameters / 1e9:.2f} B parameters", time.monotonic() - start, device)

    prompt = torch.randint(3, model.config.vocab_size, (1, tokens - new), device=device)
    start = time.monotonic()
    with torch.inference_mode():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    assert ids.shape[1] == tokens, ids.shape
    note(report, f"generate up to {tokens} tokens of context", time.monotonic() - start, device)
    del ids
    free()

    training = Training(model, tokens, device)
    losses = []
    for number in range(steps):
        start = time.monotonic()
        losses.append(float(training.step()))
        note(
            report,
            f"training step {number + 1}, 1 x {tokens} tokens, loss {losses[-1]:.3f}",
            time.monotonic() - start,
            device,
        )
    report.fact(optimizer=training.optimizer_name, trained=training.trained)
    if device != "cpu":
        peak = max(row["peak GiB, context included"] for row in report.rows)
        report.fact(peak_gib=peak, under_the_limit=peak < LIMIT_GIB)
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss does not fall: {losses}")


def limit(report: Report) -> None:
    """Limit this process and note what the context takes."""
    context, known = limit_memory()
    report.fact(
        context_gib=round(context / GIB, 3)
        if known
        else "not measurable: another process uses the device; counted as 0"
    )
    report.context = context


def limit_memory() -> tuple[int, bool]:
    """Allow PyTorch what 11 GiB leave beside the context: its bytes, and whether they could be measured."""
    torch.zeros(1, device="cuda")
    # Loads cuBLAS, whose code counts as well.
    a = torch.zeros(64, 64, dtype=torch.float16, device="cuda")
    (a @ a).sum().item()
    available, total = torch.cuda.mem_get_info()
    context = total - available - torch.cuda.memory_reserved()
    # Another process's memory would be taken for the context's: then only PyTorch's share can be limited.
    known = context <= 3 * GIB
    context = context if known else 0
    torch.cuda.set_per_process_memory_fraction((LIMIT_GIB * GIB - context) / total)
    return context, known


def note(report: Report, what: str, seconds: float, device: str) -> None:
    row = {"what": what, "seconds": seconds}
    if device != "cpu":
        row["allocated GiB"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / GIB
        row["peak GiB, context included"] = (torch.cuda.max_memory_reserved() + report.context) / GIB
        torch.cuda.reset_peak_memory_stats()
    report.add(**row)
