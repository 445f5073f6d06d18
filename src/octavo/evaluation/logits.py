"""A model's predictions over a text in a file, so that another model can be compared without both in memory.

The predictions for one token are as many numbers as the vocabulary has entries: for 290,000 tokens and GPT-J's vocabulary
of 50,400, 58 GB in float32. Almost all models make them by one product: logits = head(state). So what is kept is the state
that the head was given (4,096 numbers, in the type the model computed in) and the head's matrix, once: 5.6 GB, and the
same product gives the same logits again. Whether it does is checked on the first window; where not (a model that bends its
logits afterwards), or where the vocabulary is the smaller, the logits are kept as the model gave them.

A safetensors file, written row by row:

    tensor      type, shape                     what
    nll         float64 [tokens]                negative log-likelihood of each token scored, in nats
    states      the model's, [tokens, width]    what the head was given, one row per token   either these three
    head        [vocabulary, width]             the head's matrix, de-quantized
    head_bias   [vocabulary], if there is one
    logits      the model's, [tokens, vocab.]   ... or these
    about       uint8                           JSON: what was measured, and how (`About`)

Example:
    >>> from octavo.evaluation.scoring import scored, token_nll
    >>> from octavo.evaluation.texts import read_texts, tokenize
    >>> tokens = tokenize(read_texts(["book.txt"]), tokenizer)
    >>> with LogitsWriter("base.logits", model, About.of("base", model, tokens, 512, 256)) as writer:
    ...     for part in scored(model, tokens[0].ids, 512, 256, hidden_states=True):
    ...         writer.add(part, token_nll(part.logits, tokens[0].ids[part.first : part.stop]))
    >>> LogitsReader("base.logits").rows(0, 10).shape
    torch.Size([10, 4096])
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.writing.durable import put_in_place
from ..checkpoint.writing.in_use import Lock
from ..checkpoint.writing.shards import ShardFile, header_room
from ..ops.schema import COMPUTE_DTYPES
from ..tensor import OctavoTensor
from .scoring import Scored
from .texts import Tokens

FORMAT = "octavo-logits"
VERSION = 1
# Rows of the first window on which the head's product is compared with the model's logits, and how far they may be apart, as a
# share of the largest: float32's rounding, with room for another order of summation.
CHECKED_ROWS = 64
ALIKE = 1e-5
# How far a token's likelihood from the file may be from the one that was written beside it, in nats.
SAME_NLL = 1e-3


@dataclass(frozen=True)
class About:
    """What a file of predictions is of.

    Attributes:
        model: as the user named it.
        dtype: type it computed in.
        vocabulary: logits per token.
        window, stride: as in `octavo.evaluation.scoring`.
        texts: name, tokens and SHA-256 of the tokens of each text.
    """

    model: str
    dtype: str
    vocabulary: int
    window: int
    stride: int
    texts: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str, model: Any, tokens: Sequence[Tokens], window: int, stride: int) -> "About":
        texts = [{"name": t.name, "tokens": len(t.ids), "sha256": t.digest} for t in tokens]
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(name, dtype, model.config.get_text_config().vocab_size, window, stride, texts)

    @property
    def scored(self) -> int:
        return sum(text["tokens"] - 1 for text in self.texts)


class LogitsWriter:
    """Writes predictions, in order. A context manager: the file appears under its name when all is written.

    Args:
        path: the file; replaced if it is there.
        model: the model whose predictions come; its head is read when the first ones do.
        about: what is written beside them.

    Raises:
        OSError: if the disk has no room for it.
        ValueError: on leaving it without an error, if fewer tokens came than `about` has.
    """

    def __init__(self, path: str | Path, model: Any, about: About):
        self.path = Path(path)
        self.about = about
        self._model = model
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: ShardFile | None = None
        self._lock: Lock | None = None
        self._at: dict[str, int] = {}
        self._rows = 0
        self._head = False

    def __enter__(self) -> "LogitsWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                if self._file is None or self._rows != self.about.scored:
                    raise ValueError(f"{self.path}: expected {self.about.scored} tokens, found {self._rows}")
                self._file.finish()
                put_in_place(self._partial, self.path)
        finally:
            if self._file is not None:
                self._file.close()
            if self._lock is not None:
                self._partial.unlink(missing_ok=True)
                self._lock.close()

    def add(self, part: Scored, nll: torch.Tensor) -> None:
        """Write the predictions of the next tokens, and their negative log-likelihoods."""
        file = self._file or self._start(part)
        rows = part.hidden_states if self._head else part.logits
        assert rows is not None
        name = "states" if self._head else "logits"
        for key, value in (("nll", nll), (name, rows.cpu())):
            file.write(self._at[key] + self._rows * value[0].numel() * value.element_size(), value)
        self._rows += len(nll)

    def _start(self, part: Scored) -> ShardFile:
        """Decide what is kept, from the first window, and write what is there only once."""
        total, (_, vocabulary) = self.about.scored, part.logits.shape
        head = self._usable_head(part)
        self._head = head is not None
        # A model's configuration may say less than what its head gives (a vocabulary padded to a round number).
        self.about = About(**{**asdict(self.about), "vocabulary": vocabulary})
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self.about)})
        once = {**(head or {}), "about": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
        rows = part.hidden_states if head else part.logits
        assert rows is not None
        pieces = [
            ("nll", torch.float64, (total,)),
            ("states" if head else "logits", rows.dtype, (total, rows.shape[1])),
            *((name, value.dtype, tuple(value.shape)) for name, value in once.items()),
        ]
        size = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in pieces)
        free = shutil.disk_usage(self.path.parent).free
        if size > free:
            raise OSError(
                f"{self.path}: {size / 1e9:.1f} GB of predictions to keep, {free / 1e9:.1f} GB free on the disk; name another "
                "place (--save-logits FILE, or TMPDIR), or score less text (--limit-tokens)"
            )
        self._lock = Lock(self._partial)
        self._file = ShardFile(self._partial, header_room(pieces))
        for piece in pieces:
            self._at[piece[0]] = self._file.reserve(*piece)
        for name, value in once.items():
            self._file.write(self._at[name], value)
        return self._file

    def _usable_head(self, part: Scored) -> dict[str, torch.Tensor] | None:
        """The head's tensors on the CPU, if its product is the model's logits and takes less room than they do."""
        module = self._model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if part.hidden_states is None or weight is None or weight.dim() != 2:
            return None
        bias = getattr(module, "bias", None)
        vocabulary, width = weight.shape
        if part.hidden_states.shape[1] != width or part.hidden_states.dtype not in COMPUTE_DTYPES:
            return None
        kept = (self.about.scored + vocabulary) * width * part.hidden_states.element_size()
        if kept > self.about.scored * vocabulary * part.logits.element_size():
            return None
        dense = (
            weight.dequantize(part.hidden_states.dtype)
            if isinstance(weight, OctavoTensor)
            else weight.detach()
        )
        states = part.hidden_states[:CHECKED_ROWS]
        if dense.dtype != states.dtype or part.logits.shape[1] != vocabulary:
            return None
        again = torch.nn.functional.linear(states, dense, bias).float()
        logits = part.logits[:CHECKED_ROWS].float()
        if not (again - logits).abs().max() <= ALIKE * logits.abs().max():
            return None
        found = {"head": dense.contiguous().cpu()}
        return found if bias is None else {**found, "head_bias": bias.detach().cpu()}


class LogitsReader:
    """Predictions from a file, mapped into memory: what is read is what is asked for.

    Args:
        path: what `LogitsWriter` wrote.
        device: where the logits are made, unless `rows` is told otherwise.

    Attributes:
        about: what they are of.
        nll: negative log-likelihood of each token scored, float64 [tokens].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, damaged or something else.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.device = torch.device(device)
        if not self.path.is_file():
            raise FileNotFoundError(f"--logits {path}: no such file; make it with --save-logits")
        try:
            self._file = safe_open(str(self.path), "pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"not a whole safetensors file ({error})") from None
        self._names = set(self._file.keys())
        self.about = self._read_about()
        self._check_shapes()
        self.nll: torch.Tensor = self._file.get_tensor("nll")
        self._head = self._file.get_tensor("head").to(self.device) if "head" in self._names else None
        self._bias = (
            self._file.get_tensor("head_bias").to(self.device) if "head_bias" in self._names else None
        )

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"--logits {self.path}: {what}; expected what --save-logits writes: write it again")

    def _read_about(self) -> About:
        try:
            found = (
                json.loads(self._file.get_tensor("about").numpy().tobytes()) if "about" in self._names else {}
            )
        except (ValueError, RecursionError):
            found = {}
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise self._damaged("holds no saved logits")
        version = found.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"--logits {self.path}: expected format version {VERSION}, found {version}; update Octavo, or write it again"
            )
        try:
            about = About(**found)
            sizes = [text["tokens"] for text in about.texts]
        except (TypeError, KeyError):
            raise self._damaged("its description is incomplete") from None
        if not all(
            isinstance(n, int) and n > 0 for n in [*sizes, about.vocabulary, about.window, about.stride]
        ):
            raise self._damaged("its description is incomplete")
        return about

    def _check_shapes(self) -> None:
        tokens, vocabulary = self.about.scored, self.about.vocabulary
        shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._names}
        types = {name: self._file.get_slice(name).get_dtype() for name in self._names}
        width = shapes["states"][-1] if shapes.get("states") else 0
        expected: dict[str, tuple[int, ...]] = {"nll": (tokens,), "about": shapes["about"]}
        if "logits" in shapes:
            expected |= {"logits": (tokens, vocabulary)}
        else:
            expected |= {"states": (tokens, width), "head": (vocabulary, width)}
        if "head_bias" in shapes:
            expected |= {"head_bias": (vocabulary,)}
        kinds = {types[name] for name in shapes if name not in ("nll", "about")}
        if (
            shapes != expected
            or types["nll"] != "F64"
            or len(kinds) != 1
            or not kinds <= {"F32", "F16", "BF16"}
        ):
            raise self._damaged(f"its tensors do not fit together: {shapes}")

    def check(self, tokens: Sequence[Tokens], window: int, stride: int) -> None:
        """Raise ValueError unless the file holds predictions of these tokens, in these windows."""
        if (self.about.window, self.about.stride) != (window, stride):
            raise ValueError(
                f"--logits {self.path}: made with --window {self.about.window} --stride {self.about.stride}, found {window} "
                f"and {stride}; give the same"
            )
        ours = [(len(each.ids), each.digest) for each in tokens]
        theirs = [(text["tokens"], text.get("sha256")) for text in self.about.texts]
        if ours != theirs:
            counts = [sum(count for count, _ in each) for each in (theirs, ours)]
            raise ValueError(
                f"--logits {self.path}: made of other tokens ({counts[0]:,} of {len(theirs)} texts, found {counts[1]:,} of "
                f"{len(ours)}); give the same texts and limit, and a model with the same tokenizer"
            )

    def rows(self, start: int, stop: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Logits of the tokens scored from number `start` to before `stop`, [n, vocabulary].

        They are made on `device` (default: the reader's), where the head's matrix then stays.
        """
        self.device = torch.device(device or self.device)
        name = "logits" if self._head is None else "states"
        rows = self._file.get_slice(name)[start:stop].to(self.device)
        if self._head is None:
            return rows
        self._head = self._head.to(self.device)
        self._bias = None if self._bias is None else self._bias.to(self.device)
        with torch.inference_mode():
            return torch.nn.functional.linear(rows, self._head, self._bias)

    def check_rows(self, start: int, nll: torch.Tensor) -> None:
        """Raise ValueError unless the likelihoods that `rows` from `start` on give are those in the file."""
        written = self.nll[start : start + len(nll)]
        if not bool(((nll - written).abs() <= SAME_NLL * written.abs().clamp_min(1.0)).all()):
            raise self._damaged("its predictions and the likelihoods written beside them disagree")
