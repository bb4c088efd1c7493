"""Sound, pictures and videos through ``TFAudioClassifier``: what is given reaches the network, and misuse says so."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from infer_tf import OnnxSession, TFAudioClassifier
from models_zoo.cards import ModelCard
from models_zoo.decoding import probabilities_of
from models_zoo.errors import CardError, ImageDecodeError, ModelFileError, VideoDecodeError, WaveformError
from models_zoo.images import ImageSpec, load_image
from models_zoo.video import read_video_audio, read_video_frames
from parity_tests.infer_tf.tiny_pairs import RATE, SIZE, picture, video, write_pair, write_picture

SPEC = ImageSpec(size=SIZE)


def sound(seed, seconds=1.0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    built = {
        kind: TFAudioClassifier(write_pair(folder / f"{kind}.onnx", kind), threads=1)
        for kind in ("joint", "towers", "pictures", "sounds")
    }
    yield built
    for one in built.values():
        one.close()


def by_hand(model, waveform, image):
    """Return the probabilities of what the session answers to inputs made by hand."""
    fed = {}
    for part in model.card.inputs:
        if part.source == "image":
            fed["image"] = load_image(image, SPEC)[None]
        else:
            fed["features"] = np.asarray(model.frontend.features(waveform[None]))
    logits = OnnxSession(model.paths[0], threads=1).run(fed)["logits"]
    return probabilities_of(logits, task="single_label", kind="logit")[0]


@pytest.mark.parametrize("kind", ["joint", "pictures", "sounds"])
def test_what_is_given_reaches_the_network(models, kind):
    model = models[kind]
    given = {}
    if kind != "pictures":
        given["audio"] = sound(1)
    if kind != "sounds":
        given["image"] = picture(2)
    expected = by_hand(model, sound(1), picture(2))
    assert np.array_equal(model.predict(**given).probabilities, expected)
    for name, other in (("audio", sound(3)), ("image", picture(4))):
        if name in given:
            assert not np.allclose(model.predict(**{**given, name: other}).probabilities, expected, atol=1e-4)


def test_a_picture_comes_as_path_bytes_file_or_array(models, tmp_path):
    path = write_picture(tmp_path / "one.png", 5)
    expected = models["joint"].predict(sound(1), image=picture(5)).probabilities
    with path.open("rb") as file:
        for given in (path, str(path), path.read_bytes(), file):
            assert np.array_equal(models["joint"].predict(sound(1), image=given).probabilities, expected)
    assert np.array_equal(models["joint"].predict(sound(1), inputs={"image": path}).probabilities, expected)


@pytest.mark.parametrize("kind", ["joint", "pictures"])
def test_a_batch_answers_as_its_clips_do(models, kind, monkeypatch):
    model = models[kind]
    monkeypatch.setattr("infer_tf.classifier._BATCH_SECONDS", 4.0)
    monkeypatch.setattr("infer_tf.classifier._BATCH_VALUES", 5 * 3 * SIZE**2)
    waveforms = [sound(seed, 1 + seed % 3) for seed in range(12)]
    pictures = [picture(seed) for seed in range(12)]
    given = {"audio": waveforms} if kind == "joint" else {}
    together = model.predict(**given, image=pictures)
    for index, answer in enumerate(together):
        alone = model.predict(waveforms[index] if kind == "joint" else None, image=pictures[index])
        assert np.abs(answer.probabilities - alone.probabilities).max() < 1e-6
        assert answer.end == alone.end == (len(waveforms[index]) / RATE if kind == "joint" else 0.0)
    if kind == "joint":
        for_all = model.predict(waveforms[:2], image=pictures[0])
        assert (
            np.abs(for_all[1].probabilities - model.predict(waveforms[1], image=pictures[0]).probabilities).max() < 1e-6
        )


def test_a_video_is_its_sound_and_its_middle_picture(models):
    clip = video(seed=1)
    waveform = read_video_audio(clip, models["joint"].frontend.spec)
    frames = [np.asarray(frame) for frame in read_video_frames(clip, range(10))]
    for kind in ("joint", "pictures", "sounds"):
        given = {} if kind == "pictures" else {"audio": waveform}
        looked = [{}] if kind == "sounds" else [{"image": frame} for frame in frames]
        each = [models[kind].predict(**given, **one).probabilities for one in looked]
        middle = each[5 % len(each)]
        assert np.abs(models[kind].predict(video=clip).probabilities - middle).max() < 1e-6
        every = models[kind].predict(video=clip, frames="all")
        assert np.abs(every.probabilities - np.mean(each, axis=0)).max() < 1e-6
        some = models[kind].predict(video=io.BytesIO(clip), frames=[0, 9]).probabilities
        assert np.abs(some - np.mean([each[0], each[-1]], axis=0)).max() < 1e-6
        if kind != "sounds":
            assert not np.allclose(middle, each[0], atol=1e-4)
            assert not np.allclose(middle, every.probabilities, atol=1e-4)
    both = models["joint"].predict(video=[clip, video(seed=2)])
    assert np.array_equal(both[0].probabilities, models["joint"].predict(video=clip).probabilities)
    embedding = models["joint"].embed(video=clip, frames=[2, 3])
    expected = [models["joint"].embed(waveform, image=frames[index]) for index in (2, 3)]
    assert np.abs(embedding - np.mean(expected, axis=0)).max() < 1e-5


def test_a_video_need_not_hold_what_the_model_does_not_take(models):
    assert models["sounds"].predict(video=video(pictures=False)).label
    assert models["pictures"].predict(video=video(heard=False)).label
    with pytest.raises(VideoDecodeError, match="no sound") as refused:
        models["joint"].predict(video=video(heard=False))
    assert refused.value.code == "no_audio"
    with pytest.raises(VideoDecodeError, match=r"clip 1 .*no picture") as refused:
        models["joint"].predict(video=[video(), video(pictures=False)])
    assert refused.value.code == "no_video"
    for data, code in ((b"", "empty"), (b"no video at all", "not_video"), (video()[:100], "not_video")):
        with pytest.raises(VideoDecodeError) as refused:
            models["joint"].predict(video=data)
        assert refused.value.code == code
    for frames in ("first", [], [10], [1.5]):
        with pytest.raises(VideoDecodeError, match="frames: got"):
            models["joint"].predict(video=video(), frames=frames)
    for beside, message in (
        ({"image": picture(0)}, "video: got image beside it"),
        ({"sample_rate": 8000}, "sample_rate: got 8000 with a recording"),
        ({"channels_first": True}, "channels_first: got it with a video"),
    ):
        for ask in (models["joint"].predict, models["joint"].embed):
            with pytest.raises(WaveformError, match=message):
                ask(video=video(), **beside)
    for frames in ("all", [1], np.array([1, 2]), None):
        for ask in (models["joint"].predict, models["joint"].embed):
            with pytest.raises(WaveformError, match="without a video"):
                ask(sound(1), image=picture(0), frames=frames)


class Once(io.BytesIO):
    """A file that cannot seek, like a pipe."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation("seek")


