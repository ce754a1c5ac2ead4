"""Triton's interpreter without three repetitions that take most of its time.

- It puts its own functions into `triton.language` when a kernel starts, and again at every call of a function inside of
  the kernel, where they stand already.
- It works out whether an addition of integers overflows, and then asserts nothing, since assertions are for its debug
  mode.
- It writes down the table of numpy's dtypes anew for every look into it.

Import this before a kernel runs. A Triton that does it in another way stays as it is.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any


def once(patch: Callable[[Any], Any], nothing: Callable[[], Any], languages: tuple[ModuleType, ...]) -> Callable:
    """`patch`, or `nothing` if its functions stand in all the languages that the kernel's function sees."""

    def patch_once(function: Any) -> Any:
        seen = [language for language in languages if any(x is language for x in function.__globals__.values())]
        return patch(function) if any(languages[1].is_builtin(x.load) for x in seen) else nothing()

    return patch_once


def of_scalars(np_dtype: Callable[[Any], Any]) -> Callable:
    """`np_dtype` with an entry kept for each scalar type. Types of pointers cannot be hashed, and are one in numpy."""
    kept = functools.cache(np_dtype)
    return lambda found: np_dtype(found) if found.scalar.is_ptr() else kept(found.scalar)


if importlib.util.find_spec("triton"):
    import triton.language
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        both = (triton.language, triton.language.core)
        interpreter._patch_lang = once(interpreter._patch_lang, interpreter._LangPatchScope, both)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = of_scalars(interpreter._get_np_dtype)
