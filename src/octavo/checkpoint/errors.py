"""The one error that reading or writing a checkpoint raises when the files, not the program, are at fault.

Example:
    >>> from octavo.checkpoint.errors import CheckpointError
    >>> raise CheckpointError("model.safetensors is truncated: ...")
    Traceback (most recent call last):
    octavo.checkpoint.errors.CheckpointError: model.safetensors is truncated: ...
"""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written.

    Its message is one line for a person: it names the file or tensor, says what was expected and found, and what to do.
    """


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers, PEFT and safetensors raise over files and configurations that they cannot make sense of.

    A configuration may hold anything, and they use its values before they check them.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    plain = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    )
    return (*plain, OSError, ImportError, StrictDataclassError, SafetensorError)


# What torch's allocator, mapped files and the system say where there is no memory.
NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory, of this machine or of a GPU: not a fault of any file."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if type(error).__name__ == "PanicException":
        # Libraries in Rust: a thread that could not be begun, for one.
        return any(words in str(error) for words in (*NO_MEMORY, "Resource temporarily unavailable"))
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in NO_MEMORY)