def test_a_video_may_come_from_what_cannot_seek(models):
    for kind in ("joint", "pictures", "sounds"):
        piped = models[kind].predict(video=Once(video(seed=1)))
        assert np.array_equal(piped.probabilities, models[kind].predict(video=video(seed=1)).probabilities)
    with pytest.raises(VideoDecodeError, match=r"^<file object>: is no video"):
        models["joint"].predict(video=Once(b"no video at all"))


def test_inputs_go_with_each_video(models, monkeypatch):
    clips = [video(seed=1), video(seed=2)]
    alone = [models["joint"].predict(video=clip).probabilities for clip in clips]
    given = []
    checked = models["joint"]._members.checked

    def watched(inputs, outputs=None):
        given.append(inputs.get("mark"))
        return checked({name: value for name, value in inputs.items() if name != "mark"}, outputs)

    monkeypatch.setattr(models["joint"]._members, "checked", watched)
    for inputs, marks in (
        ([{"mark": 1}, {"mark": 2}], [1, 2]),
        ([{}, {}], [None, None]),
        ({"mark": 3}, [3, 3]),
        (None, [None, None]),
    ):
        answers = models["joint"].predict(video=clips, inputs=inputs)
        assert given == marks
        assert all(np.array_equal(one.probabilities, other) for one, other in zip(answers, alone, strict=True))
        given.clear()
    models["joint"].embed(video=clips, inputs=[{"mark": 1}, {"mark": 2}])
    assert given == [1, 2]
    for wrong in ([{}], [5, {}], 5):
        with pytest.raises(WaveformError, match="inputs: got") as refused:
            models["joint"].predict(video=clips, inputs=wrong)
        assert refused.value.code == "type"


