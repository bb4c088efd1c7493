"""What a model is, free of frameworks: front ends, cards, labels, audio reading, metrics, shipped weights."""

from models_zoo.audio import load_audio
from models_zoo.cards import ModelCard
from models_zoo.errors import AudioClassifierError
from models_zoo.prediction import Event, Prediction
from models_zoo.presets import get_frontend, list_frontends
from models_zoo.reference import ReferenceFrontend
from models_zoo.registry import get_card, list_models
from models_zoo.specs import FrontendSpec

__all__ = [
    "AudioClassifierError",
    "Event",
    "FrontendSpec",
    "ModelCard",
    "Prediction",
    "ReferenceFrontend",
    "get_card",
    "get_frontend",
    "list_frontends",
    "list_models",
    "load_audio",
]
