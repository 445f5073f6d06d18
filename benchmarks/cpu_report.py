"""What `benchmarks.cpu` writes: the machine, a table, JSON and a plot under benchmarks/results/.

Example:
    >>> from benchmarks.cpu_report import chosen
    >>> chosen([5.0, 3.0, 5.2], [True, False, True])
    [5.0, 5.2]
"""

import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from octavo.bench import load
from octavo.bench.timing import ratios, spread
from octavo.bench.turns import best_of, undisturbed
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
        "load_before": load.before_measuring(),
        "huge_pages": huge_pages(),
        "kernels": cpu.status(),
        "instructions": instructions(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def huge_pages() -> str | None:
    """For what memory Linux uses huge pages, such as "always [madvise] never"; None elsewhere."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().strip() if setting.exists() else None


def instructions() -> dict[str, str]:
    """What Octavo and PyTorch are held to, by variable of the environment; see `benchmarks/__init__.py`."""
    names = ("OCTAVO_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    return {name: os.environ[name] for name in names if name in os.environ}


def file_stem(kind: str) -> str:
    """cpu, what is measured, the processor, the instruction set that Octavo is held to, if any, and "one thread" if it is one."""
    held = os.environ.get("OCTAVO_CPU_ISA", "")
    threads = "one thread" if torch.get_num_threads() == 1 else ""
    name = re.sub(r"[^a-z0-9]+", "-", f"{processor_name()} {held} {threads}".lower()).strip("-")
    return f"cpu-{kind}-{name}"


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
    Console(width=170).print(out)


def chosen(values: list[float], trusted: list[bool]) -> list[float]:
    """The values of the rounds that can be trusted; all of them where none can."""
    return [value for value, ok in zip(values, trusted, strict=True) if ok] or values


def spread_text(found: dict[str, float], form: str) -> str:
    """A spread as median (low to high)."""
    return f"{found['median']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def show_models(result: dict, folder: Path) -> None:
    """Print the table of `benchmarks.cpu models` and draw its plot into `folder`."""
    methods = ("decode", "prefill")
    best = best_of(*(found[what] for found in result["peers"].values() for what in methods))
    own: dict[str, list[float]] = {what: [] for what in methods}
    groups: dict[str, dict[str, dict[str, float]]] = {what: {} for what in methods}
    rows, marked = [], False
    for name, found in result["peers"].items():
        cells, counts = [], []
        for what in methods:
            trusted = undisturbed(found[what], best)
            mine, theirs = (chosen(found[what][who], trusted) for who in ("octavo", "peer"))
            own[what] += mine if any(trusted) else []
            groups[what][name] = spread([b / a for a, b in zip(mine, theirs, strict=True)])
            ratio = ratios(mine, theirs)
            mark = "" if any(trusted) else " !"
            marked = marked or bool(mark)
            cells += [
                spread_text(spread(theirs), ".2f"),
                spread_text(ratio, ".2f") + mark,
            ]
            counts.append(f"{sum(trusted)} of {len(trusted)}")
        rows.append(
            [name, *cells, ", ".join(counts), f"{found['peak_bytes'] / 2**30:.2f}", f"{found['ready']:.1f}"]
        )
    if rows:
        cells = []
        for what in methods:
            # Where every round was disturbed there is nothing better than all of them.
            values = own[what] or [v for found in result["peers"].values() for v in found[what]["octavo"]]
            groups[what]["octavo"] = spread([1.0])
            cells += [spread_text(spread(values), ".2f"), "1"]
        mine = result["octavo"]
        rows.insert(0, ["octavo", *cells, "", f"{mine['peak_bytes'] / 2**30:.2f}", f"{mine['ready']:.1f}"])
        shape = next(iter(result["shape"]))
        table(
            f"{shape}, {result['machine']['processor']}, {result['machine']['threads']} threads; memory at best "
            f"{best['bandwidth'] / 1e9:.1f} GB/s; medians of the undisturbed rounds",
            [
                "",
                "decode tok/s",
                "octavo is faster by",
                "prefill tok/s",
                "octavo is faster by",
                "undisturbed rounds",
                "peak GiB",
                "ready s",
            ],
            rows,
        )
        bars(f"models-{shape}", groups, "speed, Octavo's in the same rounds = 1", folder)
    if marked:
        print(
            "! no round with the machine at its best (others' work, slow memory or clock): the ratio counts, not the speeds"
        )
    for name, why in result["failed"].items():
        print(f"failed: {name}: {why}")
    if result["missing"]:
        print("not installed:", ", ".join(result["missing"]))


def bars(
    kind: str, groups: dict[str, dict[str, dict[str, float]]], unit: str, folder: Path = RESULTS
) -> Path | None:
    """A horizontal bar chart for each group: group → {engine: what `spread` gives}. None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 3.2), squeeze=False)
    for axis, (title, values) in zip(axes[0], groups.items(), strict=True):
        names = sorted(values, key=lambda name: values[name]["median"])
        found = [values[name] for name in names]
        medians = [one["median"] for one in found]
        reach = [[m - one["low"] for m, one in zip(medians, found, strict=True)]]
        reach.append([one["high"] - m for m, one in zip(medians, found, strict=True)])
        colors = ["tab:orange" if "octavo" in name else "tab:gray" for name in names]
        chart = axis.barh(
            names, medians, xerr=reach, color=colors, error_kw={"elinewidth": 1, "ecolor": "0.3"}
        )
        axis.bar_label(chart, [f"{m:.3g}" for m in medians], padding=3)
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{processor_name()}, {torch.get_num_threads()} threads; median and range", fontsize=9)
    figure.tight_layout()
    path = folder / f"{file_stem(kind)}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
