"""The weights a CAV-MAE pre-training starts from: those of a vision MAE, given to both modalities.

Source: YuanGongND/cav-mae, the released initial file ``ori_mae_11``, made from MAE's ViT-B (He et al.,
arXiv 2111.06377).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from models_zoo.errors import CheckpointError
from train_torch.models.cavmae_blocks import PATCH
from train_torch.models.cavmae_pretrain import CAVMAE
from train_torch.published_file import unpickled

__all__ = ["read_vision_mae", "start_from_vision_mae"]

_COPIED = ("mask_token", "decoder_embed", "decoder_norm", "decoder_blocks")


def read_vision_mae(path: str | Path) -> Mapping[str, Tensor] | None:
    """Return the weights of a vision MAE's file, by themselves or under ``model``, or None where it is another file.

    Raises:
        CheckpointError: a ``.pt`` or ``.pth`` file that is damaged, or with more in it than tensors and plain values.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth") or not path.is_file():
        return None
    loaded = unpickled(path)
    inner = loaded.get("model", loaded) if isinstance(loaded, Mapping) else None
    return inner if isinstance(inner, Mapping) and {"cls_token", "patch_embed.proj.weight"} <= set(inner) else None


def start_from_vision_mae(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Give ``model`` the weights of a vision MAE; return the entries that keep their own fresh values.

    The first blocks go to both modalities, the others to the joint blocks, their norms to every stream; the
    convolution of pictures, summed over the colours, becomes that of sound; what predicts pixels predicts sound with
    its first rows. Sound's places and the modality vectors, which a vision MAE has not, stay as they are.

    Args:
        model: of MAE's width and decoder.
        state: of MAE: ``patch_embed``, ``pos_embed`` with a row for its class token, ``blocks.0`` to ``blocks.11``,
            ``norm``, and the decoder's.

    Raises:
        CheckpointError: an entry is missing, or of another shape; names the first. Or another model.
    """
    if not isinstance(model, CAVMAE):
        raise CheckpointError(
            f"got a {type(model).__name__}; a 'cavmae' is what begins with the weights of a vision MAE"
        )
    taken = dict(_given(model, state))
    expected = model.state_dict()
    for key, tensor in taken.items():
        if key not in expected or tensor.shape != expected[key].shape:
            here = list(expected[key].shape) if key in expected else "nothing"
            raise CheckpointError(
                f"the vision MAE does not fit: {key} would be {list(tensor.shape)}, the model has {here}; build the "
                "model with MAE's embed_dim, decoder_embed_dim and decoder_depth"
            )
    model.load_state_dict({**expected, **taken}, strict=True)
    return tuple(key for key in expected if key not in taken)


def _given(model: CAVMAE, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of ``model`` that a vision MAE has a value for."""

    def entry(key: str) -> Tensor:
        if key not in state:
            raise CheckpointError(
                f"no vision MAE: {key} is missing; expected the encoder and decoder of MAE's pre-training"
            )
        return state[key]

    own = model.declared.modality_specific_depth
    block = [key.removeprefix("blocks.0.") for key in state if key.startswith("blocks.0.")]
    for index in range(model.declared.depth):
        targets = ("blocks_a", "blocks_v") if index < own else ("blocks_u",)
        for name in block:
            norm, _, kind = name.partition(".")
            streams = ("", "_a", "_v") if index >= own and norm in ("norm1", "norm2") else ("",)
            for target in targets:
                for stream in streams:
                    place = index if index < own else index - own
                    yield f"{target}.{place}.{norm}{stream}.{kind}", entry(f"blocks.{index}.{name}")
    for kind in ("weight", "bias"):
        for norm in ("norm", "norm_a", "norm_v"):
            yield f"{norm}.{kind}", entry(f"norm.{kind}")
        yield f"decoder_pred_a.{kind}", entry(f"decoder_pred.{kind}")[: PATCH * PATCH]
        yield f"decoder_pred_v.{kind}", entry(f"decoder_pred.{kind}")
    colours = entry("patch_embed.proj.weight")
    yield "patch_embed_v.proj.weight", colours
    yield "patch_embed_a.proj.weight", colours.sum(dim=1, keepdim=True)
    for side in ("a", "v"):
        yield f"patch_embed_{side}.proj.bias", entry("patch_embed.proj.bias")
    yield "pos_embed_v", entry("pos_embed")[:, 1:]
    yield "decoder_pos_embed_v", entry("decoder_pos_embed")[:, 1:]
    for key in state:
        if key.partition(".")[0] in _COPIED:
            yield key, entry(key)
