"""Chat templates that follow what an adapter was trained on (`octavo.training.prompts`), for servers that know only templates.

Example:
    >>> served_template(tokenizer, Prompts("plain"))
    "{% if messages|length != 1 %}...{{ messages[0]['content'] ..."
"""

import json
from typing import Any

from ..training.prompts import CHAT, Prompts

# Plain text has no turns: one message is the text to continue.
PLAIN = (
    "{{% if messages|length != 1 %}}{{{{ raise_exception('this adapter was trained on plain text, which holds no turns: "
    "expected one message, found ' ~ messages|length) }}}}{{% endif %}}{start}{{{{ messages[0]['content'] }}}}"
)


def served_template(tokenizer: Any, trained: Prompts | None) -> str | None:
    """The chat template to serve a model with; None where it has none.

    Args:
        tokenizer: the model's.
        trained: what the adapter, or a merged model, says of its training.
    """
    own = getattr(tokenizer, "chat_template", None)
    if trained is None:
        return own
    if trained.prompts != CHAT:
        return PLAIN.format(start=_start(tokenizer))
    template = trained.chat_template or own
    if template is None or not trained.system:
        return template
    system = f"[{{'role': 'system', 'content': {json.dumps(trained.system, ensure_ascii=False)}}}]"
    return (
        "{% if messages[0]['role'] != 'system' %}{% set messages = "
        + system
        + " + messages %}{% endif %}"
        + template
    )


def _start(tokenizer: Any) -> str:
    """The token that this tokenizer puts before a text, if any: templates are tokenized without it."""
    ids = tokenizer("a").input_ids
    if ids and ids[0] == tokenizer.bos_token_id:
        return "{{ bos_token }}"
    return ""
