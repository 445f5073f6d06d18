"""Part "compiled": a decoding step under torch.compile(fullgraph=True) and a CUDA graph, with few layers.

Captured as it is, a step of GPT-J spends much of its time in some forty small kernels a layer that have nothing to do with
the weights; compiled, they are fused. Compiling all 28 layers takes too long for this script, so a few are, and the whole
model's speed is estimated: the head, measured by itself, and 28 times a layer.
"""

import statistics
import time

import torch

from .gpu_common import Report, measure, synchronize
from .gpu_decode import CACHE, PROMPT, Decoder
from .gpu_models import build, free

LAYERS, ALL_LAYERS, STEPS = 4, 28, 64


def run(report: Report, device: str, tiny: bool) -> None:
    layers = 2 if tiny else LAYERS
    prompt, cache = (4, 32) if tiny else (PROMPT, CACHE)
    for kind in ("octavo", "16-bit"):
        if report.late(20):
            report.fact(cut_short=True)
            return
        model = build(kind, device, tiny, layers=layers)
        row = {"model": kind, "layers": layers}
        with torch.no_grad():
            decoder = Decoder(model, prompt, cache, device)
            row["ms"] = step_time(decoder, device)
            start = time.monotonic()
            # The rehearsal is about the script, not about the compiler.
            backend = "eager" if tiny else "inductor"
            model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
            decoder.step()
            synchronize(device)
            row["seconds to compile"] = time.monotonic() - start
            row["compiled ms"] = step_time(decoder, device)
            hidden = torch.randn(1, 1, model.config.n_embd, device=device).to(model.lm_head.bias.dtype)
            row["head ms"] = measure([lambda h=hidden, m=model: m.lm_head(h)], device) / 1000
        a_layer = (row["compiled ms"] - row["head ms"]) / layers
        row["ms a layer"] = a_layer
        row["tok/s, 28 layers, estimated"] = 1000 / (row["head ms"] + ALL_LAYERS * a_layer)
        report.add(**row)
        del model, decoder
        free()
        torch.compiler.reset()
    octavo, plain = (row["tok/s, 28 layers, estimated"] for row in report.rows)
    report.fact(estimated_speed_up=octavo / plain, target=1.6)


def step_time(decoder: Decoder, device: str) -> float:
    """Milliseconds a step, replayed from a CUDA graph."""
    if device != "cpu":
        return 1000 / decoder.graph(STEPS)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        decoder.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000
