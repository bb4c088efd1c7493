"""TensorFlow as this package uses it: imported without its notices, on the CPU, in one process."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from models_zoo.errors import DeviceError, MissingDependencyError

__all__ = ["claim_tensorflow", "load_tensorflow"]

# Printed by static initialisers of TensorFlow's libraries, before TF_CPP_MIN_LOG_LEVEL has any effect.
_NOTICES = ("WARNING: All log messages before absl::InitializeLog()", "I0000 ")

_lock = threading.Lock()
_process: int | None = None


@contextmanager
def _without_notices() -> Iterator[None]:
    """Hold standard error back at the level of the operating system, and let all but TensorFlow's notices through."""
    try:
        saved = os.dup(2)
    except OSError:  # the process has no standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not line.decode(errors="replace").startswith(_NOTICES):
                    os.write(2, line)


def load_tensorflow() -> Any:
    """Return the tensorflow module.

    Its notices are kept off standard error unless the user set ``TF_CPP_MIN_LOG_LEVEL`` below 2; messages of other
    origin are only delayed until the import is done.

    Raises:
        MissingDependencyError: TensorFlow is not installed.
    """
    try:
        with _lock:
            if "tensorflow" in sys.modules or os.environ.get("TF_CPP_MIN_LOG_LEVEL") in ("0", "1"):
                import tensorflow
            else:
                with _without_notices():
                    import tensorflow
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"TensorFlow cannot be imported ({error}); install crossfade[infer] (CPU) or crossfade[infer-gpu]"
        ) from None
    return tensorflow


def claim_tensorflow() -> Any:
    """Return the tensorflow module for use in this process, kept off the GPUs' memory.

    Raises:
        DeviceError: this process was forked from one in which TensorFlow had already started; its threads do not
            follow, and the first operation would never return.
    """
    global _process
    tensorflow = load_tensorflow()
    with _lock:
        if _process is None:
            # RuntimeError: the caller's own program uses TensorFlow on its GPUs already; that is its choice.
            with suppress(RuntimeError):
                tensorflow.config.set_visible_devices([], "GPU")
            _process = os.getpid()
    if _process != os.getpid():
        raise DeviceError(
            f"this process was forked from process {_process}, which had already started TensorFlow, and TensorFlow "
            "does not survive a fork; build classifiers in the children only, or start them with the 'spawn' method"
        )
    return tensorflow
