"""What the CAV-MAE networks share: transformer blocks with a norm per stream, tokens and their places.

Source: Gong et al., "Contrastive Audio-Visual Masked Autoencoder" (ICLR 2023, arXiv 2210.07839), YuanGongND/cav-mae
``src/models/cav_mae.py``, and the parts of timm 0.4.5 it rests on. Parameter names and shapes are the published ones.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelInput
from models_zoo.errors import CardError, ClipLengthError, SpecError
from models_zoo.schema import Declaration
from models_zoo.specs import FrontendSpec

__all__ = ["PATCH", "Block", "Stream", "TowerOptions", "Towers", "initialise", "position_table", "through"]

PATCH = 16
"""Side of a patch, in mel bands and frames, or in pixels."""

Stream: TypeAlias = Literal["a", "v"] | None
"""Whose norms a block uses: sound's, the picture's, or those of both together."""


class TowerOptions(Declaration):
    """What can be chosen about the encoder of any CAV-MAE network.

    Attributes:
        audio_length: frames of features the network has places for; a remainder of less than 16 is not looked at.
        n_mels: mel bands of the features, a multiple of 16.
        image_size: side of the picture in pixels, a multiple of 16.
        embed_dim: width of the tokens.
        num_heads: of every attention.
        depth: blocks a token passes: 12 as published.
        modality_specific_depth: of them, those each modality has of its own; the rest, at least one, are joint.
        dynamic_time: clips of any length from 16 frames to ``audio_length``, each with the places of its own frames;
            otherwise exactly ``audio_length`` frames, which the front end fills up, as published.
    """

    error: ClassVar[type[CardError]] = CardError

    audio_length: int = Field(default=1024, ge=PATCH)
    n_mels: int = Field(default=128, ge=PATCH, multiple_of=PATCH)
    image_size: int = Field(default=224, ge=PATCH, multiple_of=PATCH)
    embed_dim: int = Field(default=768, ge=4, multiple_of=4)
    num_heads: int = Field(default=12, ge=1)
    depth: int = Field(default=12, ge=2)
    modality_specific_depth: int = Field(default=11, ge=1)
    dynamic_time: bool = False

    @model_validator(mode="after")
    def _check(self) -> TowerOptions:
        if self.embed_dim % self.num_heads:
            raise CardError(
                f"num_heads: got {self.num_heads} for a width of {self.embed_dim}; expected a divisor of it",
                field="num_heads",
            )
        if self.modality_specific_depth >= self.depth:
            raise CardError(
                f"modality_specific_depth: got {self.modality_specific_depth} of {self.depth} blocks; expected fewer, "
                "since at least one is joint",
                field="modality_specific_depth",
            )
        return self

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Patches of a full clip: (bands, times)."""
        return self.n_mels // PATCH, self.audio_length // PATCH

    @property
    def image_grid(self) -> tuple[int, int]:
        """Patches of a picture: (rows, columns)."""
        return (self.image_size // PATCH,) * 2


def position_table(rows: int, columns: int, width: int) -> Tensor:
    """Return the sin-cos places ``(1, rows * columns, width)`` float32 of a grid, row after row.

    The column (time) is in the first half, the row (mel) in the second. Places are plain indices, so that a shorter
    grid has the first columns of a longer one.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    halves = [np.outer(part.ravel(), omega) for part in (column, row)]
    table = np.concatenate([function(half) for half in halves for function in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, PATCH, stride=PATCH)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``."""
        width = self.proj.in_features // self.num_heads
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)  # (batch, heads, tokens, width / heads)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside the identity; the norms belong to a stream.

    Only joint blocks are ever asked for a stream of one modality. The others hold its norms all the same, unused,
    because published files do.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_a, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.attn = _Attention(width, num_heads)
        self.norm2, self.norm2_a, self.norm2_v = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = _MLP(width)

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        """Return ``(batch, tokens, width)``."""
        norm1, norm2 = {
            None: (self.norm1, self.norm2),
            "a": (self.norm1_a, self.norm2_a),
            "v": (self.norm1_v, self.norm2_v),
        }[stream]
        x = x + self.attn(norm1(x))
        return x + self.mlp(norm2(x))


