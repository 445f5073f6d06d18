"""Write requirements/lock.txt: every package that `make install` takes, its exact version and the hashes of its files.

    make lock          # after a change of pyproject.toml or constraints.txt; needs the package index

uv resolves for every Python and system at once (a line says where it holds). Versions stay as they are where they may. torch
and the GPU libraries that only its GPU builds bring are left out: its builds for CPUs and for each CUDA have different files
and different dependencies, so no one list of hashes fits; `make install` takes torch of the version in constraints.txt.

With --check nothing is written, and the exit status is 1 if the file is not what would be written.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
HEAD = "# Written by `make lock` (scripts/lock.py); `make install` takes these files and no others.\n"
# What torch's GPU builds bring; triton is wanted without them as well.
LEFT_OUT = re.compile(r"torch==|nvidia-|cuda-")


def compiled() -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "lock.txt")
        if LOCK.exists():
            # uv keeps the versions that it finds.
            out.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
        options = ["--universal", "--python-version", "3.10", "--generate-hashes", "--no-header", "--quiet"]
        inputs = ["pyproject.toml", "requirements/build.in", "--extra", "train", "--extra", "dev"]
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            *options,
            "-c",
            "constraints.txt",
            "-o",
            str(out),
        ]
        subprocess.run([*command, *inputs], check=True, cwd=ROOT)
        text = out.read_text(encoding="utf-8")
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return HEAD + "".join(block for block in blocks if not LEFT_OUT.match(block))


def main() -> int:
    text = compiled()
    if "--check" in sys.argv:
        same = LOCK.exists() and LOCK.read_text(encoding="utf-8") == text
        print("requirements/lock.txt is " + ("up to date" if same else "old: run `make lock`"))
        return 0 if same else 1
    LOCK.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
