"""The options of a fine-tuning run, their defaults, and the preset of the published model card.

Example:
    >>> Recipe.of(preset="model-card", learning_rate=1e-4).lora_r
    4
"""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Recipe:
    """Everything that decides a run's numbers. The names are those of the command line.

    Raises:
        ValueError: on a value out of range, naming the option, what is expected and what was found.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_8bit"
    max_length: int = 512
    packing: bool | None = None
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: str = "all-linear"
    lora_parameters: str = ""
    dora: bool = False
    rslora: bool = False
    train_norms: bool = False
    train_biases: bool = False
    gradient_checkpointing: bool = True
    validation_split: float = 0.05
    evaluations: int = 5
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        positive = (
            "batch_size",
            "gradient_accumulation",
            "max_length",
            "lora_r",
            "lora_alpha",
            "learning_rate",
        )
        for name in positive:
            value = getattr(self, name)
            _require(0 < value < math.inf, name, "a number above 0", value)
        for name in ("weight_decay", "max_grad_norm", "evaluations", "seed"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "a number of at least 0", value)
        _require(self.max_length >= 2, "max_length", "at least 2 tokens", self.max_length)
        _require(self.max_steps is None or self.max_steps > 0, "max_steps", "more than 0", self.max_steps)
        _require(0 < self.epochs < math.inf, "epochs", "a number above 0", self.epochs)
        _require(0 <= self.warmup < 1, "warmup", "a share of the steps, from 0 to below 1", self.warmup)
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "from 0 to below 1", self.lora_dropout)
        _one_of("schedule", self.schedule, ("cosine", "linear", "constant"))
        _one_of("optimizer", self.optimizer, ("adamw_8bit", "adamw"))
        _one_of("dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        experts = bool(self.lora_parameters)
        _require(
            not experts or not self.lora_dropout,
            "lora_dropout",
            "0 with --lora-parameters",
            self.lora_dropout,
        )

    @classmethod
    def of(cls, preset: str | None = None, **options: Any) -> "Recipe":
        """The defaults, changed by a preset, changed by the options that are not None."""
        if preset is not None:
            _one_of("preset", preset, tuple(PRESETS))
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**{**PRESETS.get(preset or "", {}), **given})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Adapters on every linear layer, the head and the embedding, as the published model card has them, with the
# hyper-parameters of the LoRA paper (Hu et al. 2021, arXiv:2106.09685, GPT-2 on E2E), to which the card
# refers: rank 4, alpha 32, dropout 0.1, AdamW with weight decay 0.01, 2e-4 falling linearly, 8 examples a
# step, 5 epochs.
PRESETS: dict[str, dict[str, Any]] = {
    "model-card": {
        "lora_targets": "all",
        "lora_r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "batch_size": 1,
        "gradient_accumulation": 8,
        "epochs": 5.0,
    }
}


def _require(ok: bool, option: str, expected: str, found: object) -> None:
    if not ok:
        raise ValueError(f"--{option.replace('_', '-')}: expected {expected}, found {found}")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, option, f"one of {', '.join(choices)}", repr(value))
