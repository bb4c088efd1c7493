"""What importing infer_tf costs, prints and needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import infer_tf
from infer_tf import backend
from models_zoo.errors import DeviceError, MissingDependencyError
from parity_tests.infer_tf.conftest import noise

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    plain = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={**plain, **environment})


def test_the_public_names_are_few_and_there():
    assert infer_tf.__all__ == ["AudioVisualIndex", "OnnxSession", "TFAudioClassifier", "TFFrontend"]
    assert set(infer_tf.__all__) <= set(dir(infer_tf))
    with pytest.raises(AttributeError, match="no attribute 'TFAudioClasifier'"):
        _ = infer_tf.TFAudioClasifier


def test_importing_the_package_loads_no_framework():
    code = (
        "import sys, infer_tf\n"
        "loaded = {'tensorflow', 'keras', 'onnxruntime', 'torch', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "from infer_tf import OnnxSession\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")


CLASSIFY = (
    "import json, sys\n"
    "import numpy as np\n"
    "from infer_tf import TFAudioClassifier\n"
    "samples = np.load(sys.argv[2])\n"
    "with TFAudioClassifier(sys.argv[1], threads=1) as built:\n"
    "    print(json.dumps(built.predict(samples).to_dict()))\n"
    "unwanted = {'torch', 'sklearn', 'matplotlib', 'onnx', 'librosa', 'lightning'} & set(sys.modules)\n"
    "assert not unwanted, unwanted\n"
    "assert not __import__('tensorflow').config.get_visible_devices('GPU')\n"
)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    import numpy as np

    np.save(tmp_path / "samples.npy", noise(0.5))
    return tmp_path / "samples.npy"


def test_a_prediction_needs_no_training_package_and_prints_nothing(model_path, samples, classifier):
    hide = "from parity_tests.without import make_unimportable\n"
    hide += "make_unimportable('torch', 'torchaudio', 'sklearn', 'matplotlib', 'onnx', 'lightning', 'librosa')\n"
    result = python(hide + CLASSIFY, model_path, samples)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == classifier.predict(noise(0.5)).to_dict()


def test_the_user_may_ask_for_tensorflows_messages():
    code = "from infer_tf import TFFrontend\n"
    assert "oneDNN" in python(code, TF_CPP_MIN_LOG_LEVEL="0", TF_ENABLE_ONEDNN_OPTS="1").stderr


def test_other_messages_pass_while_tensorflow_is_imported(capfd):
    with backend._without_notices():
        os.write(2, b"I0000 00:00:1.0 1 port.cc:153] oneDNN custom operations are on.\na driver is missing\n")
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n")
    assert capfd.readouterr().err == "a driver is missing\n"


def test_missing_tensorflow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingDependencyError, match=r"crossfade\[infer\]"):
        backend.load_tensorflow()


def test_tensorflow_belongs_to_the_process_that_started_it(monkeypatch):
    monkeypatch.setattr(backend, "_process", 1)
    with pytest.raises(DeviceError, match=r"forked from process 1.*spawn"):
        backend.claim_tensorflow()


def test_a_picture_without_matplotlib_names_the_extra(model_path, tmp_path):
    code = (
        "from parity_tests.without import make_unimportable\n"
        "make_unimportable('matplotlib')\n"
        "import sys\n"
        "from infer_tf.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    result = python(code, "predict", model_path, "clip.wav", "--plot", tmp_path / "x.png")
    assert result.returncode == 2
    assert result.stderr == "crossfade: error: a picture needs matplotlib; install crossfade[plot]\n"
