"""Front-end specs: derived answers, round trips, and errors that name the field."""

from __future__ import annotations

import json
import pickle

import pytest

from models_zoo.errors import ClipLengthError, SpecError, UnknownNameError
from models_zoo.presets import get_frontend, list_frontends
from models_zoo.specs import Frames, Framing, FrontendSpec, Mel, Patches, Preemphasis

# (preset, samples -> frames), from the contracts' tables.
FRAMES = {
    "efficientat": {320000: 1000, 64000: 200, 33333: 105, 514: 2},
    "efficientat_hop160": {32000: 200},
    "efficientat_hop480": {32000: 67},
    "efficientat_hop640": {32000: 50},
    "efficientat_hop800": {32000: 40},
    "panns_32k": {320000: 1001, 513: 2, 9999: 32},
    "panns_16k": {5000: 32},
    "panns_8k": {2500: 32},
    "dcase_2023": {160000: 626, 20001: 79, 1025: 5},
    "dcase_2024": {160000: 626},
    "cav_mae": {160000: 1024, 400: 1024, 170000: 1024},
    "mrms": {925: 9, 3200: 32, 8000: 80, 12345: 123, 16000: 160, 24000: 240},
    "whisper": {16000: 3000, 480000: 3000, 1000000: 3000},
    "nemo": {160000: 1008},
}

SHORTEST = {
    "efficientat": 514,
    "panns_32k": 513,
    "panns_16k": 257,
    "panns_8k": 129,
    "dcase_2023": 1025,
    "dcase_2024": 1025,
    "cav_mae": 400,
    "mrms": 925,
    "whisper": 1,
}


