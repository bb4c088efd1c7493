"""CAV-MAE for classification and embedding: sound, pictures, or both.

Source: YuanGongND/cav-mae ``src/models/cav_mae.py`` CAVMAEFT and ``src/models/audio_mdl.py`` CAVMAEFTAudio
(BSD-2-Clause).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.errors import CardError
from train_torch.models.cavmae_blocks import TowerOptions, Towers, initialise

__all__ = ["CAVMAEFT", "CAVMAEFTOptions", "Mode"]

Mode = Literal["multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly"]

_DECODER = ("decoder", "mask_token")
_IMAGE = ("blocks_v.", "modality_v", "norm_v.", "patch_embed_v.", "pos_embed_v")

_LISTENS = ("multimodal", "audioonly", "missingaudioonly")
_LOOKS = ("multimodal", "videoonly", "missingvideoonly")


class CAVMAEFTOptions(TowerOptions):
    """What can be chosen about a fine-tuned network.

    Attributes:
        num_classes: scores per clip; 0 builds no head and returns the embedding alone.
        mode: what it is given, and which norms it answers through. ``multimodal``: sound and picture together;
            ``audioonly``, ``videoonly``: one of them, for networks trained on it alone; ``missingaudioonly``,
            ``missingvideoonly``: one of them, for networks trained on both. No checkpoint says which, so a card must.
        image: hold the parameters of pictures; without them it is the published audio-only network, half the size.
    """

    card_facts: ClassVar[tuple[str, ...]] = ("mode",)

    num_classes: int = Field(default=527, ge=0)
    mode: Mode = Field(default="multimodal", description="'multimodal', 'audioonly', ..., as it was trained")
    image: bool = True

    @model_validator(mode="after")
    def _check_mode(self) -> CAVMAEFTOptions:
        if not self.image and self.mode in _LOOKS:
            raise CardError(
                f"mode: got {self.mode!r}, but the network has no parameters of pictures (image is false); choose "
                "audioonly or missingaudioonly",
                field="mode",
            )
        return self


class CAVMAEFT(Towers):
    """Contrastive audio-visual masked autoencoder, its decoder replaced by a classifier.

    Attributes:
        inputs: as the mode needs: ``features`` ``(batch, time, n_mels)`` float32, the front end's layout ``b t m``, and
            ``image`` ``(batch, 3, size, size)`` float32.
        outputs: ``logits`` ``(batch, num_classes)`` (absent with 0 classes) and ``embedding`` ``(batch, embed_dim)``,
            the mean over the tokens.
        options: JSON-ready dict that rebuilds the network through ``create_model``.
        class_keys: state_dict entries that belong to one class count, i.e. that fine-tuning to others replaces.
        min_frames, max_frames: of features it takes; None for any.
        unused_prefixes: of the decoder in a pre-trained file, and without ``image`` of what looks at pictures.
    """

    head_prefix: ClassVar[str] = "mlp_head."

    def __init__(self, options: CAVMAEFTOptions) -> None:
        super().__init__()
        self.declared: CAVMAEFTOptions = options
        self.unused_prefixes = _DECODER if options.image else (*_DECODER, *_IMAGE)
        self._add_parameters(image=options.image, trainable_positions=True)
        self._add_blocks(image=options.image)
        self.mlp_head: nn.Sequential | None = None
        if options.num_classes:
            self.mlp_head = nn.Sequential(
                nn.LayerNorm(options.embed_dim), nn.Linear(options.embed_dim, options.num_classes)
            )
        initialise(self)
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith("mlp_head.1."))

    def set_mode(self, mode: Mode) -> None:
        """Choose what the network is given from now on.

        Raises:
            CardError: pictures of a network without their parameters.
        """
        self.declared = self.declared.replace(mode=mode)

    @property
    def inputs(self) -> tuple[ModelInput, ...]:
        """Inputs of the graph, as the mode needs."""
        mode = self.declared.mode
        return (self._heard,) * (mode in _LISTENS) + (self._seen,) * (mode in _LOOKS)

    @property
    def outputs(self) -> tuple[ModelOutput, ...]:
        """Outputs of the graph."""
        options = self.declared
        mean = ModelOutput(name="embedding", role="embedding", axes=("batch", str(options.embed_dim)))
        axes = ("batch", str(options.num_classes))
        scores = ModelOutput(name="logits", role="clip", kind="logit", axes=axes)
        return (scores, mean) if options.num_classes else (mean,)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (batch, num_classes), "embedding": (batch, embed_dim)}``, float32.

        Args:
            **inputs: those of the mode, by name: ``features`` and, or, ``image``.

        Raises:
            SpecError: features or pictures of other shapes.
            ClipLengthError: more or fewer frames than the network has places for.
        """
        embedding = self._embedding(**inputs)
        if self.mlp_head is None:
            return {"embedding": embedding}
        return {"logits": self.mlp_head(embedding), "embedding": embedding}

    def _embedding(self, features: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        mode = self.declared.mode
        if mode == "multimodal":
            assert features is not None
            assert image is not None
            together = torch.cat((self.audio_tokens(features), self.image_tokens(image)), dim=1)
            return self.joined(together).mean(dim=1)
        if mode in _LISTENS:
            assert features is not None
            return self._alone(self.audio_tokens(features), "a")
        assert image is not None
        return self._alone(self.image_tokens(image), "v")

    def _alone(self, tokens: Tensor, stream: Literal["a", "v"]) -> Tensor:
        own = self.joined(tokens, stream).mean(dim=1)
        if not self.declared.mode.startswith("missing"):
            return own
        return (self.joined(tokens).mean(dim=1) + own) / 2
