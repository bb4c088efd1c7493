"""Run a module as if a package were not installed, where it is.

``python -m parity_tests.without torch -- infer_tf.cli predict model.onnx clip.wav``
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["Hiding", "make_unimportable"]


class Hiding:
    """A finder that finds what ``finder`` finds, save ``packages`` and all inside them.

    Not one that raises: libraries ask ``importlib.util.find_spec`` whether others are installed, and get None here as
    they would without them.
    """

    def __init__(self, finder: Any, packages: frozenset[str]) -> None:
        self._finder = finder
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the module's spec, or None for a hidden one."""
        if name.partition(".")[0] in self._packages:
            return None
        return self._finder.find_spec(name, path, target)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def make_unimportable(*packages: str) -> None:
    """Let every later import of ``packages`` in this process fail.

    Raises:
        RuntimeError: one of them is imported already.
    """
    loaded = [name for name in packages if name in sys.modules]
    if loaded:
        raise RuntimeError(f"{loaded} already imported; make packages unimportable before anything else")
    sys.meta_path[:] = [Hiding(finder, frozenset(packages)) for finder in sys.meta_path]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--" not in arguments[1:-1]:
        sys.exit("usage: python -m parity_tests.without PACKAGE ... -- MODULE [ARGUMENT ...]")
    split = arguments.index("--")
    make_unimportable(*arguments[:split])
    sys.argv = arguments[split + 1 :]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