@pytest.mark.parametrize("name", list_frontends())
def test_round_trips_through_json(name: str) -> None:
    spec = get_frontend(name)
    assert FrontendSpec.from_json(spec.to_json()) == spec
    assert FrontendSpec.from_dict(json.loads(spec.to_json(indent=2))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(FrontendSpec.from_json(spec.to_json())) == hash(spec)


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_counts_frames_as_published(name: str) -> None:
    spec = get_frontend(name)
    assert {samples: spec.num_frames(samples) for samples in FRAMES[name]} == FRAMES[name]


@pytest.mark.parametrize("name", sorted(SHORTEST))
def test_states_the_shortest_legal_clip(name: str) -> None:
    spec = get_frontend(name)
    assert spec.min_samples == SHORTEST[name]
    assert spec.num_frames(SHORTEST[name]) >= 1
    with pytest.raises(ClipLengthError, match=f"at least {SHORTEST[name]}") as refused:
        spec.num_frames(SHORTEST[name] - 1)
    assert refused.value.code == "too_short"


def test_cav_mae_alone_has_more_frames_than_the_file() -> None:
    unfixed = get_frontend("cav_mae").replace(frames=None)
    assert unfixed.num_frames(160000) == 998
    assert unfixed.num_frames(400) == 1


@pytest.mark.parametrize(
    ("name", "samples", "shape"),
    [
        ("efficientat", 320000, (2, 128, 1000)),
        ("panns_32k", 320000, (2, 1, 1001, 64)),
        ("dcase_2023", 160000, (2, 128, 626)),
        ("cav_mae", 160000, (2, 1024, 128)),
        ("mrms", 160000, (2, 4, 160, 1600)),
        ("yamnet", 31200, (2, 3, 96, 64)),
        ("vggish", 31200, (2, 2, 96, 64)),
    ],
)
def test_states_the_output_shape(name: str, samples: int, shape: tuple[int, ...]) -> None:
    assert get_frontend(name).output_shape(samples, batch=2) == shape


def edited(path: str, value: object) -> dict:
    data = get_frontend("efficientat").to_dict()
    *parents, last = path.split(".")
    target = data
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("sample_rate", ..., "sample_rate"),
        ("mel", ..., "mel"),
        ("mel.n_mels", ..., "mel.n_mels"),
        ("surprise", 1, "surprise"),
        ("mel.n_filters", 64, "mel.n_filters"),
        ("mel.n_mels", 0, "mel.n_mels"),
        ("mel.n_mels", "128", "mel.n_mels"),
        ("mel.n_mels", 12.5, "mel.n_mels"),
        ("mel.f_max", 16001.0, "mel.f_max"),
        ("mel.f_max", 0.0, "mel.f_max"),
        ("mel.f_min", 15000.0, "mel.f_max"),
        ("mel.scale", "bark", "mel.scale"),
        ("framing.hop_length", 0, "framing.hop_length"),
        ("framing.padding", "mirror", "framing.padding"),
        ("framing.n_fft", 512, "windows"),
        ("windows", [], "windows"),
        ("windows.0.shape", "kaiser", "windows.0.shape"),
        ("power", 3, "power"),
        ("log.floor", 0.0, "log.floor"),
        ("log.floor", -1.0, "log.floor"),
        ("log.floor", 1e-50, "log.floor"),
        ("statistics", {"kind": "min_max", "eps": 1e-50}, "statistics.eps"),
        ("samples", 10, "framing"),
        ("samples", 10**12, "samples"),
        ("framing.n_fft", 1 << 40, "framing.n_fft"),
        ("framing.hop_length", 10**15, "framing.hop_length"),
        ("framing.drop_first", 10**9, "framing"),
        ("mel.n_mels", 10**9, "mel.n_mels"),
        ("affine.scale", 0.0, "affine.scale"),
        ("preemphasis.edge", "drop", "preemphasis.edge"),
        ("preemphasis.coefficient", 1.5, "preemphasis.coefficient"),
        ("clamp", {}, "clamp.low"),
        ("clamp", {"low": 1.0, "high": 0.0}, "clamp.high"),
        ("frames", {}, "frames.count"),
        ("frames", {"count": 10, "multiple_of": 2}, "frames.count"),
        ("statistics", {"kind": "median"}, "statistics.kind"),
        ("layout", "b t", "layout"),
        ("layout", "m t b", "layout"),
        ("layout", "b m t t", "layout"),
        ("layout", "b c m t", "layout"),
        ("channels", "sum", "channels"),
        ("resampler", "linear", "resampler"),
        ("sample_rate", 0, "sample_rate"),
        ("sample_rate", True, "sample_rate"),
    ],
)
def test_an_impossible_spec_names_its_field(path: str, value: object, field: str) -> None:
    with pytest.raises(SpecError) as refused:
        FrontendSpec.from_dict(edited(path, value))
    assert refused.value.field == field
    assert f"FrontendSpec.{field}: " in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sample_rate": NaN}'])
def test_other_documents_are_spec_errors(text: str) -> None:
    with pytest.raises(SpecError):
        FrontendSpec.from_json(text)


def test_parts_and_copies_are_validated_and_frozen() -> None:
    spec = get_frontend("efficientat")
    with pytest.raises(SpecError, match="n_mels"):
        Mel(n_mels=-1, f_min=0.0, f_max=1.0, scale="htk", linear_in="hz", area_norm=False)
    with pytest.raises(SpecError, match="n_fft"):
        Framing(n_fft=1, hop_length=1)
    with pytest.raises(SpecError) as refused:
        spec.replace(mel=spec.mel.replace(f_max=20000.0))
    assert refused.value.field == "mel.f_max"
    with pytest.raises(Exception, match="frozen"):
        spec.sample_rate = 8000  # type: ignore[misc]
    assert spec.replace(preemphasis=Preemphasis(coefficient=0.5, edge="frame")) != spec


def test_patches_longer_than_the_frames_are_refused() -> None:
    spec = get_frontend("efficientat").replace(frames=Frames(count=50))
    patched = spec.replace(patches=Patches(length=50, hop=1), layout="b p m t")
    assert patched.num_patches(32000) == 1
    with pytest.raises(SpecError, match="no clip is long enough to give a patch of 51 frames"):
        spec.replace(patches=Patches(length=51, hop=1), layout="b p m t")


def test_an_unknown_front_end_suggests_near_names() -> None:
    with pytest.raises(UnknownNameError, match="efficientat_hop160"):
        get_frontend("efficientat_hop16")
