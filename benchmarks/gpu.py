"""Everything there is to measure on a GPU, in one command and under thirteen minutes.

    python -m benchmarks.gpu                       on a machine with a GPU
    python -m benchmarks.gpu --tiny --device cpu   a rehearsal of the script's logic, in Triton's interpreter
    python -m benchmarks.gpu --parts kernels,lookup

Each part runs in a process of its own under a time limit: a part that fails or is cut off leaves what it had and the
other parts' results. Tables are printed as parts end; all numbers go into one JSON file. docs/GPU.md explains them.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Seconds each may take on a GPU, in the order in which they are run. Together under thirteen minutes.
PARTS = {
    "correctness": 85,
    "decode": 75,
    "memory": 65,
    "training": 65,
    "kernels": 95,
    "lookup": 30,
    "settings": 45,
    "compiled": 60,
    "generate": 45,
    "finetune": 200,
}
RESULTS = Path(__file__).parent / "results"
# A machine that has PyTorch and this checkout, but nothing installed, will do.
if importlib.util.find_spec("octavo") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal, not a measurement")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="JSON file; by default benchmarks/results/gpu-DEVICE.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if options.part:
        run_part(options)
        return 0
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    return run_all(options)


def run_part(options) -> None:
    """One part, in this process: rows into the file `options.out`."""
    from contextlib import nullcontext

    # What it says on screen is kept for the case that something goes wrong.
    from . import gpu_interpreter
    from .gpu_common import Report

    report = Report(options.out, options.seconds)
    where = {
        "correctness": "gpu_correctness",
        "kernels": "gpu_kernels",
        "lookup": "gpu_lookup",
        "settings": "gpu_settings",
        "decode": "gpu_decode",
        "training": "gpu_training",
        "memory": "gpu_memory",
        "finetune": "gpu_finetune",
        "compiled": "gpu_compiled",
        "generate": "gpu_generate",
    }
    part = importlib.import_module(f".{where[options.part]}", __package__)
    with gpu_interpreter.repaired() if options.device == "cpu" else nullcontext():
        part.run(report, options.device, options.tiny)
    report.fact(done=True)


def run_all(options) -> int:
    import torch

    from .gpu_common import table

    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU that this torch can use. Try --tiny --device cpu for a rehearsal.", file=sys.stderr)
        return 2
    results = {"machine": machine(options.device), "tiny": options.tiny, "parts": {}}
    name = "".join(c if c.isalnum() else "-" for c in results["machine"]["device"]).strip("-")
    out = options.out or RESULTS / f"gpu-{name}{'-rehearsal' if options.tiny else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps(results["machine"]), flush=True)
    failed, short = [], []
    for part in options.parts.split(","):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--out", str(rows)]
            command += ["--device", options.device, "--seconds", str(PARTS[part] * 0.9)]
            command += ["--tiny"] * options.tiny
            problem = run_limited(command, Path(folder) / "log", PARTS[part] * (4 if options.tiny else 1))
            found = json.loads(rows.read_text()) if rows.exists() else {"facts": {}, "rows": []}
            found["warnings"] = warnings_of(Path(folder) / "log")
        found["seconds"] = round(time.monotonic() - started, 1)
        if problem:
            found["problem"] = problem
            failed.append(part)
        elif found["facts"].get("cut_short"):
            short.append(part)
        results["parts"][part] = found
        out.write_text(json.dumps(results, indent=1))
        print(f"\n== {part} ({found['seconds']} s){' FAILED' if problem else ''}")
        for key, value in found["facts"].items():
            if key != "done":
                print(f"   {key}: {value}")
        print(table(found["rows"]))
        for line in found["warnings"]:
            print(f"   ! {line}")
        if problem:
            print(problem[-3000:])
        sys.stdout.flush()
    print(f"\nwritten to {out}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    if short:
        print(f"out of time, with what they had: {', '.join(short)}; run them alone with --parts")
    # A rehearsal on a busy CPU is short of time without anything being wrong.
    return 1 if failed or (short and not options.tiny) else 0


def run_limited(command: list[str], log: Path, seconds: float) -> str | None:
    """Run a command; None if it went well, else what it said or that it ran out of time."""
    with open(log, "w") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    if status == 0:
        return None
    said = log.read_text(errors="replace")
    return f"stopped after {seconds:.0f} s\n{said}" if status is None else f"exit status {status}\n{said}"


def warnings_of(log: Path) -> list[str]:
    """What Octavo itself warned of, a kernel left out for instance; each once."""
    lines = log.read_text(errors="replace").splitlines()
    return list(dict.fromkeys(line.strip()[:500] for line in lines if "Warning: octavo" in line))


def machine(device: str) -> dict[str, object]:
    """What it is measured on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, object] = {
        "device": "cpu",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
        found["capability"] = f"{properties.major}.{properties.minor}"
    for package in ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


if __name__ == "__main__":
    sys.exit(main())
