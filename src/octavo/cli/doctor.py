"""`octavo doctor`: what is installed, what hardware is seen, and which kernels are active, and why."""

import re
from typing import Any

from .options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Print versions, devices, the active kernels, and why. Attach it to a bug report."""
    from .terminal import print_json, say, show_facts, terminal

    found = report()
    if as_json:
        print_json(found)
        return
    console = terminal()
    for title, rows in found.items():
        say(console, (title, "bold"))
        show_facts(console, [(name, str(value)) for name, value in rows.items()])
        console.print()


def report() -> dict[str, dict[str, object]]:
    """Everything `octavo doctor` shows, by section."""
    return {"Versions": _versions(), "Machine": _machine(), "Kernels": _kernels()}


def _versions() -> dict[str, object]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = ["octavo", "torch", "transformers", "accelerate", "safetensors", "gguf", "triton"]
    packages += ["peft", "bitsandbytes", "trl"]
    found: dict[str, object] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, object]:
    import platform

    import psutil
    import torch

    memory = psutil.virtual_memory()
    found: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads torch uses": torch.get_num_threads(),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
    }
    if not torch.cuda.is_available():
        found["GPU"] = "none that this torch can use" + (
            "" if torch.version.cuda else " (it is a build for CPUs)"
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, bfloat16: {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
    return found


def processor_name() -> str:
    """The processor's name as the system gives it; of virtual ones, which hide it ("AMD EPYC"), the family and model as well."""
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text().partition("\n\n")[0]
        found = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", first, re.MULTILINE))
        name = found.get("model name", "").strip()
        if name and not re.search(r"\d", name) and "cpu family" in found:
            name += f" family {found['cpu family']} model {found.get('model', '?')}"
        if name:
            return name
    return platform.processor() or platform.machine()


def _kernels() -> dict[str, object]:
    from octavo import ops

    states = ops.kernels()
    ways: Any = states["CPU"]["codebooks"]
    return {
        **{name: f"{state['active']}: {state['reason']}" for name, state in states.items()},
        "segments (fitted)": ways["segments"],
        "tables (published)": ways["table"],
    }
