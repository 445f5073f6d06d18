"""`Calibration`: runs a model on text and hands the sums of each matrix's inputs to a conversion that asks for them.

The model runs in 8 bits, quantized plainly, whole; its layers' inputs are those of the float model to within the error of 8
bits. Sums that together do not fit the memory are made in several runs of the model over the same text, in the order in which
the conversion writes. What is not reached (see `left_out`) is quantized plainly.

Example:
    >>> from octavo.checkpoint import convert
    >>> calibration = Calibration(["book.txt"], tokens=2048)
    >>> result = convert("model", "calibrated", calibration=calibration)
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.errors import CheckpointError
from ..config import OctavoConfig
from ..quantizer import Packed
from ..text_files import read_text
from .feedback import DAMPING, TIED_DAMPING, output_error, recode
from .observe import Enough, Observer
from .text import read_windows

TOKENS = 16384
# Longer windows cost attention; most of what matters to a layer's inputs shows within so many.
WINDOW = 512
# Fewer inputs than this share of a row's length span too little of what other text brings: a pooler sees one per window.
FEWEST_INPUTS = 0.25
# The sums may take this share of the memory that is free, and at least so many bytes.
MEMORY_SHARE, LEAST_MEMORY = 0.5, 1 << 30

# Windows done, and in all.
Progress = Callable[[int, int], None]


class Calibration:
    """Chooses codes by the output's error on text: a conversion's `octavo.checkpoint.writing.calibrator.Calibrator`.

    Args:
        texts: text files.
        tokens: tokens of them to run the model on, about.
        device: where the model runs. Default: as `octavo.load` chooses.
        memory: bytes the sums of inputs may take at a time. Default: half of what is free.

    Attributes:
        left_out: quantized parameters that were quantized plainly: name → reason.
        errors: calibrated parameters: name → share of the output's power that is error on the text, plain and calibrated.

    Raises:
        ValueError: if `tokens` is too small.
    """

    def __init__(
        self,
        texts: Sequence[str | Path],
        tokens: int = TOKENS,
        device: torch.device | str | None = None,
        memory: int | None = None,
    ):
        self.texts = list(texts)
        self.tokens = tokens
        self.device = device
        self.memory = memory
        self.left_out: dict[str, str] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.progress: Progress = lambda done, total: None
        self._seen: Observer | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the converted model's config.json records it."""
        digest = hashlib.sha256()
        for path in self.texts:
            digest.update(read_text(path, "--calibrate").encode())
        return {"method": "error-feedback", "tokens": self.tokens, "text_sha256": digest.hexdigest()}

    def check(self, source: Any) -> None:
        """Raise ValueError if a checkpoint is of a kind that cannot be calibrated."""
        if source.eight_bit:
            raise ValueError(
                f"{source.folder}: --calibrate needs the float checkpoint; this one is in 8 bits already"
            )
        if getattr(source.model_config(), "is_encoder_decoder", False):
            raise ValueError(
                f"{source.folder}: --calibrate runs causal models and encoders; this is an encoder-decoder"
            )

    def open(self, source: Any, config: OctavoConfig, names: Iterable[str]) -> None:
        """Load the model, read the text, and see which matrices can be calibrated.

        Args:
            source: the open checkpoint (`octavo.checkpoint.open_source`).
            config: how it will be quantized; `skip` is what counts here.
            names: parameters that will be quantized, in the order in which they will be asked for.

        Raises:
            ValueError: if the text is too short or not to be read, or the model has no tokenizer.
        """
        from ..loading import load, load_tokenizer
        from ..tensor import OctavoTensor

        place = source.place
        text_config = source.model_config().get_text_config()
        longest = min(WINDOW, getattr(text_config, "max_position_embeddings", None) or WINDOW)
        self.windows = read_windows(self.texts, load_tokenizer(place), self.tokens, longest)
        self.model = load(place, device=self.device, config=OctavoConfig(skip=config.skip))
        names = list(names)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = {name: parameters[name] for name in names if name in parameters}
        self._weights = {
            id(weight): (name, weight.transposed)
            for name, weight in found.items()
            if isinstance(weight, OctavoTensor) and weight.qdata.dim() == 2
        }
        self._plan(names)

    def _plan(self, names: list[str]) -> None:
        """One short run shows the order of use and who shares inputs; then runs are cut to fit the memory."""
        scout = Observer(self._weights, sizes_only=True)
        self._run(scout, [self.windows[0][:16]])
        self._tied = scout.embeddings
        self._order = {name: place for place, name in enumerate(scout.shared)}
        budget = self.memory or self._free()
        self._groups: list[set[str]] = []
        held: set[str] = set()
        left = 0
        for name in names:
            if name not in scout.shared:
                self.left_out[name] = "is not multiplied whole (an embedding, an expert of a stack)"
                continue
            owner = scout.shared[name]
            size = 0 if owner in held else 4 * scout.columns[name] ** 2
            if not self._groups or size > left:
                self._groups.append(set())
                held, left, size = set(), budget, 4 * scout.columns[name] ** 2
            self._groups[-1].add(name)
            held.add(owner)
            left -= size

    def _free(self) -> int:
        device = self.model.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            import psutil

            free = psutil.virtual_memory().available
        return max(LEAST_MEMORY, int(free * MEMORY_SHARE))

    def _run(self, seen: Observer, windows: list[torch.Tensor], report: bool = False) -> None:
        options = {"use_cache": False} if self.model.can_generate() else {}
        for index, ids in enumerate(windows):
            if report:
                self.progress(index, len(windows))
            try:
                # Not inference_mode: its tensors do not tell whether they were changed since they were summed up.
                with torch.no_grad(), seen:
                    self.model(input_ids=ids[None].to(self.model.device), **options)
            except Enough:
                pass

    def gram(self, name: str) -> torch.Tensor | None:
        """Sum of x xᵀ over the inputs of a matrix, float32 [K, K]; None if it is not calibrated."""
        group = next((group for group in self._groups if name in group), None)
        if group is None:
            return None
        if self._seen is None or name not in self._seen.wanted:
            self._seen = None  # the memory of the last run's sums is needed for this one's
            last = max(group, key=self._order.__getitem__)
            seen = Observer(self._weights, wanted=group, stop_after=last)
            self._run(seen, self.windows, report=True)
            self._seen = seen
        return self._seen.gram(name)

    def quantize(self, name: str, matrix: torch.Tensor, plain: Packed) -> Packed:
        """Choose the codes of a quantized matrix anew, where it can be calibrated.

        Args:
            name: the parameter.
            matrix: float [N, K].
            plain: its plain quantization.

        Raises:
            CheckpointError: if its inputs hold NaN or infinity, naming it.
        """
        gram = self.gram(name)
        if gram is None:
            return plain
        assert self._seen is not None
        tokens = self._seen.tokens(name)
        if tokens < FEWEST_INPUTS * len(gram):
            self.left_out[name] = f"was given {tokens} inputs, too few for its rows of {len(gram)} weights"
            return plain
        device = plain.qdata.device
        moved = _on(plain, gram.device)
        weight = matrix.to(gram.device)
        try:
            packed = recode(weight, moved, gram, TIED_DAMPING if name in self._tied else DAMPING)
        except ValueError as error:
            raise CheckpointError(f"--calibrate: {name}: {error}") from error
        before, power = output_error(weight, moved, gram)
        after, _ = output_error(weight, packed, gram)
        self.errors[name] = (before / power, after / power) if power else (0.0, 0.0)
        return _on(packed, device)


def _on(packed: Packed, device: torch.device) -> Packed:
    qdata, absmax, code, block_size = packed
    return Packed(qdata.to(device), absmax.to(device), code.to(device), block_size)
