"""Several models as one: the mean of their answers, and front ends computed once."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from infer_tf import TFAudioClassifier
from infer_tf.frontend import TFFrontend
from models_zoo.cards import LengthPolicy
from models_zoo.decoding import probabilities_of
from models_zoo.ensembles import common_policy, mean_scores, normalised_weights
from models_zoo.errors import CardError, ModelFileError, UnknownNameError
from models_zoo.presets import get_frontend
from parity_tests.infer_tf.tiny import tiny_card, write_tiny

CLIP = (np.random.default_rng(0).standard_normal(16000) * 0.1).astype(np.float32)


@pytest.fixture
def paths(tmp_path):
    return [write_tiny(tmp_path / f"{seed}.onnx", tiny_card(name=f"m{seed}"), seed=seed) for seed in range(3)]


def alone(path):
    with TFAudioClassifier(path, threads=1) as classifier:
        return classifier.predict(CLIP)


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 5.0)])
def test_the_mean_of_probabilities(paths, weights):
    with TFAudioClassifier(paths, threads=1, weights=weights) as together:
        got = together.predict(CLIP)
    expected = np.average([alone(path).probabilities for path in paths], axis=0, weights=weights)
    np.testing.assert_allclose(got.probabilities, expected, rtol=0, atol=1e-7)
    assert np.abs(got.probabilities - alone(paths[0]).probabilities).max() > 1e-3
    assert got.logits is None
    assert got.embedding is None


def test_the_mean_of_logits(paths):
    with TFAudioClassifier(paths, threads=1, mean="logits") as together:
        got = together.predict(CLIP)
        assert together.card.clip_output().kind == "logit"
    logits = np.mean([alone(path).logits for path in paths], axis=0)
    np.testing.assert_allclose(got.logits, logits, rtol=0, atol=1e-6)
    expected = probabilities_of(logits, task="single_label", kind="logit")
    np.testing.assert_allclose(got.probabilities, expected, rtol=0, atol=1e-6)
    means = np.mean([alone(path).probabilities for path in paths], axis=0)
    assert np.abs(got.probabilities - means).max() > 1e-4


def test_one_front_end_for_all_that_share_it(paths, tmp_path, monkeypatch):
    other = get_frontend("efficientat_hop160")
    paths.append(write_tiny(tmp_path / "other.onnx", tiny_card(name="other", frontend=other.to_dict()), seed=9))
    calls = []
    features = TFFrontend.features
    monkeypatch.setattr(TFFrontend, "features", lambda self, x: calls.append(self.spec) or features(self, x))
    with TFAudioClassifier(paths, threads=1) as together:
        got = together.predict(CLIP)
    assert calls == [get_frontend("efficientat"), other]
    expected = np.mean([alone(path).probabilities for path in paths], axis=0)
    np.testing.assert_allclose(got.probabilities, expected, rtol=0, atol=1e-7)


def test_a_folder_stands_for_its_models_and_one_in_a_list_for_itself(paths, tmp_path):
    with TFAudioClassifier(tmp_path, threads=1) as folder, TFAudioClassifier(paths, threads=1) as listed:
        np.testing.assert_array_equal(folder.predict(CLIP).probabilities, listed.predict(CLIP).probabilities)
    with TFAudioClassifier([paths[1]], threads=1) as single:
        np.testing.assert_array_equal(single.predict(CLIP).logits, alone(paths[1]).logits)
        assert single.card.name == "m1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match="folder without"):
        TFAudioClassifier(tmp_path / "empty")


def test_batches_windows_and_pickles(paths):
    batch = [CLIP, CLIP[:9000], CLIP[:16000] * 0.5]
    with TFAudioClassifier(paths, threads=1, weights=[3, 1, 1]) as together:
        one_by_one = [together.predict(clip).probabilities for clip in batch]
        for got, expected in zip(together.predict(batch), one_by_one, strict=True):
            np.testing.assert_allclose(got.probabilities, expected, rtol=0, atol=1e-6)
        assert len(list(together.predict_windows(CLIP, 0.2, 0.1))) == 4
        with pytest.raises(ModelFileError, match="no embedding"):
            together.embed(CLIP)
        with pickle.loads(pickle.dumps(together)) as again:
            np.testing.assert_array_equal(again.predict(CLIP).probabilities, one_by_one[0])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"labels": ["clap", "whistle", "hum"]}, "labels"),
        ({"task": "multi_label"}, "task"),
        ({"frontend": get_frontend("efficientat").replace(sample_rate=44100).to_dict()}, "frontend.sample_rate"),
    ],
)
def test_models_that_do_not_go_together(paths, tmp_path, changes, field):
    stranger = write_tiny(tmp_path / "stranger.onnx", tiny_card(name="stranger", **changes))
    with pytest.raises(CardError, match="stranger") as caught:
        TFAudioClassifier([*paths, stranger])
    assert caught.value.field == field


@pytest.mark.parametrize("weights", [(1, 2), (1, 2, 0), (1, 2, -1), (1, 2, float("nan")), (1, 2, float("inf"))])
def test_impossible_weights(paths, weights):
    with pytest.raises(CardError) as caught:
        TFAudioClassifier(paths, weights=weights)
    assert caught.value.field == "weights"


def test_an_unknown_mean_and_no_models(paths):
    with pytest.raises(UnknownNameError):
        TFAudioClassifier(paths, mean="logit")
    with pytest.raises(ModelFileError, match="at least one"):
        TFAudioClassifier([])


def test_a_mean_of_logits_needs_logits(tmp_path):
    outputs = [{"name": "logits", "role": "clip", "kind": "probability", "axes": ["batch", "classes"]}]
    card = tiny_card(outputs=[*outputs, tiny_card().outputs[1].to_dict()])
    two = [write_tiny(tmp_path / f"{name}.onnx", card) for name in "ab"]
    with pytest.raises(CardError, match="probability") as caught:
        TFAudioClassifier(two, mean="logits")
    assert caught.value.field == "outputs"


def test_the_common_policy_is_the_strictest():
    cards = [
        tiny_card(length_policy={"min": 1000, "max": 90000, "short": "zero", "long": "crop"}),
        tiny_card(length_policy={"min": 2000, "multiple_of": 640, "short": "zero", "uneven": "crop"}),
        tiny_card(length_policy={"multiple_of": 100, "short": "zero"}),
    ]
    assert common_policy(cards) == LengthPolicy(min=3200, max=89600, multiple_of=3200, short="zero")
    assert common_policy(cards[:1] * 2) == cards[0].length_policy


def test_weights_sum_to_one_and_decide():
    weights = normalised_weights([1, 3], 2)
    assert weights == (0.25, 0.75)
    scores = [np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)]
    np.testing.assert_allclose(mean_scores(scores, [tiny_card()] * 2, weights, "logits"), 0.75)
