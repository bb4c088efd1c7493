"""What models take beside audio: embeddings of an encoder or the caller, masks; and ensembles of event models."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from infer_tf import OnnxSession, TFAudioClassifier
from infer_tf.frontend import TFFrontend
from models_zoo.errors import CardError, ClipLengthError, ClosedError, WaveformError
from models_zoo.events import EventOptions
from models_zoo.presets import get_frontend
from parity_tests.infer_tf.test_streaming import RATE, scene
from parity_tests.infer_tf.tiny import (
    EVENT_LABELS,
    TOKEN_SIZE,
    encoder_card,
    event_card,
    write_encoder,
    write_events,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extras")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Path:
    return write_encoder(folder / "encoder.onnx")


@pytest.fixture(scope="module")
def fused(folder: Path) -> Path:
    return write_events(folder / "fused.onnx", event_card(embeddings=True), scale=0.3)


@pytest.fixture(scope="module")
def model(fused: Path, encoder: Path):
    with TFAudioClassifier(fused, threads=1, encoder=encoder) as built:
        yield built


@pytest.fixture(scope="module")
def given(fused: Path):
    """The model without its encoder."""
    with TFAudioClassifier(fused, threads=1) as built:
        yield built


@pytest.fixture(scope="module")
def masked(folder: Path):
    with TFAudioClassifier(write_events(folder / "masked.onnx", event_card(mask=True)), threads=1) as built:
        yield built


def tokens(encoder: Path, waveform):
    features = TFFrontend(get_frontend("dcase_2023"))(waveform[None]).numpy()
    return OnnxSession(encoder, threads=1).run({"features": features})["tokens"][0]


def test_embeddings_come_from_the_encoder_or_from_the_caller(model, given, encoder):
    waveform = scene(5)
    answer = model.predict(waveform)
    by_hand = given.predict(waveform, inputs={"embeddings": tokens(encoder, waveform)})
    np.testing.assert_allclose(by_hand.frame_probabilities, answer.frame_probabilities, atol=1e-6)
    other = given.predict(waveform, inputs={"embeddings": np.ones((TOKEN_SIZE, 3), np.float32)})
    assert np.abs(other.frame_probabilities - answer.frame_probabilities).max() > 0.1
    assert answer.events


def test_the_callers_embeddings_go_before_the_encoders(model):
    waveform = scene(2)
    own = {"embeddings": np.ones((TOKEN_SIZE, 3), np.float32)}
    assert (
        np.abs(model.predict(waveform, inputs=own).probabilities - model.predict(waveform).probabilities).max() > 0.01
    )


def test_a_batch_with_tokens_of_unequal_number_is_scored_as_one_by_one(given):
    rng = np.random.default_rng(0)
    clips = [scene(seconds, seed) for seed, seconds in enumerate((2.0, 2.0, 3.0, 2.0))]
    extras = [{"embeddings": rng.standard_normal((TOKEN_SIZE, count))} for count in (4, 4, 4, 9)]
    together = given.predict(clips, inputs=extras)
    for clip, own, found in zip(clips, extras, together, strict=True):
        alone = given.predict(clip, inputs=own)
        np.testing.assert_allclose(found.frame_probabilities, alone.frame_probabilities, atol=1e-6)
        np.testing.assert_allclose(found.probabilities, alone.probabilities, atol=1e-6)
    rows = given.predict(np.stack(clips[:2]), inputs=extras[:2])
    np.testing.assert_allclose(rows[1].probabilities, together[1].probabilities, atol=1e-6)


def test_windows_and_streams_have_their_embeddings_computed(model):
    waveform = scene(9)
    found = list(model.detect(waveform, 4.0, 2.0))
    with model.stream(4.0, 2.0) as stream:
        streamed = [event for chunk in np.array_split(waveform, 31) for event in stream.feed(chunk)]
        assert streamed + stream.close() == found
    assert found
    (first, *_) = model.predict_windows(waveform, 4.0, 2.0)
    np.testing.assert_allclose(first.probabilities, model.predict(waveform[: 4 * RATE]).probabilities, atol=1e-6)


def test_one_mask_goes_for_every_clip_and_window(masked):
    mask = np.array([True, False, True, False])
    waveform = scene(9)
    for answer in masked.predict([waveform, waveform[: 3 * RATE]], inputs={"classes_mask": mask}):
        assert (answer.frame_probabilities[~mask] == 0).all()
        assert (answer.frame_probabilities[mask] > 0).all()
    labels = {EVENT_LABELS[0], EVENT_LABELS[2]}
    everything = {event.label for event in masked.detect(waveform, 4.0, 2.0, inputs={"classes_mask": ~(mask & False)})}
    some = {event.label for event in masked.detect(waveform, 4.0, 2.0, inputs={"classes_mask": mask})}
    assert some <= labels < everything


@pytest.mark.parametrize(
    ("inputs", "code", "said"),
    [
        (None, "missing", r"'embeddings' is missing: .* float32 \(6, tokens\) .*; pass encoder=\.\.\. or inputs="),
        ({}, "missing", "'embeddings' is missing"),
        ({"embedding": np.ones((6, 3))}, "type", "got embedding; .* takes embeddings"),
        ({"embeddings": np.ones((5, 3))}, "shape", r"got shape \(5, 3\); expected \(6, tokens\)"),
        ({"embeddings": np.ones((1, 6, 3))}, "shape", "of one clip"),
        ({"embeddings": np.ones(6)}, "shape", r"expected \(6, tokens\)"),
        ({"embeddings": np.ones((6, 0))}, "shape", r"got shape \(6, 0\)"),
        ({"embeddings": np.full((6, 2), np.nan)}, "non_finite", "finite"),
        ({"embeddings": np.full((6, 2), 1e300)}, "non_finite", "finite"),
        ({"embeddings": np.ones((6, 2), int)}, "dtype", "got int64; expected float32"),
        ({"embeddings": [[1.0], [2.0, 3.0]]}, "dtype", "not an array"),
        ([{"embeddings": np.ones((6, 2))}] * 2, "type", "got 2 of them for 1 clips"),
        ("embeddings", "type", "got str for 1 clips"),
    ],
)
def test_embeddings_that_do_not_fit(given, inputs, code, said):
    with pytest.raises(WaveformError, match=said) as caught:
        given.predict(scene(1), inputs=inputs)
    assert caught.value.code == code


def test_the_clip_whose_input_does_not_fit_is_named(given):
    extras = [{"embeddings": np.ones((6, 2))}, {"embeddings": np.ones((7, 2))}]
    with pytest.raises(WaveformError, match=r"clip 1 .*got shape \(7, 2\)"):
        given.predict([scene(1), scene(1)], inputs=extras)


@pytest.mark.parametrize(
    ("mask", "code"),
    [(np.ones(3, bool), "shape"), (np.ones(5, bool), "shape"), (np.ones(4), "dtype"), (np.ones((1, 4), bool), "shape")],
)
def test_masks_that_do_not_fit(masked, mask, code):
    with pytest.raises(WaveformError) as caught:
        masked.predict(scene(1), inputs={"classes_mask": mask})
    assert caught.value.code == code
    with pytest.raises(WaveformError, match="is missing"):
        masked.predict(scene(1))
    with pytest.raises(WaveformError, match="is missing"):
        masked.stream()


def test_inputs_of_one_clip_do_not_go_for_windows(given, folder):
    own = {"embeddings": np.ones((TOKEN_SIZE, 3), np.float32)}
    for use in (given.predict_windows, given.detect):
        with pytest.raises(WaveformError, match=r"belongs to one clip.*encoder"):
            use(scene(5), 4.0, 2.0, inputs=own)
    card = event_card(embeddings=True, length_policy={"max": 2 * RATE, "long": "windows"})
    cut = TFAudioClassifier(write_events(folder / "cut.onnx", card))
    with cut, pytest.raises(WaveformError, match="belongs to one clip"):
        cut.predict(scene(5), inputs=own)


def test_an_input_that_a_graph_would_stretch(folder):
    """A mask of one frame goes with any number of frames in ONNX's arithmetic."""
    card = event_card(mask=True)
    part = card.inputs[1].replace(axes=("batch", "frames"))
    stretching = card.replace(inputs=(card.inputs[0], part))
    model = TFAudioClassifier(write_events(folder / "stretch.onnx", stretching))
    with model, pytest.raises(WaveformError, match=r"'classes_mask': got 1 frames; the clip has 47") as caught:
        model.predict(scene(3), inputs={"classes_mask": np.ones(1, bool)})
    assert caught.value.code == "shape"


