"""Makes proverbios.jsonl and finales.jsonl from the book of Proverbs that ships with Octavo (Reina-Valera 1909, public domain).

    python examples/lm_eval/make_data.py

proverbios.jsonl: the first eight verses of each chapter. finales.jsonl: of verses with two halves ("...: mas ..."), the first,
four second halves, of which one is its own, and its place among them.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
VERSES = 8
QUESTIONS = 60
JOINT = ": mas "
# The other three endings are those of verses so many questions further on.
STEPS = (7, 19, 31)


def documents(chapters: list[list[str]]) -> list[dict]:
    return [
        {"capitulo": number, "texto": "\n".join(verses[:VERSES])} for number, verses in enumerate(chapters, 1)
    ]


def questions(chapters: list[list[str]]) -> list[dict]:
    halves = [verse.split(JOINT) for verses in chapters for verse in verses if verse.count(JOINT) == 1]
    halves = halves[:QUESTIONS]
    found = []
    for number, (start, own) in enumerate(halves):
        endings = [halves[(number + step) % len(halves)][1] for step in STEPS]
        place = number % 4
        endings.insert(place, own)
        found.append({"comienzo": f"{start}:", "finales": [f"mas {end}" for end in endings], "propio": place})
    return found


def write(path: Path, rows: list[dict]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )


def main() -> None:
    from octavo import demo

    text = (demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")
    chapters = [chapter.splitlines() for chapter in text.strip().split("\n\n")]
    write(HERE / "proverbios.jsonl", documents(chapters))
    write(HERE / "finales.jsonl", questions(chapters))


if __name__ == "__main__":
    main()