def test_errors_name_the_clip_once_and_of_several_alone(models):
    for several in (False, True):
        for frames in ("middle", "all"):
            with pytest.raises(WaveformError) as refused:
                models["joint"].predict(video=[video()] if several else video(), frames=frames, inputs={"stranger": 1})
            assert str(refused.value).count("clip 0") == several


def test_no_clips_have_no_answers(models):
    for kind in ("joint", "sounds"):
        assert models[kind].predict([]) == []
        assert models[kind].predict(video=[]) == []
    assert models["joint"].predict([], image=picture(1)) == []
    with pytest.raises(WaveformError, match="1 pictures for 0 clips"):
        models["joint"].predict([], image=[picture(1)])


def test_one_tower_is_asked_without_the_other(models, monkeypatch):
    towers = models["towers"]
    session = OnnxSession(towers.paths[0], threads=1)
    both = session.run(
        {
            "features": np.asarray(towers.frontend.features(sound(1)[None])),
            "image": load_image(picture(2), SPEC)[None],
        }
    )
    fed = []
    runtime = towers._members._sessions[0]._session

    class Watched:
        def run(self, names, inputs):
            fed.append({name: len(value) for name, value in inputs.items()})
            return runtime.run(names, inputs)

    monkeypatch.setattr(towers._members._sessions[0], "_session", Watched())
    assert np.array_equal(towers.embed_audio(sound(1)), both["audio_embedding"][0])
    assert np.array_equal(towers.embed_image(picture(2)), both["image_embedding"][0])
    assert np.array_equal(towers.embed(sound(1)), both["audio_embedding"][0])
    assert np.array_equal(towers.embed(image=picture(2)), both["image_embedding"][0])
    assert fed == [{"features": 1, "image": 0}, {"features": 0, "image": 1}] * 2
    several = towers.embed_image([picture(2), picture(3)])
    assert np.abs(several[0] - both["image_embedding"][0]).max() < 1e-6
    windows = list(towers.embed_windows(sound(1, 3.0), 1.0, 1.0))
    assert len(windows) == 3
    assert np.array_equal(windows[0][2], towers.embed_audio(sound(1, 3.0)[:RATE]))


def test_models_of_one_modality_embed_it(models):
    assert np.array_equal(models["sounds"].embed_audio(sound(1)), models["sounds"].embed(sound(1)))
    assert np.array_equal(models["pictures"].embed_image(picture(1)), models["pictures"].embed(image=picture(1)))


def test_a_picture_goes_for_every_window(models):
    waveform = sound(1, 3.0)
    answers = list(models["joint"].predict_windows(waveform, 1.0, 1.0, inputs={"image": picture(2)}))
    assert len(answers) == 3
    last = models["joint"].predict(waveform[2 * RATE :], image=picture(2))
    assert np.abs(answers[2].probabilities - last.probabilities).max() < 1e-6
    with pytest.raises(WaveformError, match="image: missing"):
        next(models["joint"].predict_windows(waveform, 1.0, 1.0))
    with pytest.raises(ModelFileError, match="looks at pictures alone"):
        models["pictures"].predict_windows(waveform, 1.0, 1.0)