def test_models_of_audio_alone_take_nothing_beside_it(folder, encoder, classifier):
    with pytest.raises(WaveformError, match="takes nothing but audio"):
        classifier.predict(np.zeros(32000, np.float32), inputs={"classes_mask": np.ones(3, bool)})
    with pytest.raises(CardError, match="takes no embeddings"):
        TFAudioClassifier(write_events(folder / "plain.onnx"), encoder=encoder)


def test_encoders_that_do_not_fit(folder, fused):
    wide = write_encoder(folder / "wide.onnx", encoder_card(7))
    with pytest.raises(CardError, match=r"returns tokens \(batch, 7, tokens\); .* takes \(batch, 6, tokens\)"):
        TFAudioClassifier(fused, encoder=wide)
    fast = write_encoder(folder / "fast.onnx", encoder_card(frontend="efficientat"))
    with pytest.raises(CardError, match="hears 32000 Hz, 'tiny' 16000 Hz") as caught:
        TFAudioClassifier(fused, encoder=fast)
    assert caught.value.field == "frontend.sample_rate"


def test_clips_the_encoder_does_not_take(folder, fused):
    policy = {"max": 3 * RATE, "long": "windows"}
    short = write_encoder(folder / "short.onnx", encoder_card(length_policy=policy))
    with TFAudioClassifier(fused, encoder=short) as model:
        assert model.predict(scene(3)).events
        with pytest.raises(ClipLengthError, match="the encoder 'tiny-encoder' takes at most 48000"):
            model.predict(scene(4))


