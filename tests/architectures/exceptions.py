"""Architectures that the plain model does not run either, each with the reason. A test makes sure that it still does not.

Example:
    >>> from tests.architectures.exceptions import PLAIN_FAILS
    >>> PLAIN_FAILS["causal", "musicgen"]  # doctest: +SKIP
    'made of ...'
"""

# (task, type of model) → why; what the error says must contain the second entry.
PLAIN_FAILS: dict[tuple[str, str], tuple[str, str]] = {}
