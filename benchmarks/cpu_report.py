"""What `benchmarks.cpu` writes: the machine, a table, JSON and a plot under benchmarks/results/.

Example:
    >>> from benchmarks.cpu_report import spread
    >>> spread([1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
"""

import json
import re
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from octavo.cli.doctor import processor_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "torchao",
    "optimum-quanto",
    "llama-cpp-python",
    "octavo",
)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict:
    from octavo.ops import cpu

    return {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": psutil.getloadavg()[0],
        "kernels": cpu.status(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def file_stem(kind: str) -> str:
    return f"cpu-{kind}-" + re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")


def save(kind: str, result: dict, folder: Path = RESULTS) -> Path:
    """Write the result as JSON, named after what it measures and the processor."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(kind)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    out = Table(title=title)
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    Console(width=150).print(out)


def bars(kind: str, groups: dict[str, dict[str, float]], unit: str, folder: Path = RESULTS) -> Path | None:
    """A horizontal bar chart for each group: group → {engine: value}. None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 3.2), squeeze=False)
    for axis, (title, values) in zip(axes[0], groups.items(), strict=True):
        names = sorted(values, key=values.get)
        colors = ["tab:orange" if "octavo" in name else "tab:gray" for name in names]
        axis.barh(names, [values[name] for name in names], color=colors)
        axis.bar_label(axis.containers[0], fmt="%.3g", padding=2)
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{processor_name()}, {torch.get_num_threads()} threads", fontsize=9)
    figure.tight_layout()
    path = folder / f"{file_stem(kind)}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
