"""The one error that reading or writing a checkpoint raises when the files, not the program, are at fault.

Example:
    >>> from octavo.checkpoint.errors import CheckpointError
    >>> raise CheckpointError("model.safetensors is truncated: ...")
    Traceback (most recent call last):
    octavo.checkpoint.errors.CheckpointError: model.safetensors is truncated: ...
"""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written.

    Its message is one line for a person: it names the file or tensor, says what was expected and found, and
        what to do.
    """
