"""Stage 1: the three implementations against each other, on lengths, batches and parameters nobody recorded."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import torch
from numpy.typing import NDArray

from infer_tf.frontend import TFFrontend
from models_zoo.audio import load_audio
from models_zoo.dataset import read_dataset
from models_zoo.errors import ClipLengthError, WaveformError
from models_zoo.presets import get_frontend, list_frontends
from models_zoo.reference import ReferenceFrontend
from models_zoo.specs import (
    STAGES,
    Affine,
    Clamp,
    Frames,
    Framing,
    FrontendSpec,
    Log,
    Mel,
    Patches,
    Preemphasis,
    Statistics,
    Window,
)
from parity_tests.feature_rule import compare_features
from parity_tests.mistakes import MISTAKES, Mistake
from parity_tests.parity import compare_stages
from parity_tests.tolerances import FILLER, SILENCE, paths_limit
from train_torch.frontend import MelJitter, Mixing, SpecMasks, TorchFrontend

SYSTEMS = ("efficientat", "panns_32k", "panns_16k", "panns_8k", "dcase_2023", "dcase_2024", "cav_mae", "mrms")


def speechlike(spec: FrontendSpec, seconds: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    """Return ``(1, num_samples)``: voiced bursts with gaps between them, a quiet hiss underneath."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * spec.sample_rate)) / spec.sample_rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 2.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / spec.sample_rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    envelope = np.clip(np.sin(2 * np.pi * 3 * time), 0, None) ** 2
    hiss = 1e-4 * rng.standard_normal(time.size)
    return (0.2 * envelope * voice + hiss).astype(np.float32)[None]


