"""Production inference: a recording in, labels and probabilities out, without PyTorch.

::

    from infer_tf import TFAudioClassifier

    with TFAudioClassifier("model.onnx") as classifier:
        print(classifier.predict("clip.wav").top(5))

Importing this package is light: TensorFlow and onnxruntime are loaded when the first classifier is built.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer_tf.classifier import TFAudioClassifier
    from infer_tf.frontend import TFFrontend
    from infer_tf.index import AudioVisualIndex
    from infer_tf.session import OnnxSession

__all__ = ["AudioVisualIndex", "OnnxSession", "TFAudioClassifier", "TFFrontend"]

_MODULES = {
    "AudioVisualIndex": "index",
    "OnnxSession": "session",
    "TFAudioClassifier": "classifier",
    "TFFrontend": "frontend",
}

# TensorFlow reads this once, while it is imported; every import of it by this package comes after this line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
