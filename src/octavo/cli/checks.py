"""What can be wrong with a command's files and names, told before torch and transformers are imported, which takes seconds.

Example:
    >>> check_model("no/such/model")
    Traceback (most recent call last):
    octavo.checkpoint.errors.CheckpointError: no/such/model: no such file or folder, ...
"""

from pathlib import Path

from octavo.checkpoint.reading.locate import NEWEST, Hub, Location, locate, locate_adapter
from octavo.checkpoint.writing.output_directory import check_writable
from octavo.json_files import read_object

# Ends of the names of classes that do not continue a text, and of those among them that do.
OTHERS = (
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
CONTINUE = ("LMHeadModel", "DoubleHeadsModel")


def check_model(model: str, what_for: str = "", adapter: str | None = None, hub: Hub = NEWEST) -> Location:
    """Find a model; of a hub id, the files are fetched.

    Args:
        what_for: what only a model that continues text can do: "generate", "fine-tune". Then it must be one.
        hub: what is fetched of a hub id.

    Raises:
        ValueError, OSError: if there is no model, it is of another kind, or there is no adapter to put on top.
    """
    if adapter is not None:
        locate_adapter(adapter)
    found = locate(model, hub)
    if what_for and found.format != "gguf":
        name = architecture(found.folder)
        if name and not continues_text(name):
            raise ValueError(
                f"{model}: {name} does not continue text, so there is nothing to {what_for}; in Python: {in_python(name, model)}"
            )
    return found


def architecture(folder: Path) -> str:
    """The class that a model's config.json names; "" if it names none."""
    try:
        names = read_object(folder / "config.json").get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""
    except (OSError, ValueError):
        # Whoever loads the model says what is wrong with it.
        return ""


def continues_text(name: str) -> bool:
    """Whether a class of transformers, by its name, predicts the next token: so unless it is known not to."""
    return not name.endswith(OTHERS) or name.endswith(CONTINUE)


def in_python(name: str, model: str | Path) -> str:
    """The lines that load a model which continues no text."""
    if (Path(model) / "modules.json").is_file():
        return f"from sentence_transformers import SentenceTransformer; SentenceTransformer({str(model)!r})"
    return f"from transformers import {name}; {name}.from_pretrained({str(model)!r})"


def check_prompt(text: str) -> None:
    """Raise ValueError if a prompt is empty, or holds bytes that are no text."""
    from octavo.text_files import check_whole

    if not text.strip():
        raise ValueError("the prompt is empty: give at least one word to continue")
    check_whole(text, "the prompt")


def check_drawing(output: Path, option: str) -> None:
    """Before hours of work: raise ImportError or OSError if a plot cannot be drawn, or its folder cannot be made or written."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{option}: the plot needs matplotlib: pip install matplotlib")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{option} {output}: expected a folder, found a file")
    check_writable(output, f"{option} {output}")


def check_against(against: str | None) -> None:
    """Raise ValueError or OSError if there is no checkpoint to compare with."""
    if against is not None:
        check_model(against)


def check_measured(
    model: str, texts: list[str], window: int | None, stride: int | None, adapter: str | None = None
) -> None:
    """Raise ValueError or OSError for what cannot be scored: texts, windows over them, a model that predicts no text."""
    if window is not None and stride is not None and stride > window:
        raise ValueError(f"--stride: expected at most --window, {window}, found {stride}")
    check_texts(texts)
    check_model(model, "measure perplexity of", adapter=adapter)


def check_texts(texts: list[str]) -> None:
    """Raise ValueError or OSError if a file of texts is not there, is empty or is no text. Data sets are asked for later."""
    from octavo.text_files import is_file, read_text

    for text in texts:
        if is_file(text):
            read_text(text, "--text")
