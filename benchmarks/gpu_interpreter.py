"""Three repairs to Triton 3.6's interpreter, for running its kernels on a CPU: in tests, and in
`benchmarks.gpu --tiny`.

- It turns arrays of one element into loop bounds by int(), which numpy 2.4 no longer allows.
- It truncates float32 to bfloat16, where GPUs round to nearest even.
- It multiplies bfloat16 matrices as if their bits were integers.

Example:
    >>> from benchmarks import gpu_interpreter
    >>> with gpu_interpreter.repaired():   # doctest: +SKIP
    ...     kernel[(1,)](x)
"""

from contextlib import contextmanager


@contextmanager
def repaired():
    """Within it, Triton's interpreter counts, rounds and multiplies as a GPU does."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_convert(data, from_type, to_type, rounding):
        if from_type == tl.float32 and to_type == tl.bfloat16:
            rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return convert(data, from_type, to_type, rounding)

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        values = torch.from_numpy(handle.data.copy()).view(torch.bfloat16).to(torch.float32)
        return interpreter.TensorHandle(values.numpy(), tl.float32)

    def patched_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor, interpreter._convert_float = patched_tensor, patched_convert
    interpreter.InterpreterBuilder.create_dot = patched_dot
    try:
        yield
    finally:
        interpreter._patch_lang_tensor, interpreter._convert_float = patch_tensor, convert
        interpreter.InterpreterBuilder.create_dot = dot
