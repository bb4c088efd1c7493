"""CAV-MAE as it is pre-trained: masked reconstruction of sound and picture, and the contrast between them.

Source: YuanGongND/cav-mae ``src/models/cav_mae.py`` CAVMAE (BSD-2-Clause). Differences: what is masked can be given, so
that a run can be repeated; losses come by name.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelOutput
from models_zoo.errors import SpecError
from train_torch.models.cavmae_blocks import PATCH, Block, TowerOptions, Towers, initialise, position_table, through

__all__ = ["CAVMAE", "CAVMAEOptions", "Masking", "contrastive_loss", "draw_masking", "patch_values"]

MaskKind: TypeAlias = Literal["unstructured", "time", "freq", "tf"]

_TEMPERATURE = 0.05
_TF_SHARE = 0.7
_PUBLISHED_GRID = (8, 64)
_MASKED = 1.1  # above any noise, so that marked tokens come last


class CAVMAEOptions(TowerOptions):
    """What can be chosen about a network to be pre-trained.

    Attributes:
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        norm_pix_loss: every patch is reconstructed at mean 0 and spread 1; False to look at what is reconstructed.
    """

    decoder_embed_dim: int = Field(default=512, ge=4, multiple_of=4)
    decoder_depth: int = Field(default=8, ge=1)
    decoder_num_heads: int = Field(default=16, ge=1)
    norm_pix_loss: bool = True


class Masking(NamedTuple):
    """Which tokens of a batch are seen.

    Attributes:
        order: ``(batch, tokens)`` int64, a permutation of each clip's tokens; the first ``kept`` of them are seen, in
            this order.
        kept: how many.
    """

    order: Tensor
    kept: int

    @property
    def restore(self) -> Tensor:
        """``(batch, tokens)`` int64: where each token is in the order."""
        return self.order.argsort(dim=1)

    @property
    def removed(self) -> Tensor:
        """``(batch, tokens)`` float32: 1 for a token that is not seen, 0 for one that is."""
        return (self.restore >= self.kept).float()

    def seen(self, tokens: Tensor) -> Tensor:
        """Return ``(batch, kept, width)`` of ``tokens`` ``(batch, tokens, width)``."""
        return tokens.gather(1, self.order[:, : self.kept, None].expand(-1, -1, tokens.shape[2]))

    def filled(self, seen: Tensor, token: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)``: what was seen in its place, and ``token`` in all others."""
        batch, tokens = self.order.shape
        everything = torch.cat((seen, token.expand(batch, tokens - self.kept, -1)), dim=1)
        return everything.gather(1, self.restore[:, :, None].expand(-1, -1, seen.shape[2]))


def draw_masking(
    noise: Tensor,
    ratio: float,
    *,
    grid: tuple[int, int] | None = None,
    kind: MaskKind = "unstructured",
    generator: torch.Generator | None = None,
) -> Masking:
    """Return a masking that hides a share of every clip's tokens.

    Args:
        noise: ``(batch, tokens)`` uniform in [0, 1): tokens of low noise are seen, in the order of their noise.
        ratio: share to hide, 0 to 1 (exclusive); int(tokens * (1 - ratio)) stay.
        grid: (bands, times) of the tokens; structured kinds need the published (8, 64).
        kind: ``time`` hides whole times, ``freq`` whole bands, ``tf`` seven tenths of the share of each. Of ``tf``
            a few more are marked than hidden, which are then seen all the same, as published.
        generator: of the times and bands.

    Raises:
        SpecError: an impossible ratio, one that leaves no token to be seen, or a structured masking of another grid.
    """
    if not 0 <= ratio < 1:
        raise SpecError(f"mask ratio: got {ratio}; expected a share of the tokens, 0 to less than 1", field="ratio")
    tokens = noise.shape[1]
    kept = int(tokens * (1 - ratio))
    if not kept:
        raise SpecError(
            f"mask ratio: got {ratio} of {tokens} tokens, which leaves none to be seen; hide at most "
            f"{1 - 1 / tokens:.3g} of them",
            field="ratio",
        )
    if kind != "unstructured":
        if grid != _PUBLISHED_GRID:
            raise SpecError(
                f"mask kind {kind!r}: got a grid of {grid}; whole times and bands are hidden in one of "
                f"{_PUBLISHED_GRID} (128 mels, 1024 frames) only; use 'unstructured'",
                field="kind",
            )
        noise = noise.unflatten(1, grid).clone()
        share = ratio * (_TF_SHARE if kind == "tf" else 1.0)
        for axis, size, kinds in ((2, grid[1], ("time", "tf")), (1, grid[0], ("freq", "tf"))):
            if kind in kinds:
                for clip in noise:
                    chosen = torch.randperm(size, generator=generator, device=generator.device if generator else None)
                    clip.index_fill_(axis - 1, chosen[: int(size * share)].to(noise.device), _MASKED)
        noise = noise.flatten(1)
    return Masking(noise.argsort(dim=1), kept)


