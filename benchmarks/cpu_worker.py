"""One engine of `benchmarks.cpu` in a process of its own, answering requests on standard input, one JSON object a line.

    python -m benchmarks.cpu_worker ENGINE FOLDER THREADS

{"do": "prefill" | "decode", "tokens": n} → {"seconds": s}; {"do": "memory"} → {"bytes": n}; {"do": "quit"} ends it. The first
line it writes is {"ready": seconds it took to load} or {"error": text}.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # Answers go to the original standard output; whatever the libraries print does not get between them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        import torch

        from .cpu_engines import ENGINES, peak_memory

        torch.set_num_threads(threads)
        engine = ENGINES[name](folder)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=time.perf_counter() - start)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            if request["do"] == "memory":
                answer(bytes=peak_memory())
            else:
                answer(seconds=getattr(engine, request["do"])(request["tokens"]))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            return


if __name__ == "__main__":
    main()
