"""Make the text of the demonstration model: what it trains on, and what it is measured on.

Two sources, both from Debian packages, no network needed once they are there:

- the Reina-Valera Bible of 1909 (public domain): `apt-get install sword-text-sparv diatheke`
- the Debian Administrator's Handbook in Spanish (GPL-2+ or CC-BY-SA 3.0): `apt-get install debian-handbook`,
  or only `apt-get download debian-handbook` and `--handbook debian-handbook_*.deb`

Each text file holds documents (a chapter of the Bible, a page of the handbook) separated by an empty line; a
line is a verse or a paragraph. Proverbs is held out whole; of the rest, whole documents chosen by a fixed
seed until they make a tenth of each source.

    python scripts/demo_model/prepare_text.py --out build/demo_text
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

MODULE = "spaRV1909eb"
INSTALLED_HANDBOOK = Path("/usr/share/doc/debian-handbook/html/es-ES")
SHIPPED = Path(__file__).resolve().parents[2] / "src" / "octavo" / "demo" / "text"
SEED = 1909
HELD_OUT = 0.1


def words(text: str) -> frozenset[str]:
    """The different words of a text, split at white space."""
    return frozenset(text.split())


VERSE = re.compile(r"^(?P<book>[A-Za-z ]+) (?P<chapter>\d+):\d+: (?P<text>.*)$")
STRONGS_NUMBER = re.compile(r" *<[HG]\d+>")
BLOCKS = words(
    "html body div p h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table thead tbody tr th td pre blockquote"
)
HEADINGS = words("h1 h2 h3 h4")
SPANISH = words("de la el que en los las un una para con por es se del al su no como más este esta puede")
ENGLISH = words("the of and to in is that for with this on as be are it by can which you from not")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt (not committed)")
    parser.add_argument(
        "--handbook",
        type=Path,
        default=INSTALLED_HANDBOOK,
        help="the handbook's folder of HTML pages, or the .deb (default: %(default)s)",
    )
    parser.add_argument(
        "--shipped",
        type=Path,
        default=SHIPPED,
        help="folder for proverbios.txt and heldout.txt (default: the package's own, src/octavo/demo/text)",
    )
    options = parser.parse_args()

    chapters = bible_chapters()
    proverbs = [text for book, text in chapters if book == "Proverbs"]
    bible = [text for book, text in chapters if book != "Proverbs"]
    bible_train, bible_held_out = split(bible)
    handbook_train, handbook_held_out = split(handbook_pages(options.handbook))

    options.out.mkdir(parents=True, exist_ok=True)
    options.shipped.mkdir(parents=True, exist_ok=True)
    for path, documents in (
        (options.out / "train.txt", bible_train + handbook_train),
        (options.shipped / "proverbios.txt", proverbs),
        (options.shipped / "heldout.txt", bible_held_out + handbook_held_out),
    ):
        text = "\n\n".join(documents) + "\n"
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(documents)} documents, {len(text.split())} words, {len(text.encode())} bytes")


def bible_chapters() -> list[tuple[str, str]]:
    """The chapters in order, as (English name of the book, verses one a line without their references)."""
    if shutil.which("diatheke") is None:
        sys.exit("diatheke is not installed: apt-get install diatheke sword-text-sparv")
    command = ["diatheke", "-b", MODULE, "-f", "plain", "-k", "Gen 1:1-Rev 22:21"]
    output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in output.splitlines():
        if verse := VERSE.match(line):
            text = " ".join(STRONGS_NUMBER.sub("", verse["text"]).split())
            if text:
                chapters.setdefault((verse["book"], verse["chapter"]), []).append(text)
    if len(chapters) != 1189:
        sys.exit(
            f"expected the 1189 chapters of the Bible module {MODULE}, found {len(chapters)}: "
            "apt-get install sword-text-sparv"
        )
    return [(book, "\n".join(verses)) for (book, _), verses in chapters.items()]


def handbook_pages(source: Path) -> list[str]:
    """The pages of the handbook that have Spanish text, one paragraph a line.

    `source` is the folder of HTML pages, or the .deb that holds it. Program listings are left out, and so are
    the paragraphs that nobody has translated yet.
    """
    if source.suffix == ".deb" and source.is_file():
        with tempfile.TemporaryDirectory() as unpacked:
            subprocess.run(["dpkg-deb", "--extract", str(source), unpacked], check=True)
            return handbook_pages(Path(unpacked) / INSTALLED_HANDBOOK.relative_to("/"))
    pages = sorted(source.glob("*.html"))
    if not pages:
        sys.exit(
            f"no HTML pages in {source}: apt-get install debian-handbook, "
            "or apt-get download debian-handbook and give the file with --handbook"
        )
    contents = (page.read_text(encoding="utf-8") for page in pages if page.name != "index.html")
    texts = ("\n".join(paragraphs(html)) for html in contents)
    return [text for text in texts if text]


def paragraphs(html: str) -> Iterator[str]:
    """The Spanish headings and paragraphs of a page of the handbook, white space collapsed."""
    reader = PageReader()
    reader.feed(html)
    for paragraph in reader.blocks:
        found = re.findall(r"\w+", paragraph.lower())
        spanish, english = (sum(word in known for word in found) for known in (SPANISH, ENGLISH))
        if found and spanish >= english and (spanish or len(found) < 4):
            yield paragraph


class PageReader(HTMLParser):
    """Collects into `blocks` the text whose innermost block is a paragraph or a heading."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._open: list[tuple[str, bool]] = []
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._flush()
            classes = (dict(attrs).get("class") or "").split()
            self._open.append((tag, "para" in classes or tag in HEADINGS))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS and any(tag == name for name, _ in self._open):
            self._flush()
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1]:
            self._text.append(data)

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text.clear()
        if text:
            self.blocks.append(text)


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(to train on, held out): whole documents in their own order, a tenth of the bytes held out."""
    order = list(range(len(documents)))
    random.Random(SEED).shuffle(order)
    wanted = HELD_OUT * sum(len(document.encode()) for document in documents)
    held_out: set[int] = set()
    for index in order:
        if sum(len(documents[i].encode()) for i in held_out) >= wanted:
            break
        held_out.add(index)
    return (
        [document for i, document in enumerate(documents) if i not in held_out],
        [document for i, document in enumerate(documents) if i in held_out],
    )


if __name__ == "__main__":
    main()
