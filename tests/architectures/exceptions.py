"""Architectures that the plain model does not run either. A test makes sure that it still does not.

Example:
    >>> from tests.architectures.exceptions import PLAIN_FAILS
    >>> PLAIN_FAILS["seq2seq", "voxtral_realtime"][0]
    'hears speech as it goes: it wants sound with each step, not text alone'
"""

DRAFTER = "drafts for another model, whose hidden states, keys and values it takes instead of text"
MUSIC = "transformers maps it to its decoder's class, which does not take the configuration of the whole"

# (task, type of model) → why, and what the plain model's error says.
PLAIN_FAILS: dict[tuple[str, str], tuple[str, str]] = {
    ("causal", "gemma3n"): ("its picture tower is a model of `timm`, which is not installed", "timm"),
    ("causal", "gemma4_assistant"): (DRAFTER, "cannot be built small"),
    ("causal", "gemma4_unified_assistant"): (DRAFTER, "layer types producing a cache"),
    ("causal", "musicgen"): (MUSIC, "no attribute 'dropout'"),
    ("causal", "musicgen_melody"): (MUSIC, "no attribute 'dropout'"),
    ("seq2seq", "voxtral_realtime"): (
        "hears speech as it goes: it wants sound with each step, not text alone",
        "exactly one of input_features or encoder_inputs_embeds",
    ),
}