MISUSE = {
    "no picture": ("joint", "predict", {"audio": sound(1)}, WaveformError, "missing", "image: missing"),
    "no sound": ("joint", "predict", {"image": picture(1)}, WaveformError, "missing", "audio: missing"),
    "a picture of no use": (
        "sounds", "predict", {"audio": sound(1), "image": picture(1)}, WaveformError, "type", "looks at no pictures"
    ),
    "sound of no use": (
        "pictures", "predict", {"audio": sound(1), "image": picture(1)}, WaveformError, "type", "pictures alone"
    ),
    "nothing": ("sounds", "predict", {}, WaveformError, "missing", "audio: missing"),
    "fewer pictures": (
        "joint", "predict", {"audio": [sound(1)] * 3, "image": [picture(1)] * 2}, WaveformError, "shape",
        "2 pictures for 3 clips",
    ),
    "pictures for one clip": (
        "joint", "predict", {"audio": sound(1), "image": [picture(1)] * 2}, WaveformError, "shape",
        "2 pictures for 1 clip;",
    ),
    "another picture among them": (
        "joint", "predict", {"audio": [sound(1)] * 2, "image": [picture(1), b"no picture"]}, ImageDecodeError,
        "not_image", "clip 1",
    ),
    "inputs that are none": (
        "joint", "predict", {"audio": [sound(1)], "image": [picture(1)], "inputs": [5]}, WaveformError, "type",
        "inputs: got int for clip 0",
    ),
    "floats": (
        "pictures", "predict", {"image": picture(1) / 255}, ImageDecodeError, "dtype", "expected uint8",
    ),
    "no scores": ("towers", "predict", {"audio": sound(1)}, ModelFileError, None, "use embed"),
    "which embedding": (
        "towers", "embed", {"audio": sound(1), "image": picture(1)}, ModelFileError, None,
        "audio_embedding of features; image_embedding of image; .* embed_audio, embed_image",
    ),
    "sound of a joint model": (
        "joint", "embed_audio", {"audio": sound(1)}, ModelFileError, None, "embedding of features and image",
    ),
    "pictures of a model of sounds": (
        "sounds", "embed_image", {"image": picture(1)}, ModelFileError, None, "embedding of features",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_says_what_to_do(models, case):
    kind, verb, given, error, code, message = MISUSE[case]
    with pytest.raises(error, match=message) as refused:
        getattr(models[kind], verb)(**given)
    if code is not None:
        assert refused.value.code == code


def saved(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_unusual_pictures(models):
    model = models["pictures"]
    frames = [Image.fromarray(picture(seed)) for seed in (1, 2)]
    with pytest.raises(ImageDecodeError) as refused:
        model.predict(image=saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=40))
    assert refused.value.code == "animated"
    grey = Image.fromarray(picture(1)).convert("L")
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) | 0x7F)
    assert np.array_equal(
        model.predict(image=saved(deep, "PNG")).probabilities, model.predict(image=saved(grey, "PNG")).probabilities
    )
    printed = saved(Image.fromarray(picture(1)).convert("CMYK"), "JPEG", quality=95)
    assert np.isfinite(model.predict(image=printed).probabilities).all()
    assert np.isfinite(model.predict(image=np.full((1, 1, 3), 9, np.uint8)).probabilities).all()
    long = Image.new("1", (20_000, 20_000))
    with pytest.raises(ImageDecodeError) as refused:
        model.predict(image=saved(long, "PNG", compress_level=1))
    assert refused.value.code == "too_large"
    strip = Image.new("RGB", (20_000, 400), (10, 200, 30))
    assert np.isfinite(model.predict(image=saved(strip, "PNG")).probabilities).all()


def test_models_of_pictures_need_no_tensorflow_and_answer_together(models, tmp_path):
    model = models["pictures"]
    assert model._members.frontends == {}
    for ask in (lambda: model.sample_rate, lambda: model.frontend):
        with pytest.raises(ModelFileError, match="pictures alone"):
            ask()
    model.warmup()
    models["joint"].warmup()
    models["towers"].warmup()
    paths = [write_pair(tmp_path / f"{seed}.onnx", "pictures", seed=seed) for seed in (0, 1)]
    each = []
    for path in paths:
        with TFAudioClassifier(path, threads=1) as one:
            each.append(one.predict(image=picture(3)).probabilities)
    with TFAudioClassifier(paths, threads=1) as both:
        assert np.abs(both.predict(image=picture(3)).probabilities - np.mean(each, axis=0)).max() < 1e-6
    with pytest.raises(CardError, match="sample_rate"):
        TFAudioClassifier([paths[0], models["joint"].paths[0]], threads=1)
    other = write_pair(tmp_path / "other.onnx", "pictures", image=ImageSpec(size=SIZE, resample="bilinear").to_dict())
    with pytest.raises(CardError, match="reads pictures in another way"):
        TFAudioClassifier([paths[0], other], threads=1)


def test_a_card_that_takes_neither_is_refused(tmp_path):
    card = ModelCard.from_dict(
        {
            "name": "neither",
            "system": "test",
            "task": "embedding",
            "architecture": "tiny",
            "inputs": [{"name": "features", "axes": ["batch", "8"], "source": "caller"}],
            "outputs": [{"name": "embedding", "role": "embedding", "axes": ["batch", "8"]}],
        }
    )
    from infer_tf.members import _check_sources

    with pytest.raises(ModelFileError, match="from audio or pictures"):
        _check_sources(card)
