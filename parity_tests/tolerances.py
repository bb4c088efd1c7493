"""Every tolerance of the suite, by stage, with the worst value measured and the reason.

Loosening one needs a line in CHANGELOG.md. "Worst" is the largest value seen on x86-64 Linux with torch 2.11,
TensorFlow 2.21 and onnxruntime 1.31; ``python -m parity_tests.measure`` prints them anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureLimit:
    """Limits on features in the spec's output units (DESIGN.md section 4, "Feature rule").

    Attributes:
        within_60: largest difference on bins within 60 dB of the frame's largest mel value.
        within_100: the same within 100 dB.
        mean: largest mean difference over bins above the floor, filler excluded.
    """

    within_60: float
    within_100: float
    mean: float


# A float32 FFT resolves 120 to 130 dB below a frame's peak, so bins deeper than 100 dB hold the published code's own
# rounding noise and only have to be finite. The mean is what catches a wrong window or wrong triangles.
GOLDEN_FEATURES: dict[str, FeatureLimit] = {
    "efficientat": FeatureLimit(5e-4, 1e-2, 1e-5),
    "panns": FeatureLimit(5e-4, 1e-2, 3e-4),
    "dcase": FeatureLimit(5e-4, 1e-2, 1e-5),
    "cav_mae": FeatureLimit(5e-4, 1e-2, 1e-5),
    "mrms": FeatureLimit(5e-4, 1e-2, 5e-5),
}
