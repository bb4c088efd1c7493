"""Scores to probabilities, and what is done with clips of every length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import expit, softmax

from models_zoo.decoding import check_window, class_names, decode, legal_segments, probabilities_of, window_starts
from models_zoo.errors import CardError, ClipLengthError, ModelFileError
from parity_tests.infer_tf.tiny import tiny_card

RATE = 32000
SHORTEST = 514  # of the efficientat front end


def card(task="single_label", kind="logit", **policy):
    outputs = [{"name": "logits", "role": "clip", "kind": kind, "axes": ["batch", "classes"]}]
    outputs.append({"name": "embedding", "role": "embedding", "axes": ["batch", "8"]})
    return tiny_card(task=task, outputs=outputs, length_policy=policy)


@pytest.mark.parametrize("task", ["single_label", "label_distribution"])
def test_exclusive_tasks_are_softmax(task):
    scores = np.random.default_rng(0).normal(0, 30, (50, 7)).astype(np.float32)
    found = probabilities_of(scores, task=task, kind="logit")
    np.testing.assert_allclose(found, softmax(scores.astype(np.float64), axis=-1), atol=1e-7)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("task", ["multi_label", "event_detection"])
def test_other_tasks_are_sigmoid(task):
    scores = np.array([[-1e4, -88.8, -1.5, 0, 2.5, 88.8, 1e4]], np.float32)
    found = probabilities_of(scores, task=task, kind="logit")
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, expit(scores.astype(np.float64)), atol=1e-7)
    assert found.dtype == np.float32


def test_log_probabilities_and_probabilities_pass_whatever_the_task():
    values = np.array([[0.0, 0.25, 1.0]], np.float32)
    with np.errstate(divide="ignore"):
        logs = np.log(values)
    np.testing.assert_allclose(probabilities_of(logs, task="single_label", kind="log_probability"), values, atol=1e-7)
    np.testing.assert_array_equal(probabilities_of(values, task="multi_label", kind="probability"), values)


def test_a_row_does_not_depend_on_its_neighbours():
    scores = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    for task in ("single_label", "multi_label"):
        together = probabilities_of(scores, task=task, kind="logit")
        apart = [probabilities_of(row, task=task, kind="logit") for row in scores]
        np.testing.assert_array_equal(together, np.stack(apart))


def test_windows_cover_a_recording_whatever_its_length():
    for window, hop in [(10, 5), (10, 10), (10, 3), (7, 9), (1, 1)]:
        for length in range(1, 60):
            starts = window_starts(length, window, hop)
            assert starts[0] == 0
            assert starts == sorted(set(starts))
            assert starts[-1] == max(0, length - window), "the last window ends with the recording"
            assert all(after - before <= hop for before, after in itertools.pairwise(starts))
            assert all(start % hop == 0 for start in starts[:-1])


def clip(num_samples):
    return np.arange(1, num_samples + 1, dtype=np.float32)


def test_a_legal_clip_is_left_alone():
    for length in (SHORTEST, SHORTEST + 1, 100_000):
        segments = legal_segments(clip(length), card(max=100_000))
        np.testing.assert_array_equal(segments, clip(length)[None])


@pytest.mark.parametrize(
    ("policy", "length", "code", "says"),
    [
        ({}, SHORTEST - 1, "too_short", f"513 samples .* at least {SHORTEST} samples"),
        ({"min": 1000}, 999, "too_short", "at least 1000 samples"),
        ({"max": 2000}, 2001, "too_long", "at most 2000 samples"),
        ({"multiple_of": 320}, 3201, "multiple", "cut it to 3200 or fill it to 3520"),
        ({"multiple_of": 320, "min": 3201, "uneven": "crop"}, 3202, "multiple", "multiples of 320"),
    ],
)
def test_without_a_rule_an_illegal_length_is_an_error(policy, length, code, says):
    with pytest.raises(ClipLengthError, match=says) as caught:
        legal_segments(clip(length), card(**policy))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("policy", "length", "expected"),
    [
        ({"short": "zero"}, 3, np.pad(clip(3), (0, SHORTEST - 3))),
        ({"short": "repeat"}, 200, np.tile(clip(200), 3)[:SHORTEST]),
        ({"short": "repeat"}, 1, np.ones(SHORTEST)),
        ({"short": "zero", "min": 2000}, 1000, np.pad(clip(1000), (0, 1000))),
        ({"short": "zero", "min": 700, "multiple_of": 320}, 3, np.pad(clip(3), (0, 957))),
        ({"short": "repeat", "min": 700, "multiple_of": 320}, 480, np.tile(clip(480), 2)),
        ({"long": "crop", "max": 2000}, 2500, clip(2000)),
        ({"uneven": "crop", "multiple_of": 320}, 999, clip(960)),
        ({"uneven": "zero", "multiple_of": 320}, 961, np.pad(clip(961), (0, 319))),
        ({"short": "zero", "uneven": "zero", "multiple_of": 320}, 3, np.pad(clip(3), (0, 637))),
    ],
)
def test_a_declared_rule_is_followed(policy, length, expected):
    segments = legal_segments(clip(length), card(**policy))
    np.testing.assert_array_equal(segments, expected[None])


def test_a_long_clip_cut_into_windows_is_averaged():
    declared = card(long="windows", max=1000)
    segments = legal_segments(clip(2300), declared)
    np.testing.assert_array_equal(segments[:, 0], [1, 1001, 1301])
    assert segments.shape == (3, 1000)
    logits = np.array([[5, 0, 0], [0, 5, 0], [0, 0, 5]], np.float32)
    embedding = np.arange(24, dtype=np.float32).reshape(3, 8)
    answer = decode(declared, {"logits": logits, "embedding": embedding}, end=2.0)
    np.testing.assert_allclose(answer.probabilities, np.full(3, 1 / 3), atol=1e-6)
    np.testing.assert_allclose(answer.embedding, embedding.mean(axis=0))
    assert answer.logits is None
    assert answer.end == 2.0


def test_one_segment_keeps_its_logits():
    logits = np.array([[1, 3, 2]], np.float32)
    answer = decode(card(), {"logits": logits, "embedding": np.zeros((1, 8), np.float32)})
    np.testing.assert_array_equal(answer.logits, logits[0])
    assert answer.label == "hum"


@pytest.mark.parametrize(
    ("window", "code"), [(SHORTEST - 1, "too_short"), (6720, "too_long"), (1000, "multiple"), (960, None)]
)
def test_a_window_must_be_a_legal_clip(window, code):
    declared = card(max=6400, multiple_of=320)
    if code is None:
        check_window(window, declared)
        return
    with pytest.raises(ClipLengthError, match="window: got") as caught:
        check_window(window, declared)
    assert caught.value.code == code


def test_labels_must_be_as_many_as_classes():
    assert class_names(tiny_card(labels=None), 2) == ("class 0", "class 1")
    with pytest.raises(ModelFileError, match="returned 4 classes, but its card has 3 labels"):
        class_names(tiny_card(), 4)


def test_a_model_without_clip_scores_has_nothing_to_decode():
    bare = tiny_card(task="embedding", labels=None, outputs=[tiny_card().outputs[1].to_dict()])
    with pytest.raises(ModelFileError, match="use embed"):
        decode(bare, {"embedding": np.zeros((1, 8), np.float32)})


def framed(kind, **changes):
    """Return a card of a model that scores frames, and its outputs for one clip of four scores."""
    outputs = [{"name": "clip", "role": "clip", "kind": kind, "axes": ["batch", "3"]}]
    outputs.append({"name": "frames", "role": "frame", "kind": kind, "axes": ["batch", "time", "3"], **changes})
    scores = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
    if kind == "probability":
        scores = expit(scores)
    return tiny_card(task="multi_label", outputs=outputs), {"clip": scores.max(axis=1), "frames": scores}


@pytest.mark.parametrize("kind", ["logit", "probability"])
@pytest.mark.parametrize("hop", [1, 4])
def test_frame_scores_become_probabilities_with_times(kind, hop):
    declared, outputs = framed(kind, hop=hop)
    answer = decode(declared, outputs, start=2.5, end=3.0)
    expected = expit(outputs["frames"][0]) if kind == "logit" else outputs["frames"][0]
    np.testing.assert_allclose(answer.frame_probabilities, expected.T, atol=1e-6)
    np.testing.assert_allclose(answer.frame_times, 2.5 + np.arange(4) * hop * 320 / RATE)
    assert (answer.frame_probabilities.dtype, answer.frame_times.dtype) == (np.float32, np.float64)
    listed = answer.to_dict(2)
    assert listed["frame_times"] == answer.frame_times.tolist()
    for row, one in zip(listed["frame_probabilities"], listed["top"], strict=True):
        assert row == answer.frame_probabilities[one["index"]].tolist()


@pytest.mark.parametrize("task", ["single_label", "event_detection"])
def test_the_axis_named_frames_is_time(task):
    declared, outputs = framed("logit")
    upright = decode(declared.replace(task=task), outputs)
    turned, _ = framed("logit", axes=["batch", "3", "frames"])
    answer = decode(turned.replace(task=task), outputs | {"frames": outputs["frames"].transpose(0, 2, 1)})
    np.testing.assert_array_equal(answer.frame_probabilities, upright.frame_probabilities)
    assert answer.frame_probabilities.shape == (3, 4) == (3, len(answer.frame_times))
    assert [card.frame_output().time_axis for card in (declared, turned)] == [1, 2]


def test_frame_scores_of_several_segments_are_left_out():
    declared, outputs = framed("logit")
    answer = decode(declared, {name: np.concatenate([value, value]) for name, value in outputs.items()})
    assert answer.frame_probabilities is None
    assert answer.frame_times is None


@pytest.mark.parametrize("axes", [["batch", "3"], ["frames", "3", "time"], ["batch", "frames", "frames"]])
def test_frame_scores_have_three_axes(axes):
    with pytest.raises(CardError, match=r"\(batch, frames, classes\)"):
        framed("logit", axes=axes)
