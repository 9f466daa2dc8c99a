"""A plugin of pytest for interpreted Triton kernels (`-p tests.gpu.interpreter`): it takes out work that repeats.

While it runs a kernel the interpreter replaces the functions of `triton.language`, and does so again at every call of
a device function, `tl.sum` for one: most of the time of small tiles, and without effect after the first.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def pytest_configure() -> None:
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        values = function.__globals__.values()
        modules = {module.__name__ for module in (tl, tl.core) if any(value is module for value in values)}
        if modules <= replaced:
            return interpreter._LangPatchScope()  # of no changes
        replaced.update(modules)
        return replace(function)

    def launch_afresh(self: Any, *args: Any, **options: Any) -> None:
        replaced.clear()  # a launch undoes what it has replaced
        launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_afresh
