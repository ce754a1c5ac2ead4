"""Triton's interpreter without a repetition that takes a third of its time.

It puts its own functions into `triton.language` when a kernel starts, and again at every call of a function inside of
the kernel, where they stand already. Import this before a kernel runs; a Triton that does it in another way stays as it
is.
"""

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


if importlib.util.find_spec("triton"):
    import triton.language
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        both = (triton.language, triton.language.core)
        interpreter._patch_lang = once(interpreter._patch_lang, interpreter._LangPatchScope, both)
