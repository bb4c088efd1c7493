"""Sound and pictures from their files on both paths: WAV, JPEG and video, scores, embeddings and what they find."""

from __future__ import annotations

import csv
import io

import av
import numpy as np
import onnx
import pytest
import soundfile
import torch
from PIL import Image

from export.exporter import export_onnx
from infer_tf import AudioVisualIndex, TFAudioClassifier
from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.images import ImageSpec
from models_zoo.presets import get_frontend
from models_zoo.retrieval import cosine_similarity
from models_zoo.video import read_video_audio, read_video_frames
from parity_tests.__main__ import main
from parity_tests.parity import TorchPath, compare_nearest, run_parity
from parity_tests.tolerances import COSINE, PROBABILITIES
from train_torch.checkpoint import save_checkpoint
from train_torch.models import create_model, new_card

LABELS = ("bell", "drum", "flute")
CLIPS = 14
RATE = 16000


def write_model(folder, name, architecture, **options):
    """Write a small network of random weights as checkpoint and ONNX file."""
    torch.manual_seed(0)
    model = create_model(
        architecture, embed_dim=24, num_heads=3, n_mels=32, audio_length=64, image_size=48, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.mul_(1.5)
    published = get_frontend("cav_mae")
    frontend = published.replace(mel=published.mel.replace(n_mels=32), frames=published.frames.replace(count=64))
    sources = {part.source for part in model.inputs}
    card = new_card(
        name,
        architecture,
        model=model,
        frontend=frontend if "frontend" in sources else None,
        image=ImageSpec(size=48) if "image" in sources else None,
        task="embedding" if architecture == "cavmae" else "single_label",
        labels=None if architecture == "cavmae" else LABELS,
    )
    save_checkpoint(folder / f"{name}.safetensors", model, card)
    export_onnx(model, card, folder / f"{name}.onnx")


def drawn(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC)


def mp4(seed):
    """Return the bytes of a video of a second, MPEG-4 and AAC."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as output:
        track = output.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = 96, 64, "yuv420p"
        line = output.add_stream("aac", rate=44100, layout="stereo")
        for index in range(10):
            picture = np.asarray(drawn(100 * seed + index).resize((96, 64)))
            output.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(track.encode())
        noise = (0.1 * np.random.default_rng(seed).standard_normal((2, 44100))).astype(np.float32)
        for first in range(0, 44100, 1024):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(noise[:, first : first + 1024]), format="fltp", layout="stereo"
            )
            frame.sample_rate, frame.pts = 44100, first
            output.mux(line.encode(frame))
        output.mux(line.encode())
    return stream.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audiovisual")
    write_model(folder, "joint", "cavmaeft", num_classes=3)
    write_model(folder, "pictures", "cavmaeft", num_classes=3, mode="videoonly")
    write_model(folder, "towers", "cavmae", decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    data = folder / "data"
    data.mkdir()
    rows = [("file", "label", "image", "split")]
    for index in range(CLIPS):
        rng = np.random.default_rng(index)
        sound = 0.2 * rng.standard_normal(RATE // 2) * np.linspace(0.01, 1, RATE // 2) ** (index % 5)
        soundfile.write(data / f"{index}.wav", sound, RATE)
        drawn(index).save(data / f"{index}.jpg", quality=90)
        rows.append((f"{index}.wav", LABELS[index % 3], f"{index}.jpg", "test"))
    with (data / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    (folder / "clip.mp4").write_bytes(mp4(1))
    return folder


def parity(made, name, checkpoint=None):
    return run_parity(made / f"{name}.onnx", made / f"{checkpoint or name}.safetensors", made / "data", progress=False)


@pytest.mark.parametrize("name", ["joint", "pictures", "towers"])
def test_both_paths_agree_from_the_files(made, name):
    report = parity(made, name)
    assert report.passed, str(report)
    assert report.num_clips == CLIPS
    assert not report.changed
    stages = {stage.stage: stage for stage in report.stages}
    assert stages["picture"].detail == "bit-equal"
    assert ("decode" in stages) == (name != "pictures")
    if name == "towers":
        assert stages["embeddings"].worst < 1
        assert stages["retrieval"].worst == 0
        assert "accuracy" not in str(report)
    else:
        assert stages["probabilities"].worst < 1


def test_the_command_takes_pictures(made, capsys):
    arguments = ["--data", str(made / "data"), "--limit", "11"]
    assert (
        main(["--onnx", str(made / "towers.onnx"), "--checkpoint", str(made / "towers.safetensors"), *arguments]) == 0
    )
    assert "11 clips" in capsys.readouterr().out


def altered(path, change):
    """Return the bytes of an ONNX file after ``change(graph, metadata)``."""
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    change(model.graph, metadata)
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def test_a_picture_read_in_another_way_fails_at_its_stage(made, tmp_path):
    def read_otherwise(_, metadata):
        card = ModelCard.from_json(metadata[CARD_KEY])
        metadata[CARD_KEY] = card.replace(image=ImageSpec(size=48, resample="bilinear")).to_json()

    for name in ("pictures", "towers"):
        (tmp_path / "m.onnx").write_bytes(altered(made / f"{name}.onnx", read_otherwise))
        report = run_parity(tmp_path / "m.onnx", made / f"{name}.safetensors", made / "data", limit=3, progress=False)
        assert report.first_failure.stage == "picture"
        assert len(report.first_failure.clips) == 3


def test_another_tower_fails_at_the_embeddings(made, tmp_path):
    def unlearn(graph, _):
        (bias,) = (one for one in graph.initializer if one.name.endswith("patch_embed_v.proj.bias"))
        values = onnx.numpy_helper.to_array(bias)
        bias.CopyFrom(onnx.numpy_helper.from_array(np.arange(len(values), dtype=np.float32), bias.name))

    (tmp_path / "m.onnx").write_bytes(altered(made / "towers.onnx", unlearn))
    report = run_parity(tmp_path / "m.onnx", made / "towers.safetensors", made / "data", limit=3, progress=False)
    assert report.first_failure.stage == "embeddings"
    assert "image_embedding" in report.first_failure.detail


def test_a_missing_picture_is_an_unreadable_clip(made, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    (tmp_path / "metadata.csv").write_text("file,label,split\na.wav,bell,test\n")
    report = run_parity(made / "joint.onnx", made / "joint.safetensors", tmp_path, progress=False)
    assert not report.passed
    assert "column 'image'" in report.unreadable[0][1]


def test_a_video_is_the_same_on_both_paths(made):
    clip = made / "clip.mp4"
    for name in ("joint", "pictures"):
        research = TorchPath(made / f"{name}.safetensors")
        waveform = None if research.spec is None else read_video_audio(clip, research.spec)
        frames = [np.asarray(frame) for frame in read_video_frames(clip, range(10))]
        each = [research.predict(waveform, frame).probabilities for frame in frames]
        with TFAudioClassifier(made / f"{name}.onnx", threads=1) as production:
            middle, every = production.predict(video=clip), production.predict(video=clip, frames="all")
        assert np.abs(middle.probabilities - each[5]).max() <= PROBABILITIES
        assert np.abs(every.probabilities - np.mean(each, axis=0)).max() <= PROBABILITIES
        assert middle.probabilities.argmax() == each[5].argmax()


def test_an_index_finds_what_torch_finds(made):
    research = TorchPath(made / "towers.safetensors")
    data = made / "data"
    with TFAudioClassifier(made / "towers.onnx", threads=1) as production:
        sounds, pictures = ([data / f"{i}.{suffix}" for i in range(CLIPS)] for suffix in ("wav", "jpg"))
        index = AudioVisualIndex.build(production, [*sounds, *pictures, made / "clip.mp4"])
        both = [
            research.embeddings(production._waveform(sound, None, False), picture)
            for sound, picture in zip(sounds, pictures, strict=True)
        ]
        both.append(
            research.embeddings(
                read_video_audio(made / "clip.mp4", research.spec), np.asarray(read_video_frames(made / "clip.mp4")[0])
            )
        )
        ours = {kind: np.stack([one[f"{kind}_embedding"] for one in both]) for kind in ("audio", "image")}
        for kind, other, files in (("audio", "image", sounds), ("image", "audio", pictures)):
            rows = [index.vectors[i] for i, entry in enumerate(index.entries) if entry.kind == kind]
            assert np.diagonal(cosine_similarity(ours[kind], rows)).min() >= 1 - COSINE
            names = [str(path) for path in (sounds if other == "audio" else pictures)] + [str(made / "clip.mp4")]
            for place, path in enumerate(files):
                cosines = cosine_similarity(ours[kind][place][None], ours[other])[0]
                expected = [names[i] for i in np.argsort(-cosines, kind="stable")[:10]]
                assert [match.path for match in index.search(**{kind: path}, k=10)] == expected


def test_lists_may_differ_by_rounding_alone():
    ours = np.array([0.9, 0.5, 0.5 - 1e-8, 0.1])
    assert compare_nearest(ours, ours) == (0.0, "equal")
    assert compare_nearest(ours, ours + np.array([0, -2e-8, 2e-8, 0]), k=3)[0] <= 1
    unlike = compare_nearest(ours, ours + np.array([0, -1e-3, 0, 0]), k=3)
    assert unlike[0] <= 1, "a difference of embeddings, which is measured as such"
