#!/usr/bin/env bash
# From nothing to a proven production model, on sounds it makes itself; run by `make demo`, writes demo_output/ only.
set -euo pipefail
cd "$(dirname "$0")"
out=demo_output
rm -rf "$out"
mkdir "$out"
SECONDS=0

# Clips of a second gain little from a second thread, and lose much where the machine is busy.
export OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1

step() { printf '\n== %s\n\n' "$*"; }

step "1. Make sounds: 600 labelled clips of ten kinds"
python -m train_torch soundscapes --out $out/sounds --clips 600 --seconds 1 --seed 1

step "2. Train in PyTorch"
python -m train_torch fit --recipe soundscapes --data $out/sounds --out $out/run --name soundscapes-mn --threads 1

step "3. Export, verify, and only then keep: one ONNX file with its card inside"
python export/pt2onnx.py $out/run/model.safetensors -o $out/soundscapes.onnx

step "4. Predict with torch made unimportable: a rising sweep that was not trained on"
python -m parity_tests.without torch torchaudio -- \
  infer_tf.cli predict $out/soundscapes.onnx $out/sounds/audio/00017.wav --plot $out/prediction.png

step "5. Prove that production answers as training did, stage by stage, from files that were not trained on"
python -m parity_tests --onnx $out/soundscapes.onnx --checkpoint $out/run/model.safetensors --data $out/sounds \
  --split test

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. The picture is $out/prediction.png"
