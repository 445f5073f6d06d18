"""What prompts an adapter was trained on, kept with it, so that whoever generates from it asks in the same way.

A model with a chat template may be taught plain text, or conversations. The weights do not show which, and an adapter asked in
the other way answers as if it had learned nothing. So `octavo finetune` writes `octavo_prompts.json` into the adapter's folder:

    {"prompts": "plain" or "chat", "chat_template": "...", "system": "...",
     "examples": {"text": 0, "completion": 10, "messages": 0}}

`octavo merge` copies the file into the merged model. `encode` is the one function that follows it: for `octavo generate`, and for
a server.

Example:
    >>> encode(tokenizer, "2 + 2 =").inputs
    {'input_ids': tensor([[...]]), 'attention_mask': ...}
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.writing.durable import write_json
from ..json_files import read_object

PROMPTS_FILE = "octavo_prompts.json"
PLAIN, CHAT = "plain", "chat"


@dataclass(frozen=True)
class Prompts:
    """How the prompts looked that an adapter was trained on.

    Attributes:
        prompts: "plain" (texts, prompts with completions) or "chat" (conversations in a chat template); of a mixture what
            there was more of.
        chat_template: the template, in Jinja, of the conversations.
        system: the system text that every conversation began with; None if they began with several, or with none.
        examples: number of records of each kind: "text", "completion", "messages".
    """

    prompts: str = PLAIN
    chat_template: str | None = None
    system: str | None = None
    examples: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]], tokenizer: Any) -> "Prompts":
        """Those of training records (`octavo.training.data.read_records`)."""
        counts: Counter[str] = Counter()
        systems: set[str | None] = set()
        for record in records:
            kind = next(name for name in ("messages", "completion", "text") if name in record)
            counts[kind] += 1
            if kind == "messages":
                first = record["messages"][0] if record["messages"] else {}
                systems.add(first.get("content") if first.get("role") == "system" else None)
        examples = {name: counts[name] for name in ("text", "completion", "messages")}
        if not counts["messages"]:
            return cls(examples=examples)
        return cls(
            prompts=CHAT if 2 * counts["messages"] >= counts.total() else PLAIN,
            chat_template=tokenizer.chat_template,
            system=systems.pop() if len(systems) == 1 else None,
            examples=examples,
        )

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / PROMPTS_FILE, asdict(self), ensure_ascii=False)


def read_prompts(source: str | Path) -> Prompts | None:
    """What an adapter's folder or hub id, a checkpoint of its run, or a merged model says of its prompts; None: nothing.

    Raises:
        ValueError: if the file is there and is damaged.
    """
    path = _find(source)
    if path is None:
        return None
    try:
        found = read_object(path)
        kind = found["prompts"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: expected what `octavo finetune` writes, found something else; remove it and choose --chat or --no-chat"
        ) from error
    if kind not in (PLAIN, CHAT):
        raise ValueError(f"{path}: prompts: expected {PLAIN} or {CHAT}, found {kind!r}")
    return Prompts(kind, found.get("chat_template"), found.get("system"), found.get("examples") or {})


def _find(source: str | Path) -> Path | None:
    folder = Path(source).expanduser()
    if folder.exists():
        places = [folder] if folder.is_dir() else [folder.parent]
        if folder.name.startswith("checkpoint-"):
            # A checkpoint of a run: the file is beside it.
            places.append(folder.absolute().parent)
        return next((place / PROMPTS_FILE for place in places if (place / PROMPTS_FILE).is_file()), None)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(source), PROMPTS_FILE))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None


@dataclass(frozen=True)
class Encoded:
    """A prompt as a model takes it.

    Attributes:
        inputs: int64 [1, tokens] each: input_ids, attention_mask.
        notes: what the user should know of how it was made: a mismatch with the training, one line each.
    """

    inputs: dict[str, Any]
    notes: tuple[str, ...] = ()


def encode(
    tokenizer: Any,
    prompt: str | list[dict[str, Any]],
    chat: bool | None = None,
    system: str | None = None,
    trained: Prompts | None = None,
    adapter: bool = False,
) -> Encoded:
    """Token ids and mask of a prompt, asked for as the adapter was trained.

    Args:
        tokenizer: the model's.
        prompt: a text, or messages as a chat server gets them: [{"role", "content"}].
        chat: whether it goes into the chat template. None: as trained; where that is not known, if there is a template.
        system: the system text of the conversation. None: as trained.
        trained: what `read_prompts` found.
        adapter: whether an adapter is on the model: one that does not say what it was trained on is worth a note.

    Raises:
        ValueError: if a chat template is asked for and there is none, a plain adapter is given several messages, or the prompt
            is empty.
    """
    notes = []
    own = getattr(tokenizer, "chat_template", None)
    template = own
    if trained is not None and trained.chat_template:
        template = trained.chat_template
    asked, chat = chat, _is_chat(chat, system, bool(template), trained)
    if chat and not template:
        raise ValueError("--chat: this model's tokenizer has no chat template; leave the option out")
    if trained is not None and asked is not None and chat != (trained.prompts == CHAT):
        given = "a conversation in a chat template" if chat else "plain text"
        notes.append(
            f"the adapter was trained on {_described(trained)}, and is asked with {given}: "
            f"leave {'--chat' if chat else '--no-chat'} out to ask as it was trained"
        )
    elif trained is None and adapter and asked is None and own:
        notes.append(
            "this adapter does not say what it was trained on: the prompt goes into the model's chat template; if it was "
            "trained on plain text, --no-chat"
        )
    if chat:
        if template != own and own:
            notes.append(
                "the chat template is the one that the adapter was trained with, not the model's own"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError("the prompt is empty: give at least one word")
        text = system if system is not None else trained.system if trained is not None else None
        if text and not (messages and messages[0].get("role") == "system"):
            messages.insert(0, {"role": "system", "content": text})
        inputs = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        return Encoded(dict(inputs), tuple(notes))
    if not isinstance(prompt, str):
        if len(prompt) != 1:
            raise ValueError(
                f"this adapter was trained on plain text, which holds no turns: expected one message, found {len(prompt)}"
            )
        prompt = str(prompt[0]["content"])
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise ValueError("the prompt is empty: give at least one word to continue")
    return Encoded(dict(inputs), tuple(notes))


def _is_chat(asked: bool | None, system: str | None, has_template: bool, trained: Prompts | None) -> bool:
    if asked is not None:
        return asked
    if system is not None:
        return True
    return trained.prompts == CHAT if trained is not None else has_template


def _described(trained: Prompts) -> str:
    kinds = [name for name, count in trained.examples.items() if count]
    mixed = ", most of it" if len(kinds) > 1 and "messages" in kinds else ""
    return f"conversations in a chat template{mixed}" if trained.prompts == CHAT else f"plain text{mixed}"