def initialise(module: nn.Module) -> None:
    """Set fresh weights as published: Xavier uniform, biases 0; modality vectors and mask tokens small."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, _PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.flatten(1))
    for name, parameter in module.named_parameters():
        if "modality" in name or name == "mask_token":
            nn.init.normal_(parameter, std=0.02)


class Towers(nn.Module):
    """The encoder of both modalities, or of sound alone: patches -> own blocks -> joint blocks -> norm.

    A token is a patch, its place and its modality. Sound's patches are counted band after band, low to high, each from
    its first time to its last; those of a picture row after row.

    Subclasses call :meth:`_add_parameters` and :meth:`_add_blocks`, with their own parts between them, so that
    parameters come in the published order.
    """

    system: ClassVar[str] = "cav_mae"
    layout: ClassVar[str] = "b t m"
    min_frames: ClassVar[int] = PATCH
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = "keeps the weights inside the file; both graphs stay within 5e-6 of the model"

    declared: TowerOptions

    @property
    def options(self) -> dict[str, Any]:
        """JSON-ready dict that rebuilds the network through ``create_model``."""
        return self.declared.to_dict()

    @property
    def max_frames(self) -> int | None:
        """Most frames of features the network takes; None where the front end fills them up."""
        return self.declared.audio_length if self.declared.dynamic_time else None

    def fitted(self, spec: FrontendSpec) -> FrontendSpec:
        """Return a front end with as many frames as the network has places for, or those of the clip where any do."""
        if spec.frames is None:
            return spec
        options = self.declared
        return spec.replace(frames=None if options.dynamic_time else spec.frames.replace(count=options.audio_length))

    @property
    def _heard(self) -> ModelInput:
        options = self.declared
        time = "time" if options.dynamic_time else str(options.audio_length)
        return ModelInput(name="features", axes=("batch", time, str(options.n_mels)), source="frontend")

    @property
    def _seen(self) -> ModelInput:
        side = str(self.declared.image_size)
        return ModelInput(name="image", axes=("batch", "3", side, side), source="image")

    def _add_parameters(self, *, image: bool = True, trainable_positions: bool) -> None:
        options, width = self.declared, self.declared.embed_dim
        self.modality_a = nn.Parameter(torch.zeros(1, 1, width))
        if image:
            self.modality_v = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed_a = nn.Parameter(position_table(*options.audio_grid, width), requires_grad=trainable_positions)
        if image:
            table = position_table(*options.image_grid, width)
            self.pos_embed_v = nn.Parameter(table, requires_grad=trainable_positions)

    def _add_blocks(self, *, image: bool = True) -> None:
        options, width = self.declared, self.declared.embed_dim
        own, joint = options.modality_specific_depth, options.depth - options.modality_specific_depth
        self.patch_embed_a = _PatchEmbed(1, width)
        if image:
            self.patch_embed_v = _PatchEmbed(3, width)
        self.blocks_a = nn.ModuleList(Block(width, options.num_heads) for _ in range(own))
        if image:
            self.blocks_v = nn.ModuleList(Block(width, options.num_heads) for _ in range(own))
        self.blocks_u = nn.ModuleList(Block(width, options.num_heads) for _ in range(joint))
        self.norm_a = nn.LayerNorm(width)
        if image:
            self.norm_v = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)

    def audio_patches(self, features: Tensor) -> Tensor:
        """Return the tokens ``(batch, bands * times, width)`` of ``features`` ``(batch, time, n_mels)``.

        Raises:
            SpecError: the features have other axes or mel bands.
            ClipLengthError: more or fewer frames than the network has places for.
        """
        options = self.declared
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            self._check_features(features)
        patches = self.patch_embed_a.proj(features[:, None].transpose(2, 3))  # (batch, width, bands, times)
        places = self.pos_embed_a
        if options.dynamic_time:
            # The table runs band after band: a shorter clip has the first times of every band.
            places = places.unflatten(1, options.audio_grid)[:, :, : patches.shape[3]].flatten(1, 2)
        return _in_a_row(patches) + places + self.modality_a

    def image_patches(self, image: Tensor) -> Tensor:
        """Return the tokens ``(batch, rows * columns, width)`` of ``image`` ``(batch, 3, size, size)``.

        Raises:
            SpecError: a picture of another size or number of channels.
        """
        side = self.declared.image_size
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and image.shape[1:] != (3, side, side):
            raise SpecError(
                f"image: got shape {tuple(image.shape)}; expected (batch, 3, {side}, {side}) as the image front end "
                "returns it",
                field="image",
            )
        return _in_a_row(self.patch_embed_v.proj(image)) + self.pos_embed_v + self.modality_v

    def audio_tokens(self, features: Tensor) -> Tensor:
        """Return what sound's own blocks make of ``features``: ``(batch, tokens, width)``."""
        return through(self.blocks_a, self.audio_patches(features))

    def image_tokens(self, image: Tensor) -> Tensor:
        """Return what the picture's own blocks make of ``image``: ``(batch, tokens, width)``."""
        return through(self.blocks_v, self.image_patches(image))

    def joined(self, tokens: Tensor, stream: Stream = None) -> Tensor:
        """Return what the joint blocks and the norm of ``stream`` make of ``tokens``: the same shape."""
        norm = {None: "norm", "a": "norm_a", "v": "norm_v"}[stream]
        return self.get_submodule(norm)(through(self.blocks_u, tokens, stream))

    def _check_features(self, features: Tensor) -> None:
        options = self.declared
        if features.ndim != 3 or features.shape[2] != options.n_mels:
            raise SpecError(
                f"features: got shape {tuple(features.shape)}; expected (batch, time, {options.n_mels}) as the front "
                "end returns them",
                field="layout" if features.ndim != 3 else "mel.n_mels",
            )
        frames, most = features.shape[1], options.audio_length
        if options.dynamic_time and not PATCH <= frames <= most:
            raise ClipLengthError(
                f"features: got {frames} frames; this model takes {PATCH} to {most}; cut longer clips into windows",
                code="too_short" if frames < PATCH else "too_long",
            )
        if not options.dynamic_time and frames != most:
            raise ClipLengthError(
                f"features: got {frames} frames; this model takes exactly {most}: use a front end that fills them up "
                "(frames.count), or build the model with dynamic_time",
                code="too_short" if frames < most else "too_long",
            )


def _in_a_row(patches: Tensor) -> Tensor:
    """Return ``(batch, rows * columns, width)`` of ``(batch, width, rows, columns)``.

    Row joined to row: of a reshape onnxruntime would leave one size to be worked out, which none can be of a batch
    without a clip, and that is what an exported graph is given for a modality that is not asked for.
    """
    return torch.cat(patches.unbind(2), dim=2).transpose(1, 2)


def through(blocks: nn.ModuleList, x: Tensor, stream: Stream = None) -> Tensor:
    """Return what ``blocks`` make of ``x`` one after the other."""
    for block in blocks:
        x = block(x, stream)
    return x
