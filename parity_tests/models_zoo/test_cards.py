"""Model cards: round trips, the label hash, and errors that name the field."""

from __future__ import annotations

import pytest

from models_zoo.cards import LengthPolicy, ModelCard, ModelInput, ModelOutput, labels_sha256
from models_zoo.errors import CardError
from models_zoo.images import ImageSpec
from models_zoo.presets import get_frontend


def card(**changes) -> ModelCard:
    fields = {
        "name": "tiny",
        "system": "efficientat",
        "task": "single_label",
        "architecture": "mn04",
        "inputs": [ModelInput(name="features", axes=("batch", "128", "time"), source="frontend")],
        "outputs": [
            ModelOutput(name="logits", role="clip", kind="logit", axes=("batch", "3")),
            ModelOutput(name="embedding", role="embedding", axes=("batch", "8")),
        ],
        "frontend": get_frontend("efficientat"),
        "labels": ["dog", "cat", "Straße"],
    }
    return ModelCard(**{**fields, **changes})


def test_round_trips_and_hashes_its_labels() -> None:
    one = card(options={"width_mult": 0.4, "strides": [2, 2, 2, 2]}, metrics={"accuracy": 0.5})
    assert ModelCard.from_json(one.to_json()) == one
    assert ModelCard.from_dict(one.to_dict()) == one
    assert one.labels_sha256 == labels_sha256(["dog", "cat", "Straße"])
    assert one.labels_sha256 != labels_sha256(["cat", "dog", "Straße"])
    renamed = one.replace(labels=["a", "b", "c"])
    assert renamed.labels_sha256 == labels_sha256(["a", "b", "c"])


def test_edited_labels_are_noticed() -> None:
    data = card().to_dict()
    data["labels"][0] = "wolf"
    with pytest.raises(CardError, match="does not match the labels") as refused:
        ModelCard.from_dict(data)
    assert refused.value.field == "labels_sha256"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "Two Words"}, "name"),
        ({"task": "regression"}, "task"),
        ({"labels": ["a", "a", "b"]}, "labels"),
        ({"labels": []}, "labels"),
        ({"frontend": None}, "frontend"),
        ({"inputs": []}, "inputs"),
        ({"outputs": [ModelOutput(name="x", role="embedding", axes=("batch", "8"))] * 2}, "outputs"),
        ({"outputs": [ModelOutput(name="x", role="embedding", axes=("batch", "8"), needs=("picture",))]}, "outputs"),
        ({"thresholds": {"wolf": 0.5}}, "thresholds"),
        ({"thresholds": {"dog": 5.0}}, "thresholds.dog"),
        ({"length_policy": LengthPolicy(max=513)}, "length_policy.max"),
        ({"median_filters": {"wolf": 0.5}}, "median_filters"),
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"exporter": "tflite"}, "exporter"),
    ],
)
def test_an_impossible_card_names_its_field(changes: dict, field: str) -> None:
    with pytest.raises(CardError) as refused:
        card(**changes)
    assert refused.value.field == field


def test_parts_are_validated() -> None:
    with pytest.raises(CardError, match="kind"):
        ModelOutput(name="logits", role="clip", axes=("batch", "3"))
    with pytest.raises(CardError, match="kind"):
        ModelOutput(name="embedding", role="embedding", kind="logit", axes=("batch", "3"))
    with pytest.raises(CardError, match="max"):
        LengthPolicy(min=10, max=5)
    with pytest.raises(CardError, match="multiple of 320"):
        LengthPolicy(max=1000, multiple_of=320)
    for axes in ((), ("batch", "²"), ("batch", "-1"), ("batch", "")):
        with pytest.raises(CardError, match="axes"):
            ModelInput(name="features", axes=axes, source="frontend")
    with pytest.raises(CardError, match="source"):
        ModelInput(name="features", axes=("batch",), source="radio")


def test_answers_what_a_caller_asks() -> None:
    one = card(length_policy=LengthPolicy(min=16000))
    assert one.sample_rate == 32000
    assert one.min_samples == 16000
    assert card().min_samples == 514
    assert one.clip_output().name == "logits"
    assert one.embedding_output().name == "embedding"
    waveform_only = card(
        frontend=None, inputs=[ModelInput(name="waveform", axes=("batch", "samples"), source="waveform")]
    )
    with pytest.raises(CardError, match="no front end"):
        _ = waveform_only.sample_rate


def test_an_output_may_need_some_inputs_alone() -> None:
    image = ModelInput(name="image", axes=("batch", "3", "32", "32"), source="image")
    sides = [
        ModelOutput(name=name, role="embedding", axes=("batch", "8"), needs=needs)
        for name, needs in (("heard", ("features",)), ("seen", ("image",)), ("both", None))
    ]
    one = card(inputs=[*card().inputs, image], image=ImageSpec(size=32), outputs=sides, task="embedding", labels=None)
    asked = {names: [part.name for part in one.inputs_of(names)] for names in (("heard",), ("seen",), ("both",), None)}
    both = ["features", "image"]
    assert asked == {("heard",): ["features"], ("seen",): ["image"], ("both",): both, None: both}
    assert [part.name for part in one.inputs_of(["seen", "heard"])] == both
    assert one.empty_shape(image) == (0, 3, 32, 32)
    # Of no clips, but as many frames as the shortest clip has.
    assert one.empty_shape(one.inputs[0]) == (0, *one.frontend.output_shape(one.min_samples)[1:])
