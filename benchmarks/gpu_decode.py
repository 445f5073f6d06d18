"""Part "decode": tokens a second of a whole model of GPT-J-6B's shape at batch 1, with a static cache.

Each model is run the same way: a prompt, then one token at a time, eagerly and as a captured CUDA graph. Only the
weights differ: 16-bit, Octavo, and the published way (the whole matrix de-quantized before each product).
"""

import statistics
import time

import torch

from .gpu_common import Report, synchronize
from .gpu_models import KINDS, build, free

PROMPT, CACHE, STEPS = 32, 512, 64


def run(report: Report, device: str, tiny: bool) -> None:
    prompt, cache, steps = (4, 32, 4) if tiny else (PROMPT, CACHE, STEPS)
    for kind in KINDS:
        if report.late(15):
            report.fact(cut_short=True)
            return
        start = time.monotonic()
        model = build(kind, device, tiny)
        synchronize(device)
        row = {
            "model": kind,
            "seconds to make": time.monotonic() - start,
            "eager tok/s": "",
            "graph tok/s": "",
        }
        held = torch.cuda.memory_allocated() if device != "cpu" else 0
        row["GB held"] = held / 1e9
        with torch.inference_mode():
            decoder = Decoder(model, prompt, cache, device)
            row["eager tok/s"] = decoder.eager(steps // 2)
            if device != "cpu":
                try:
                    row["graph tok/s"] = decoder.graph(steps)
                # What cannot be captured is reported; the eager number stands.
                except Exception as failure:
                    report.fact(**{f"graph of {kind}": f"{type(failure).__name__}: {str(failure)[:300]}"})
        report.add(**row)
        del model, decoder
        free()
    first = {row["model"]: row for row in report.rows}
    for how in ("eager tok/s", "graph tok/s"):
        if first["16-bit"][how] and first["octavo"][how]:
            report.fact(**{f"speed-up, {how}": first["octavo"][how] / first["16-bit"][how]})
    report.fact(target_graph_speed_up=1.6)


class Decoder:
    """A model with a filled static cache and one token to go on from, all at fixed addresses."""

    def __init__(self, model, prompt: int, cache: int, device: str):
        from transformers import StaticCache

        self.model, self.device = model, device
        self.cache = StaticCache(config=model.config, max_cache_len=cache)
        ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.position = torch.full((1, 1), prompt, dtype=torch.int64, device=device)
        self.columns = torch.arange(cache, device=device).view(1, 1, 1, -1)
        self.least = torch.full((), torch.finfo(model.dtype).min, dtype=model.dtype, device=device)
        logits = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def step(self) -> None:
        # Left to transformers, the mask of its plain attention is made of a number on the CPU: no graph could hold that copy.
        mask = (self.columns > self.position).to(self.least.dtype) * self.least
        logits = self.model(
            input_ids=self.token,
            attention_mask=mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def eager(self, steps: int) -> float:
        for _ in range(3):
            self.step()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return steps / (time.perf_counter() - start)

    def graph(self, steps: int) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        graph.replay()
        times = []
        for _ in range(steps):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return 1000 / statistics.median(times)
