"""Triton's interpreter with less work of its own, so that more kernels are tested in the time.

Each launch, and each call of a device function in it, walks all members of ``triton.language`` to find what it replaces
(two fifths of the time): here the names are remembered. Each addition and product of integers is computed again in int64
to see whether it overflows (a sixth): here only with ``FASTLLM_TESTS=all``. Nothing is done to a version of Triton that
has other functions.
"""

from __future__ import annotations

import functools
import inspect
import os


def enable() -> bool:
    """Whether this version's functions were found and replaced."""
    from triton.runtime import interpreter

    wanted = ("_patch_builtin", "_patch_attr", "InterpreterOptions", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in wanted):
        return False
    if list(inspect.signature(interpreter._patch_builtin).parameters) != ["pkg", "builder", "scope"]:
        return False
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(pkg):
        return [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]

    def patch_builtin(pkg, builder, scope):
        for name in names(pkg):
            member = getattr(pkg, name)
            if is_builtin(member):  # not yet replaced by a launch around this one
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
    if os.environ.get("FASTLLM_TESTS") != "all":
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    return True