def random_spec(seed: int) -> FrontendSpec:
    """Return a legal spec with every field drawn at random, far from the presets."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[rng.integers(len(options))]

    n_fft = int(pick(256, 400, 512, 1000, 1024))
    rate = int(pick(8000, 16000, 22050, 44100))
    windows = tuple(
        Window(
            shape=pick("hann", "hamming", "povey"),
            win_length=int(rng.integers(n_fft // 3, n_fft + 1)),
            periodic=bool(rng.integers(2)),
        )
        for _ in range(pick(1, 1, 1, 3))
    )
    patches = pick(None, None, Patches(length=int(rng.integers(2, 9)), hop=int(rng.integers(1, 7))))
    axes = ["m", "t", *(["c"] if len(windows) > 1 else []), *(["p"] if patches else []), *pick([], ["1"])]
    low = float(rng.uniform(0, 300))
    frames = pick(
        None,
        None,
        Frames(count=int(rng.integers(10, 200)), fill=0.7),
        Frames(multiple_of=int(rng.integers(2, 20)), fill=-0.3),
    )
    return FrontendSpec(
        sample_rate=rate,
        samples=pick(None, None, None, rate),
        preemphasis=pick(
            None, *(Preemphasis(coefficient=0.9, edge=edge) for edge in ("signal_drop", "signal_keep", "frame"))
        ),
        framing=Framing(
            n_fft=n_fft,
            hop_length=int(rng.integers(n_fft // 5, n_fft)),
            placement=pick("centred", "left"),
            padding=pick("reflect", "zero", "snip"),
            lead=int(pick(0, 0, 37)),
            remove_dc=bool(rng.integers(2)),
            drop_first=int(pick(0, 0, 1)),
            drop_last=int(pick(0, 0, 2)),
        ),
        windows=windows,
        power=pick(1, 2),
        mel=Mel(
            n_mels=int(rng.integers(8, 80)),
            f_min=low,
            f_max=float(rng.uniform(low + 1000, rate / 2)),
            scale=pick("htk", "slaney"),
            linear_in=pick("hz", "mel"),
            area_norm=bool(rng.integers(2)),
        ),
        log=Log(
            floor_mode=pick("add", "max"),
            floor=float(10 ** rng.uniform(-8, -3)),
            gain=float(pick(1.0, 10 / math.log(10))),
        ),
        clamp=pick(None, None, Clamp(low=-40.0, high=20.0), Clamp(below_max=6.0), Clamp(high=1.0)),
        statistics=pick(
            None,
            *(
                Statistics(kind=kind, over=over)
                for kind in ("mean", "mean_std", "min_max")
                for over in ("mel_time", "time")
            ),
        ),
        affine=pick(None, Affine(shift=1.0, scale=3.0), Affine(scale=-2.0, ramp=(-1.0, 1.0))),
        frames=frames if patches is None else None,
        patches=patches,
        layout=" ".join(["b", *rng.permutation(axes)]),
    )


@pytest.mark.parametrize("name", list_frontends())
def test_shapes_and_values_over_lengths_and_batches(name: str) -> None:
    spec = get_frontend(name)
    reference, research, production = ReferenceFrontend(spec), TorchFrontend(spec).eval(), TFFrontend(spec)
    rng = np.random.default_rng(1)
    limit = paths_limit(spec)
    for num_samples in (spec.min_samples, spec.min_samples + 1, 12345 + spec.min_samples, 3 * spec.sample_rate + 1):
        for batch in (1, 3):
            waveform = (rng.standard_normal((batch, num_samples)) * 0.1).astype(np.float32)
            expected = reference(waveform)
            for actual in (research(torch.from_numpy(waveform)).numpy(), production.features(waveform)):
                assert actual.shape == spec.output_shape(num_samples, batch)
                assert actual.dtype == np.float32
                if name != "nemo" or num_samples > spec.sample_rate:  # the deviation of two frames amplifies rounding
                    difference = compare_features(spec, waveform, expected, actual)
                    assert not difference.exceeds(limit), difference


@pytest.mark.parametrize("name", list_frontends())
def test_one_sample_less_than_legal_is_refused_by_all(name: str) -> None:
    spec = get_frontend(name)
    if spec.min_samples == 1:
        waveform = np.zeros((1, 0), np.float32)
    else:
        waveform = np.zeros((1, spec.min_samples - 1), np.float32)
    for frontend in (ReferenceFrontend(spec), TorchFrontend(spec), TFFrontend(spec)):
        with pytest.raises(ClipLengthError, match=str(spec.min_samples)):
            frontend(torch.from_numpy(waveform) if isinstance(frontend, TorchFrontend) else waveform)
    with pytest.raises(WaveformError):
        ReferenceFrontend(spec)(np.zeros(spec.sample_rate, np.float32))
    with pytest.raises(WaveformError):
        TorchFrontend(spec)(torch.zeros(spec.sample_rate))
    with pytest.raises(WaveformError):
        TFFrontend(spec).features(np.zeros(spec.sample_rate, np.float32))


@pytest.mark.parametrize("seed", range(40))
def test_random_specs_agree_at_every_length(seed: int) -> None:
    spec = random_spec(seed)
    assert FrontendSpec.from_json(spec.to_json()) == spec
    reference, research, production = ReferenceFrontend(spec), TorchFrontend(spec).eval(), TFFrontend(spec)
    waveform = speechlike(spec, 2.0, seed)
    degenerate = spec.statistics is not None and spec.statistics.kind != "mean" and spec.statistics.over == "time"
    for num_samples in (spec.min_samples, spec.min_samples + 7, waveform.shape[1]):
        cut = waveform[:, -num_samples:]
        expected = reference(cut)
        for actual in (research(torch.from_numpy(cut)).numpy(), production.features(cut)):
            assert actual.shape == expected.shape == spec.output_shape(num_samples)
            assert np.isfinite(actual).all()
            # Deviations over a handful of frames may be all rounding (FRONTENDS.md, "Degenerate statistics").
            if num_samples == waveform.shape[1] or not degenerate:
                assert np.abs(actual - expected).max() <= 2e-2 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", [*SYSTEMS, "whisper", "yamnet", "vggish", "ast", "nemo"])
def test_silence_and_filler_are_constant_through_the_graph(name: str) -> None:
    spec = get_frontend(name)
    silence = np.zeros((2, 2 * spec.sample_rate), np.float32)
    expected = ReferenceFrontend(spec)(silence)
    actual = TFFrontend(spec).features(silence)
    assert np.abs(actual - expected).max() <= (SILENCE["panns"] if name.startswith("panns") else SILENCE["other"])
    if spec.frames is not None:
        analysed = spec.replace(frames=None).num_frames(silence.shape[1])
        fill = np.moveaxis(actual, spec.layout.split(" ").index("t"), 0)[analysed:]
        assert fill.size
        assert np.abs(fill - spec.frames.fill).max() <= FILLER


def test_stages_carry_the_declared_names_in_order_everywhere() -> None:
    spec = get_frontend("mrms")
    waveform = speechlike(spec)
    for stages in (
        ReferenceFrontend(spec).stages(waveform),
        TorchFrontend(spec).eval().stages(torch.from_numpy(waveform)),
        TFFrontend(spec).stages(waveform),
    ):
        assert tuple(stages) == STAGES
        assert len(stages["frames"]) == 4


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.preset}-{mistake.name}".replace(" ", "_"))
def test_an_injected_mistake_is_found_at_its_stage(mistake: Mistake) -> None:
    spec = get_frontend(mistake.preset)
    wrong = mistake.make(spec)
    assert wrong != spec
    waveform = speechlike(spec)
    limit = paths_limit(spec)
    expected = TorchFrontend(spec).eval().stages(torch.from_numpy(waveform))

    def failing(actual, actual_spec: FrontendSpec) -> list[str]:
        rows = compare_stages(spec, waveform, expected, actual, actual_spec=actual_spec, limit=limit)
        return [stage for stage, ratio, _ in rows if not ratio <= 1]

    assert failing(TFFrontend(spec).stages(waveform), spec) == []
    found = failing(TFFrontend(wrong).stages(waveform), wrong)
    assert found
    assert found[0] == mistake.stage
    assert found[-1] == "features"


@pytest.mark.real_data
@pytest.mark.parametrize("name", SYSTEMS)
def test_torch_and_tensorflow_agree_on_real_clips(name: str, data: Path) -> None:
    spec = get_frontend(name)
    limit = paths_limit(spec)
    research, production = TorchFrontend(spec).eval(), TFFrontend(spec)
    files = [
        record.file
        for folder, step in (("fsdd", 100), ("instruments", 12))
        for record in read_dataset(data / folder).records[::step]
    ]
    broken, compared = [], 0
    for file in files:
        waveform = load_audio(file, spec)[None]
        if waveform.shape[1] < spec.min_samples:
            continue
        compared += 1
        actual = production.features(waveform)
        difference = compare_features(spec, waveform, research(torch.from_numpy(waveform)).numpy(), actual)
        broken += [f"{file.name}: {part}" for part in difference.exceeds(limit)]
    assert compared >= 35
    assert not broken, "\n".join(broken)


def test_a_batch_never_changes_a_feature() -> None:
    spec = get_frontend("dcase_2024")
    waveforms = np.concatenate([speechlike(spec, 1.0, seed) * gain for seed, gain in ((0, 1.0), (1, 0.01), (2, 0.3))])
    production = TFFrontend(spec)
    together = production.features(waveforms)
    for index in range(3):
        np.testing.assert_allclose(
            production.features(waveforms[index : index + 1])[0], together[index], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["mrms", "cav_mae", "efficientat", "nemo"])
def test_blocks_of_frames_change_no_feature(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Long clips are computed a block of frames after the other, their stages as a whole."""
    spec, frames, heights = get_frontend(name), 8, []
    monkeypatch.setattr("infer_tf.frontend._BLOCK", frames * spec.framing.n_fft)
    computed = TFFrontend._spectra

    def seen(frame: NDArray[np.float32]) -> NDArray[np.float32]:
        heights.append(frame.shape[1])
        return frame

    def recorded(self: TFFrontend, cut: list[tf.Tensor]) -> list[tf.Tensor]:
        return computed(self, [tf.ensure_shape(tf.numpy_function(seen, [one], tf.float32), one.shape) for one in cut])

    monkeypatch.setattr(TFFrontend, "_spectra", recorded)
    production = TFFrontend(spec)
    for batch in (1, 2):
        for count in (frames - 1, frames, frames + 1, 3 * frames + 2):
            num_samples = max(spec.min_samples, (count - 1) * spec.framing.hop_length + spec.span)
            waveform = np.random.default_rng(count).normal(0, 0.1, (batch, num_samples)).astype(np.float32)
            heights.clear()
            features = production.features(waveform)
            assert max(heights) <= frames // batch, "a batch takes as much memory as a clip"
            assert sum(heights) >= len(spec.windows) * (count - 2)
            np.testing.assert_allclose(features, production.stages(waveform)["features"], rtol=0, atol=1e-6)


