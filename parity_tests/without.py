"""Run a module as if a package were not installed, where it is.

``python -m parity_tests.without torch -- infer_tf.cli predict model.onnx clip.wav``
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

__all__ = ["Unimportable", "make_unimportable"]


class Unimportable:
    """A finder that answers for ``packages`` and all inside them: not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return None for other packages, so that the next finder is asked.

        Raises:
            ModuleNotFoundError: ``name`` belongs to one of ``packages``.
        """
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r} (made unimportable)", name=name)
        return None


def make_unimportable(*packages: str) -> None:
    """Let every later import of ``packages`` in this process fail.

    Raises:
        RuntimeError: one of them is imported already.
    """
    loaded = [name for name in packages if name in sys.modules]
    if loaded:
        raise RuntimeError(f"{loaded} already imported; make packages unimportable before anything else")
    sys.meta_path.insert(0, Unimportable(packages))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--" not in arguments[1:-1]:
        sys.exit("usage: python -m parity_tests.without PACKAGE ... -- MODULE [ARGUMENT ...]")
    split = arguments.index("--")
    make_unimportable(*arguments[:split])
    sys.argv = arguments[split + 1 :]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
