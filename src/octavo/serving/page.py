"""The chat page as it is sent: one file that needs no network, and headers under which it can load nothing else."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parent / "page.html").read_bytes()


def _hashes(element: str) -> str:
    """The page's own scripts or styles, by their hashes, for a Content-Security-Policy."""
    found = re.findall(rf"<{element}>(.*?)</{element}>".encode(), PAGE, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-cache",
    "content-security-policy": f"default-src 'none'; connect-src 'self'; script-src {_hashes('script')}; "
    f"style-src {_hashes('style')}; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
