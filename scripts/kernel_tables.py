"""The tables of GPU kernels in docs/GPU.md, made from the kernels' records.

python scripts/kernel_tables.py           write them
python scripts/kernel_tables.py --check   exit 1 if they are not what the records say
"""

import os
import sys
from pathlib import Path

import torch

from octavo.ops.gpu import choose, kernels
from octavo.ops.gpu.kernel import Call

PAGE = Path(__file__).resolve().parent.parent / "docs" / "GPU.md"
BEGIN = "<!-- made by scripts/kernel_tables.py from the kernels' records -->\n"
END = "<!-- end of what is made -->\n"
# Column head → the call, but for its tokens.
CASES: dict[str, dict] = {
    "16 bits, 9.0": {"capability": (9, 0)},
    "16 bits, 8.0 to 8.9, 10.0 and later": {"capability": (8, 0)},
    "float16, 7.5": {"dtype": torch.float16, "capability": (7, 5)},
    "16 bits, before 7.5": {"dtype": torch.float16, "capability": (7, 0)},
    "float32": {"dtype": torch.float32},
    "16 bits, rows not a multiple of 16": {"columns": 4099},
}


def first(tokens: int, **case) -> str:
    """The kernel that a call gets, as long as it passes its check."""
    call = Call(
        **{"dtype": torch.bfloat16, "rows": 4096, "columns": 4096, **case}, tokens=tokens, device=DEVICE
    )
    return next(k for k in choose.tried("linear", call) if k.unsupported_reason(call) is None).name


DEVICE = torch.device("cuda", 0)


def choice_table() -> str:
    """Which kernel a product with a 4096 x 4096 matrix gets, by tokens."""
    counts = range(1, choose.MOST_TOKENS + 2)
    columns = {head: [first(tokens, **case) for tokens in counts] for head, case in CASES.items()}
    rows = list(zip(*columns.values(), strict=True))
    lines = [f"| tokens | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[start]:
            last = index == len(rows)
            tokens = (
                f"from {start + 1} on"
                if last
                else f"{start + 1} to {index}"
                if index > start + 1
                else f"{index}"
            )
            lines.append(f"| {tokens} | " + " | ".join(f"`{name}`" for name in rows[start]) + " |")
            start = index
    return "\n".join(lines) + "\n"


def kernel_table() -> str:
    """Every kernel, and what it is for."""
    lines = ["| kernel | operation | what it does |", "| --- | --- | --- |"]
    for operation in ("linear", "decode", "encode"):
        lines += [
            f"| `{kernel.name}` | {operation} | {kernel.summary} |"
            for kernel in kernels.named().values()
            if kernel.operation == operation
        ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/GPU.md with its tables made anew."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{choice_table()}\n{kernel_table()}\n{END}{after}"


if __name__ == "__main__":
    os.environ.pop(choose.VARIABLE, None)
    if "--check" in sys.argv:
        sys.exit(f"{PAGE}: run python {sys.argv[0]}" if PAGE.read_text() != page() else 0)
    PAGE.write_text(page())