def test_a_model_with_its_encoder_pickles_and_closes(fused, encoder):
    waveform = scene(2)
    with TFAudioClassifier(fused, encoder=encoder) as model:
        model.warmup()
        expected = model.predict(waveform)
        with pickle.loads(pickle.dumps(model)) as again:
            np.testing.assert_array_equal(again.predict(waveform).probabilities, expected.probabilities)
    with pytest.raises(ClosedError):
        model.predict(waveform)


def test_several_event_models_answer_with_the_mean_of_their_frames(folder):
    upright = event_card(
        name="upright",
        outputs=[
            {"name": "strong", "role": "frame", "kind": "probability", "axes": ["batch", "frames", "4"], "hop": 4},
            {"name": "weak", "role": "clip", "kind": "probability", "axes": ["batch", "4"]},
        ],
        thresholds={"hum": 0.9},
    )
    paths = [write_events(folder / "one.onnx", seed=1), write_events(folder / "two.onnx", upright, seed=2)]
    waveform = scene(7)
    with TFAudioClassifier(paths, weights=[1, 3]) as both, TFAudioClassifier(paths[0]) as one:
        with TFAudioClassifier(paths[1]) as two:
            answers = [model.predict(waveform) for model in (one, two)]
        answer = both.predict(waveform)
        for field in ("probabilities", "frame_probabilities"):
            expected = 0.25 * getattr(answers[0], field) + 0.75 * getattr(answers[1], field)
            np.testing.assert_allclose(getattr(answer, field), expected, atol=1e-6)
        assert answer.events
        assert answer.events != answers[0].events
        assert list(both.detect(waveform, 4.0, 2.0, events=EventOptions(thresholds=0.4)))


def test_event_models_with_other_frames_do_not_answer_together(folder):
    card = event_card(name="half")
    half = card.replace(outputs=(card.outputs[0].replace(hop=8), card.outputs[1]))
    paths = [write_events(folder / "whole.onnx"), write_events(folder / "half.onnx", half)]
    with pytest.raises(CardError, match=r"'half' scores frames of 0\.128 s, 'tiny' of 0\.064 s"):
        TFAudioClassifier(paths)