def test_saved_model_needs_tensorflow_alone(tmp_path: Path) -> None:
    spec = get_frontend("cav_mae")
    frontend = TFFrontend(spec)
    frontend.save(tmp_path / "frontend")
    waveform = speechlike(spec, 0.7)
    np.save(tmp_path / "waveform.npy", waveform)
    script = (
        "import sys, numpy as np, tensorflow as tf\n"
        "served = tf.saved_model.load(sys.argv[1] + '/frontend').signatures['serving_default']\n"
        "waveform = np.load(sys.argv[1] + '/waveform.npy')\n"
        "features = served(waveform=tf.constant(waveform))['features'].numpy()\n"
        "assert not any(name.split('.')[0] in ('infer_tf', 'models_zoo') for name in sys.modules)\n"
        "np.save(sys.argv[1] + '/features.npy', features)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path, env=environment, timeout=120
    )
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), frontend.features(waveform), rtol=0, atol=1e-6)


def test_tf_frontend_is_a_keras_layer_whatever_the_dtype_policy() -> None:
    spec = get_frontend("efficientat")
    waveform = speechlike(spec)
    expected = TFFrontend(spec).features(waveform)
    policy = tf.keras.mixed_precision.global_policy() if hasattr(tf.keras.mixed_precision, "global_policy") else None
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        layer = TFFrontend.from_config(TFFrontend(spec).get_config())
        np.testing.assert_array_equal(layer(waveform).numpy(), expected)
        inputs = tf.keras.Input((None,), dtype="float32")
        model = tf.keras.Model(inputs, layer(inputs))
        assert model.output_shape == (None, 128, None)
        np.testing.assert_array_equal(model(waveform).numpy(), expected)
    finally:
        tf.keras.mixed_precision.set_global_policy(policy or "float32")


