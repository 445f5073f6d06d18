"""An adapter's README.md: what it was made from, with which settings, how far it came, and how to use it.

Example:
    >>> from octavo.training.recipe import Recipe
    >>> Path("tuned").mkdir()
    >>> write_card("tuned", Origin("some/model", ["poems.txt"]), Recipe(), [])
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.writing.durable import written_aside
from .prompts import CHAT, Prompts
from .recipe import Recipe

TEMPLATE = """---
{{ card_data }}
---

# Adapter for {{ name }}

A LoRA adapter for `{{ base }}`, trained on its frozen 8-bit weights
with Octavo {{ version }}.

## Use

```
{{ command }}
```

```python
import octavo

model = octavo.load({{ base.__repr__() }}, adapter={{ folder.__repr__() }})
```

It is a standard PEFT adapter: `PeftModel.from_pretrained(model, {{ folder.__repr__() }})` puts it onto the same model in
any other precision.

{{ asked }}

## Data

{% for each in data %}- `{{ each }}`
{% endfor %}
{{ examples }}

## Losses

{{ losses }}

## Settings

| option | value |
| --- | --- |
{% for option, value in settings.items() %}| `{{ option }}` | {{ value }} |
{% endfor %}
## Versions

{{ versions }}
"""


@dataclass(frozen=True)
class Origin:
    """Where a run's model and examples come from.

    Attributes:
        base: the model, as the user named it: a path or a hub id.
        data: the files or data sets, as the user named them.
        prompts: what the examples were made from.
    """

    base: str
    data: list[str] = field(default_factory=list)
    prompts: Prompts = field(default_factory=Prompts)

    @property
    def absolute_base(self) -> str:
        """The model by a name that is right from any folder: an absolute path, or its hub id."""
        path = Path(self.base).expanduser()
        return str(path.resolve()) if path.exists() else self.base


def write_card(
    folder: str | Path, origin: Origin, recipe: Recipe, history: list[dict[str, float]], out: str | Path = ""
) -> None:
    """Write README.md into an adapter's folder, in place of PEFT's template.

    Args:
        history: the Trainer's log.
        out: the folder as the user named it, for the commands shown. Default: `folder`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from .curves import HEADINGS, loss_rows

    base, folder, out = origin.absolute_base, Path(folder), str(out or folder)
    rows = loss_rows(history)
    losses = "\n".join(f"| {' | '.join(row)} |" for row in (HEADINGS, ["---:"] * len(HEADINGS), *rows))
    local = Path(base).exists()
    data = ModelCardData(
        # The hub takes ids only.
        base_model=None if local else base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "octavo"],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=Path(base).name if local else base,
        base=base,
        folder=out,
        version=_version("octavo"),
        command=f"octavo generate {shlex.quote(base)} PROMPT --adapter {shlex.quote(out)}",
        asked=_asked(origin.prompts),
        data=origin.data,
        examples=_examples(origin.prompts),
        losses=losses if rows else "None were logged.",
        settings=recipe.to_dict(),
        versions=", ".join(
            f"{name} {_version(name)}" for name in ("octavo", "torch", "transformers", "peft")
        ),
    )
    with written_aside(folder / "README.md") as partial:
        card.save(partial)


def _asked(prompts: Prompts) -> str:
    if prompts.prompts != CHAT:
        return "It was trained on plain text: give it the prompt as it is, without a chat template."
    system = f" Their system text: {prompts.system!r}." if prompts.system else ""
    return f"It was trained on conversations in the model's chat template: ask it in that template.{system}"


def _examples(prompts: Prompts) -> str:
    names = {"text": "texts", "completion": "prompts with completions", "messages": "conversations"}
    counted = [f"{count:,} {names[kind]}" for kind, count in prompts.examples.items() if count]
    return f"Learned from: {', '.join(counted)}." if counted else ""


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def card_callback(origin: Origin, recipe: Recipe) -> Any:
    """A callback for the Trainer that writes each checkpoint's card."""
    from transformers import TrainerCallback

    class Cards(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                write_card(folder, origin, recipe, state.log_history)

    return Cards()
