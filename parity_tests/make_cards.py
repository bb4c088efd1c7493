"""Write on the zoo's cards what their networks cost and how short a clip may be: ``python -m parity_tests.make_cards``.

Costs are counted by ``train_torch.costs``; the shortest clip is the front end's where a card says nothing else. What a
card says besides stays as it is, byte for byte. A shipped model's card also lies inside its checkpoint and its ONNX
file: both get the new one, weights and graph untouched.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import onnx
import torch

import models_zoo
from export.exporter import CHECKPOINT_KEY
from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.files import replacing
from models_zoo.registry import get_card, list_models, list_shipped, shipped_checkpoint, shipped_model
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.costs import Costs, count_costs
from train_torch.models import create_from_card

CARDS = Path(models_zoo.__file__).parent / "cards"


def costs_of(card: ModelCard) -> Costs:
    """Return what the network of ``card`` costs, counted anew."""
    same = ("name", "metrics", "provenance", "checkpoint", "license", "training_data", "labels", "labels_sha256")
    return _costs_of(card.model_dump_json(exclude={*same, "thresholds", "median_filters", "parameters", "macs"}))


@cache
def _costs_of(description: str) -> Costs:
    """Return the costs of a card without what does not change them: many cards differ in nothing else."""
    card = ModelCard.from_dict({"name": "any", **json.loads(description)})
    with torch.device("meta"):
        model = create_from_card(card)
    return count_costs(model, card.inputs, card.frontend, card.length_policy)


def completed(text: str, card: ModelCard) -> str:
    """Return the JSON ``text`` of ``card`` with its costs and its shortest clip stated, the rest as it was."""
    facts: dict[str, object] = costs_of(card)._asdict()
    if card.length_policy.min is None and card.frontend is not None:
        facts = {"length_policy": {"min": card.min_samples, "short": card.length_policy.short}, **facts}
    for name, value in facts.items():
        text = re.sub(rf'(?m)^  "{name}": .*,\n', "", text)
        text = text.replace('  "metrics": ', f'  "{name}": {json.dumps(value)},\n  "metrics": ', 1)
    return text


def _put_inside(name: str) -> None:
    """Put the zoo's card of a shipped model into its files."""
    card, onnx_path, checkpoint = get_card(name), shipped_model(name), shipped_checkpoint(name)
    graph = onnx.load(onnx_path)
    metadata = {entry.key: entry.value for entry in graph.metadata_props} | {CARD_KEY: card.to_json()}
    if checkpoint is not None:
        save_checkpoint(checkpoint, load_checkpoint(checkpoint).model, card, force=True)
        metadata[CHECKPOINT_KEY] = load_checkpoint(checkpoint).sha256
    onnx.helper.set_model_props(graph, metadata)
    with replacing(onnx_path, force=True) as partial:
        onnx.save_model(graph, partial)


def main() -> None:
    """Complete every card that needs it, and name those."""
    for name in list_models():
        path = CARDS / f"{name}.json"
        text = path.read_text(encoding="utf-8")
        new = completed(text, get_card(name))
        if new == text:
            continue
        with replacing(path, force=True) as partial:
            partial.write_text(new, encoding="utf-8")
        if name in list_shipped():
            _put_inside(name)
        print(f"{name}: {get_card(name).parameters} parameters, {get_card(name).macs} multiply-accumulates")


if __name__ == "__main__":
    main()
