"""The commands that write, each with small inputs and the files that must come out of it."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from octavo import demo
from octavo.checkpoint import convert

# One thread, no hub: the same bytes each time.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Command:
    """A command line. `{out}` stands for the output folder or file, `{eight}`, `{adapter}` and `{data}` for inputs.

    Args:
        again: what is added when it is run once more after a crash.
        suffix: of the output's name.
        folder: whether its output is a working folder, which is there before it is whole.
    """

    name: str
    line: str
    again: str = ""
    suffix: str = ""
    folder: bool = False

    def arguments(self, out: Path, inputs: dict[str, Path], again: bool = False) -> list[str]:
        text = self.line + (f" {self.again}" if again and self.again else "")
        words = [word.format(out=out, **inputs) for word in text.split()]
        return [sys.executable, "-m", "octavo", *words]


COMMANDS = [
    Command("quantize", "quantize {plain} {out}"),
    Command("quantize --calibrate", "quantize {plain} {out} --calibrate {data} --calibrate-tokens 1024"),
    Command("merge", "merge {eight} {adapter} {out}"),
    Command("export", "export {eight} {out}.gguf", suffix=".gguf"),
    Command("evaluate --save-logits", "evaluate {eight} --text {data} --save-logits {out}"),
    Command(
        "finetune --resume",
        "finetune {eight} --data {data} --output {out} --max-steps 4 --evaluations 4",
        "--resume",
        folder=True,
    ),
]


def inputs_in(folder: Path) -> dict[str, Path]:
    """Make the inputs: the shipped model plain and in 8 bits, an adapter of it, some text."""
    data = folder / "text.txt"
    data.write_text(
        "\n\n".join(f"La luna número {n} brilla sobre el mar, y nadie la mira dos veces." for n in range(60))
    )
    eight = folder / "eight"
    convert(demo.MODEL, eight)
    adapter = folder / "adapter"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "octavo",
            "finetune",
            str(eight),
            "--data",
            str(data),
            "--output",
            str(adapter),
            "--max-steps",
            "1",
        ],
        check=True,
        capture_output=True,
        env=ENVIRONMENT,
    )
    return {"plain": demo.MODEL, "eight": eight, "adapter": adapter, "data": data}


def digests(place: Path) -> dict[str, str]:
    """Name → digest of each file at a place, hidden ones left out; empty if there is nothing."""
    if place.is_file():
        return {"": hashlib.sha256(place.read_bytes()).hexdigest()}
    files = (p for p in place.rglob("*") if p.is_file()) if place.is_dir() else ()
    found = {str(p.relative_to(place)): p for p in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(found.items())
        if not any(part.startswith(".") for part in Path(name).parts)
    }