def patch_values(pictures: Tensor) -> Tensor:
    """Return ``(batch, rows * columns, 16 * 16 * channels)`` of ``(batch, channels, height, width)``.

    The values of a patch run row by row, column by column, the channel fastest.
    """
    batch, channels, height, width = pictures.shape
    split = pictures.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, PATCH * PATCH * channels)


def contrastive_loss(audio: Tensor, image: Tensor, *, bidirectional: bool = False) -> tuple[Tensor, Tensor]:
    """Return the loss and the share of pictures that pick their own sound out of the batch.

    Args:
        audio, image: ``(batch, width)``, pair by pair; brought to length 1 here.
        bidirectional: the mean with the loss of sounds picking their picture.
    """
    similarity = functional.normalize(audio) @ functional.normalize(image).T / _TEMPERATURE
    loss = -similarity.log_softmax(dim=0).diagonal().mean()
    if bidirectional:
        loss = (loss - similarity.log_softmax(dim=1).diagonal().mean()) / 2
    own = torch.arange(len(similarity), device=similarity.device)
    return loss, (similarity.argmax(dim=0) == own).float().mean()


class CAVMAE(Towers):
    """Contrastive audio-visual masked autoencoder.

    ``forward`` embeds, as retrieval does; :meth:`losses` is what training minimises.

    Attributes:
        inputs: ``features`` ``(batch, time, n_mels)`` and ``image`` ``(batch, 3, size, size)``, float32.
        outputs: ``audio_embedding`` and ``image_embedding`` ``(batch, embed_dim)``: means over the tokens.
        options: JSON-ready dict that rebuilds the network through ``create_model``.
            Each needs one input alone.
        class_keys: none; there are no classes.
        min_frames, max_frames: of features it takes; None for any.
    """

    head_prefix: ClassVar[str] = "decoder"
    class_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: CAVMAEOptions) -> None:
        super().__init__()
        self.declared: CAVMAEOptions = options
        width = options.decoder_embed_dim
        self._add_parameters(trainable_positions=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_modality_a = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_modality_v = nn.Parameter(torch.zeros(1, 1, width))
        for name, grid in (("a", options.audio_grid), ("v", options.image_grid)):
            table = nn.Parameter(position_table(*grid, width), requires_grad=False)
            self.register_parameter(f"decoder_pos_embed_{name}", table)
        self._add_blocks()
        self.decoder_embed = nn.Linear(options.embed_dim, width)
        self.decoder_blocks = nn.ModuleList(
            Block(width, options.decoder_num_heads) for _ in range(options.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred_a = nn.Linear(width, PATCH * PATCH)
        self.decoder_pred_v = nn.Linear(width, PATCH * PATCH * 3)
        initialise(self)
        self.inputs = (self._heard, self._seen)
        self.outputs = tuple(
            ModelOutput(
                name=f"{name}_embedding", role="embedding", axes=("batch", str(options.embed_dim)), needs=(needed,)
            )
            for name, needed in (("audio", "features"), ("image", "image"))
        )

    def forward(self, features: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return ``{"audio_embedding": (batch, embed_dim), "image_embedding": (batch, embed_dim)}``, float32.

        Raises:
            SpecError: features or pictures of other shapes.
            ClipLengthError: more or fewer frames than the network has places for.
        """
        return {
            "audio_embedding": self.joined(self.audio_tokens(features), "a").mean(dim=1),
            "image_embedding": self.joined(self.image_tokens(image), "v").mean(dim=1),
        }

    def encoded(
        self, features: Tensor, image: Tensor, masking_a: Masking, masking_v: Masking
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is made of the tokens that are seen.

        Returns:
            Latent ``(batch, kept_a + kept_v, embed_dim)`` for the decoder, and sound and picture alone,
            ``(batch, embed_dim)`` each, for the contrast.
        """
        sound = through(self.blocks_a, masking_a.seen(self.audio_patches(features)))
        picture = through(self.blocks_v, masking_v.seen(self.image_patches(image)))
        latent = self.joined(torch.cat((sound, picture), dim=1))
        # The published encoder starts every joint block anew from the modality's own tokens, so the last one counts.
        last = self.blocks_u[-1]
        return latent, self.norm_a(last(sound, "a")).mean(dim=1), self.norm_v(last(picture, "v")).mean(dim=1)

    def decoded(self, latent: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """Return the predicted patches, ``(batch, tokens_a, 256)`` and ``(batch, tokens_v, 768)``; as patch_values."""
        seen = self.decoder_embed(latent)
        sound = masking_a.filled(seen[:, : masking_a.kept], self.mask_token)
        picture = masking_v.filled(seen[:, masking_a.kept :], self.mask_token)
        sound = sound + self.decoder_pos_embed_a + self.decoder_modality_a
        picture = picture + self.decoder_pos_embed_v + self.decoder_modality_v
        tokens = self.decoder_norm(through(self.decoder_blocks, torch.cat((sound, picture), dim=1)))
        border = sound.shape[1]
        return self.decoder_pred_a(tokens[:, :border]), self.decoder_pred_v(tokens[:, border:])

    def reconstruct(
        self, features: Tensor, image: Tensor, masking_a: Masking, masking_v: Masking
    ) -> tuple[Tensor, Tensor]:
        """Return ``features`` ``(batch, time, n_mels)`` and ``image`` as predicted, for a look at them (inpainting).

        Only a network trained without ``norm_pix_loss`` predicts levels one can look at.

        Raises:
            SpecError: the network predicts patches at mean 0 and spread 1.
        """
        if self.declared.norm_pix_loss:
            raise SpecError(
                "norm_pix_loss: the network predicts every patch at mean 0 and spread 1, which is no picture; use one "
                "trained with norm_pix_loss false",
                field="norm_pix_loss",
            )
        latent, _, _ = self.encoded(features, image, masking_a, masking_v)
        sound, picture = self.decoded(latent, masking_a, masking_v)
        options = self.declared
        return (
            _from_patches(sound, options.audio_grid, 1)[:, 0].transpose(1, 2),
            _from_patches(picture, options.image_grid, 3),
        )

    def draw_maskings(
        self,
        batch: int,
        ratio_a: float = 0.75,
        ratio_v: float = 0.75,
        *,
        kind: MaskKind = "unstructured",
        generator: torch.Generator | None = None,
    ) -> tuple[Masking, Masking]:
        """Return fresh maskings of sound and picture for ``batch`` clips; sound's noise is drawn first."""
        options, maskings = self.declared, []
        for grid, ratio, each in (
            (options.audio_grid, ratio_a, kind),
            (options.image_grid, ratio_v, "unstructured"),
        ):
            noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=self.norm.weight.device)
            maskings.append(draw_masking(noise, ratio, grid=grid, kind=each, generator=generator))
        return maskings[0], maskings[1]

    def losses(
        self,
        features: Tensor,
        image: Tensor,
        masking_a: Masking,
        masking_v: Masking,
        *,
        mae_weight: float = 1.0,
        contrast_weight: float = 0.01,
        bidirectional: bool = False,
    ) -> dict[str, Tensor]:
        """Return what training minimises, and its parts.

        Returns:
            ``loss`` = mae_weight * (``mae_a`` + ``mae_v``) + contrast_weight * ``contrast``, the parts, and
            ``contrast_accuracy``, the share of pictures that pick their own sound out of the batch.

        Raises:
            SpecError: features or pictures of other shapes.
            ClipLengthError: more or fewer frames than the network has places for.
        """
        latent, sound, picture = self.encoded(features, image, masking_a, masking_v)
        predicted_a, predicted_v = self.decoded(latent, masking_a, masking_v)
        mae_a = self._reconstruction(predicted_a, features[:, None].transpose(2, 3), masking_a)
        mae_v = self._reconstruction(predicted_v, image, masking_v)
        contrast, accuracy = contrastive_loss(sound, picture, bidirectional=bidirectional)
        return {
            "loss": mae_weight * (mae_a + mae_v) + contrast_weight * contrast,
            "mae_a": mae_a,
            "mae_v": mae_v,
            "contrast": contrast,
            "contrast_accuracy": accuracy,
        }

    def _reconstruction(self, predicted: Tensor, pictures: Tensor, masking: Masking) -> Tensor:
        target = patch_values(pictures)
        if self.declared.norm_pix_loss:
            target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
        removed = masking.removed
        return ((predicted - target).square().mean(dim=2) * removed).sum() / removed.sum().clamp(min=1)


def _from_patches(patches: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """Return ``(batch, channels, height, width)``; inverse of :func:`patch_values`."""
    split = patches.reshape(len(patches), *grid, PATCH, PATCH, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, grid[0] * PATCH, grid[1] * PATCH)