def test_training_hooks_act_in_training_only_and_where_published() -> None:
    spec = get_frontend("efficientat")
    waveform = torch.from_numpy(np.concatenate([speechlike(spec, 2.0, seed) for seed in range(4)]))
    plain = TorchFrontend(spec).eval()(waveform)
    frontend = TorchFrontend(spec, mel_jitter=MelJitter(), masks=SpecMasks(max_mels=20, max_frames=40))
    state = torch.get_rng_state()
    torch.testing.assert_close(frontend.eval()(waveform), plain, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    trained = frontend.train()(waveform)
    # A mask is 0 in log units, so (0 + 4.5) / 5 after the affine: a loud value, as published.
    masked = trained == 0.9
    assert 0 < masked.float().mean() < 0.5
    assert all(masked[index].any() for index in range(4))
    unmasked = (trained - plain)[~masked]
    assert 0 < unmasked.abs().mean() < 0.1
    torch.manual_seed(0)
    torch.testing.assert_close(frontend(waveform), trained, rtol=0, atol=0)
    assert not TorchFrontend(spec).state_dict()


@pytest.mark.parametrize("stage", ["samples", "mel", "features"])
def test_mixing_happens_at_its_stage(stage: str) -> None:
    spec = get_frontend("dcase_2023")
    waveform = torch.from_numpy(
        np.concatenate([speechlike(spec, 1.0, 0), 0.3 * speechlike(spec, 1.0, 5)[:, ::-1].copy()])
    )
    mixing = Mixing(torch.tensor([1, 0]), torch.tensor([0.75, 0.5]))
    frontend = TorchFrontend(spec, mix_at=stage).eval()
    mixed = frontend(waveform, mixing)
    plain = TorchFrontend(spec).eval()
    if stage == "samples":
        expected = plain(mixing(waveform))
    elif stage == "features":
        expected = mixing(plain(waveform))
    else:
        mel = mixing(plain.stages(waveform)["mel"]).numpy().astype(np.float64)
        decibel = np.clip(20 * np.log10(np.maximum(mel, 1e-5)), -50, 80)
        low, high = decibel.min(axis=(1, 2, 3), keepdims=True), decibel.max(axis=(1, 2, 3), keepdims=True)
        expected = torch.from_numpy(((decibel - low) / (high - low))[:, 0].transpose(0, 2, 1).astype(np.float32))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-4)
    assert not torch.allclose(mixed, plain(waveform), atol=1e-2)


def test_features_stay_float32_under_autocast() -> None:
    spec = get_frontend("efficientat")
    waveform = torch.from_numpy(speechlike(spec))
    frontend = TorchFrontend(spec).eval()
    expected = frontend(waveform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(frontend(waveform), expected, rtol=0, atol=0)
