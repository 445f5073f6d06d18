"""The demonstration: a small Spanish GPT-J that ships with Octavo (`model/`), a text it never saw (`text/`), and what
`octavo demo` does with them.

Example:
    >>> from octavo import demo
    >>> (demo.MODEL / "config.json").exists()
    True
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
TEXT = Path(__file__).parent / "text"
PROMPT = "El sentido de la vida es"
