"""Try an installed wheel: its native kernels are active, and the model that comes along writes.

python scripts/try_wheel.py [FOLDER]    the folder of `octavo` and `python`; by default this Python's
"""

import json
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *command: str) -> str:
    return subprocess.run(
        [folder / command[0], *command[1:]], check=True, capture_output=True, text=True
    ).stdout


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else Path(sys.executable).parent)
    active = json.loads(run(folder, "octavo", "doctor", "--json"))["Kernels"]["CPU"]
    if active.startswith("reference"):
        sys.exit(f"the wheel came without native kernels: {active}")
    where = "from octavo import demo; print(demo.MODEL, demo.PROMPT, sep='|')"
    model, prompt = run(folder, "python", "-c", where).strip().split("|")
    written = run(folder, "octavo", "generate", model, prompt, "--max-new-tokens", "8", "--greedy")
    print(f"{active}\n{written.strip()}")


if __name__ == "__main__":
    main()
