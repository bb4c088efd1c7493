"""Run by check_wheel where only the wheel and its [infer] extra are installed: every shipped model answers."""

import importlib.util

import numpy as np

import infer_tf
import models_zoo
from infer_tf import TFAudioClassifier
from models_zoo.registry import list_shipped
from models_zoo.soundscapes import CLASSES, render

for name in (
    "torch",
    "torchaudio",
    "lightning",
    "sklearn",
    "matplotlib",
    "onnx",
    "train_torch",
    "export",
    "parity_tests",
):
    if importlib.util.find_spec(name) is not None:
        raise SystemExit(f"{name} is importable; the production environment must not have it")
for package in (models_zoo, infer_tf):
    if "site-packages" not in str(package.__file__):
        raise SystemExit(f"{package.__name__} comes from {package.__file__}, not from the wheel")

names = list_shipped()
if not names:
    raise SystemExit("the wheel ships no model")
for name in names:
    with TFAudioClassifier(name) as classifier:
        sample_rate = classifier.card.sample_rate
        clip = render(CLASSES[0], 2.0, sample_rate, np.random.default_rng(0))
        if classifier.card.task == "embedding":
            picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
            embeddings = np.stack([classifier.embed_audio(clip), classifier.embed_image(picture)])
            if not np.isfinite(embeddings).all():
                raise SystemExit(f"{name}: embeddings are not finite")
            print(f"{name}: embeds sound and picture, {embeddings.shape[1]} numbers each")
            continue
        prediction = classifier.predict(clip)
    if not np.isfinite(prediction.probabilities).all():
        raise SystemExit(f"{name}: probabilities are not finite")
    print(f"{name}: {prediction.top(1)}")
