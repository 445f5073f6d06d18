"""Part "generate": `model.generate` as users call it: eagerly, by a CUDA graph as `octavo generate` does, and with a static
cache, which transformers compiles.

GPT-J-6B's width with few layers, so that compiling fits the time; tokens a second do not carry over to the whole model, the
ratios do. A compiled model must be no slower than the eager one at any batch.
"""

import time

import torch

from octavo.integrations.cuda_graph import decoding_by_graph

from .gpu_common import Report, synchronize
from .gpu_models import build, free

LAYERS, PROMPT, NEW = 4, 32, 96


def run(report: Report, device: str, tiny: bool) -> None:
    prompt, new = (4, 4) if tiny else (PROMPT, NEW)
    for kind in ("octavo", "16-bit"):
        model = build(kind, device, tiny, layers=2 if tiny else LAYERS)
        for batch in (1, 8):
            if report.late(20):
                report.fact(cut_short=True)
                return
            ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=device)
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
            options |= {"min_new_tokens": new, "max_new_tokens": new}
            row = {"model": kind, "batch": batch}
            row["eager tok/s"] = batch * new / timed(model, ids, options, device)[1]
            with decoding_by_graph(model) as graphs:
                row["graph tok/s"] = batch * new / timed(model, ids, options | graphs.options, device)[1]
            row["graph / eager"] = row["graph tok/s"] / row["eager tok/s"]
            if graphs.eager:
                report.fact(**{f"{kind}, batch {batch}: no graph": graphs.eager})
            static = options | {"cache_implementation": "static"}
            row["seconds to compile"], seconds = timed(model, ids, static, device)
            row["static tok/s"] = batch * new / seconds
            row["static / eager"] = row["static tok/s"] / row["eager tok/s"]
            report.add(**row)
        del model
        free()
        if device != "cpu":
            torch.compiler.reset()


def timed(model, ids, options, device: str) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the faster of two more."""
    times = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            model.generate(ids, **options)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])
