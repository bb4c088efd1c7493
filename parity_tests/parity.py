"""Parity of one model, seam by seam: the torch path of a checkpoint against the TensorFlow + ONNX path of its export.

Both start from the file. The report names the first stage that departs and the clips concerned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from infer_tf import TFAudioClassifier
from models_zoo.audio import load_audio
from models_zoo.cards import ModelCard
from models_zoo.dataset import Dataset, Record, read_dataset
from models_zoo.decoding import decode, legal_segments
from models_zoo.errors import AudioClassifierError, CardError, DataError
from models_zoo.events import EventOptions, FrameGrid, filter_scores
from models_zoo.filterbanks import analysis_tables
from models_zoo.images import ImageSource, load_image
from models_zoo.metrics import kl_divergence
from models_zoo.prediction import Event, Prediction
from models_zoo.reference import ReferenceFrontend
from models_zoo.retrieval import cosine_similarity
from models_zoo.sed_metrics import Answer, SceneScores
from models_zoo.specs import STAGES, FrontendSpec
from parity_tests import tolerances
from parity_tests.feature_rule import FeatureDifference, Levels, difference_by_level, mel_levels
from parity_tests.tolerances import FeatureLimit
from train_torch.checkpoint import load_checkpoint
from train_torch.frontend import TorchFrontend, network_inputs
from train_torch.models.ensemble import combine

__all__ = ["ParityReport", "StageReport", "TorchPath", "compare_nearest", "compare_stages", "run_parity"]

_Array = NDArray[np.floating[Any]]
_Embeddings = dict[str, NDArray[np.float32]]

SIGNAL_STAGES = ("samples", "preemphasis", "padded", "frames", "windowed")
POWER_STAGES = ("spectrum", "mel")
LOG_STAGES = ("log", "clamp")


@dataclass
class StageReport:
    """What was seen at one seam over all clips.

    Attributes:
        stage: its name.
        worst: largest measured difference, as a multiple of its limit; more than 1 has failed.
        detail: the measured values of the worst clip, with their limits.
        clips: names of the clips that failed, in order.
    """

    stage: str
    worst: float = 0.0
    detail: str = ""
    clips: list[str] = field(default_factory=list)

    def add(self, clip: str, ratio: float, detail: str) -> None:
        """Take in one clip's difference, ``ratio`` being difference / limit."""
        if not ratio <= 1:
            self.clips.append(clip)
        if not ratio <= self.worst or not self.detail:
            self.worst, self.detail = ratio, detail


@dataclass
class ParityReport:
    """The result of :func:`run_parity`.

    Attributes:
        stages: one report per seam, in the order of processing.
        num_clips: clips compared.
        changed: (clip, torch decision, production decision) where they differ.
        accuracy: (torch, production) share of right decisions, None without labels or for other tasks.
        unreadable: clips that neither path could read, with the reason.
        divergence: (torch, production) mean KL divergence of a model of distributions, on clips of known weights.
        detection: measure -> (torch, production) of a model for event detection, on clips whose events are known.
    """

    stages: list[StageReport]
    num_clips: int
    changed: list[tuple[str, str, str]]
    accuracy: tuple[float, float] | None
    unreadable: list[tuple[str, str]]
    divergence: tuple[float, float] | None = None
    detection: dict[str, tuple[float, float]] | None = None

    @property
    def first_failure(self) -> StageReport | None:
        """The first seam that departs, or None."""
        return next((stage for stage in self.stages if stage.clips), None)

    @property
    def passed(self) -> bool:
        """Whether every seam agrees on every clip, and every clip could be read."""
        return self.first_failure is None and not self.unreadable and self.num_clips > 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        failure = self.first_failure
        return {
            "passed": self.passed,
            "num_clips": self.num_clips,
            "first_failure": failure.stage if failure else None,
            "changed_decisions": [dict(zip(("clip", "torch", "production"), row, strict=True)) for row in self.changed],
            "accuracy": _both(self.accuracy),
            "divergence": _both(self.divergence),
            "detection": None
            if self.detection is None
            else {name: _both((_finite(pair[0]), _finite(pair[1]))) for name, pair in self.detection.items()},
            "unreadable": [dict(zip(("clip", "reason"), row, strict=True)) for row in self.unreadable],
            # JSON has no infinity: a stage that cannot be measured, e.g. for its shape, has no number.
            "stages": [{**vars(stage), "worst": _finite(stage.worst)} for stage in self.stages],
        }

    def __str__(self) -> str:
        """The summary a person reads: a line per seam, then decisions and the verdict."""
        lines = [f"{'stage':<14} {'of limit':>9}  worst clip"]
        for stage in self.stages:
            mark = f"  FAILED on {len(stage.clips)}" if stage.clips else ""
            lines.append(f"{stage.stage:<14} {stage.worst:>9.3f}  {stage.detail}{mark}")
        lines.append(f"{self.num_clips} clips, {len(self.changed)} changed decisions")
        if self.accuracy is not None:
            lines.append(f"accuracy: torch {self.accuracy[0]:.4f}, production {self.accuracy[1]:.4f}")
        if self.divergence is not None:
            lines.append(f"KL divergence: torch {self.divergence[0]:.6f}, production {self.divergence[1]:.6f}")
        lines += [f"{name}: torch {a:.6f}, production {b:.6f}" for name, (a, b) in (self.detection or {}).items()]
        lines += [
            f"  changed: {clip}: torch {torch_says}, production {tf_says}"
            for clip, torch_says, tf_says in self.changed[:10]
        ]
        lines += [f"  unreadable: {clip}: {reason}" for clip, reason in self.unreadable[:10]]
        failure = self.first_failure
        if failure is not None:
            named = ", ".join(failure.clips[:5]) + (", ..." if len(failure.clips) > 5 else "")
            lines.append(f"PARITY FAILED at stage '{failure.stage}' ({failure.detail}) on {named}")
        else:
            lines.append("PARITY PASSED" if self.passed else "PARITY FAILED: nothing to compare, or unreadable clips")
        return "\n".join(lines)


class TorchPath:
    """The research side: checkpoint -> TorchFrontend -> module, with the card's own length policy and activation.

    Of several checkpoints, the mean of their probabilities.
    """

    def __init__(self, checkpoint: str | Path | Sequence[str | Path]) -> None:
        if isinstance(checkpoint, (str, Path)):
            loaded = load_checkpoint(checkpoint)
            model, self.card = loaded.model, loaded.card
        else:
            model, self.card = combine(checkpoint)
        self.spec = self.card.frontend
        self.model = model.eval()
        self.frontend = None if self.spec is None else TorchFrontend(self.spec).eval()

    def outputs(
        self, waveform: NDArray[np.float32] | None, image: ImageSource | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Return the module's outputs by name for the legal segments of ``(num_samples,)`` and, or, a picture."""
        with torch.no_grad():
            heard = np.zeros((1, 0), np.float32) if waveform is None else legal_segments(waveform, self.card)
            seen = None
            if image is not None and self.card.image is not None:
                seen = torch.from_numpy(load_image(image, self.card.image)).repeat(len(heard), 1, 1, 1)
            fed = network_inputs(self.card.inputs, self.frontend, torch.from_numpy(heard), image=seen)
            return {name: value.numpy() for name, value in self.model(**fed).items()}

    def embeddings(
        self, waveform: NDArray[np.float32] | None, image: ImageSource | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Return every embedding by the name of its output, ``(size,)`` each."""
        outputs = self.outputs(waveform, image)
        return {part.name: outputs[part.name].mean(axis=0) for part in self.card.outputs if part.role == "embedding"}

    def predict(self, waveform: NDArray[np.float32] | None, image: ImageSource | None = None) -> Prediction:
        """Return the answer for ``(num_samples,)`` float32 and, or, a picture."""
        events = EventOptions() if self.card.task == "event_detection" else None
        heard = 0 if waveform is None else len(waveform)
        if self.card.length_policy.long == "crop":
            heard = min(heard, self.card.length_policy.max or heard)
        rate = 1 if self.spec is None else self.spec.sample_rate
        return decode(self.card, self.outputs(waveform, image), end=heard / rate, events=events)


def _frontend_of(card: ModelCard) -> FrontendSpec:
    if card.frontend is None:
        raise CardError(f"card {card.name!r} has no front end, so there are no features to compare", field="frontend")
    return card.frontend


def _numpy(value: Any) -> Any:
    return tuple(map(np.asarray, value)) if isinstance(value, tuple) else np.asarray(value)


def compare_stages(
    spec: FrontendSpec,
    waveform: NDArray[np.float32],
    expected: dict[str, Any],
    actual: dict[str, Any],
    *,
    actual_spec: FrontendSpec | None = None,
    limit: FeatureLimit,
) -> list[tuple[str, float, str]]:
    """Return (stage, difference / limit, detail) for every stage of a front end, in order of application.

    Args:
        spec: what the front end should be.
        waveform: ``(batch, num_samples)`` both came from.
        expected, actual: ``stages()`` of the two implementations.
        actual_spec: what ``actual`` was built from, where it may differ.
        limit: limits on the final features, in output units.
    """
    levels = mel_levels(spec, waveform)
    return [
        (
            name,
            *_compare_stage(
                name, spec, actual_spec or spec, levels, _numpy(expected[name]), _numpy(actual[name]), limit
            ),
        )
        for name in STAGES
    ]


def _compare_stage(
    name: str,
    spec: FrontendSpec,
    actual_spec: FrontendSpec,
    levels: Levels,
    expected: Any,
    actual: Any,
    limit: FeatureLimit,
) -> tuple[float, str]:
    if name in SIGNAL_STAGES:
        pairs = list(zip(_tuple(expected), _tuple(actual), strict=False))
        if len(_tuple(expected)) != len(_tuple(actual)) or any(a.shape != b.shape for a, b in pairs):
            return _shape_mismatch(expected, actual)
        return max(_relative(a, b, tolerances.SIGNAL, axis=None) for a, b in pairs)
    if name == "spectrum":
        expected, actual = _on_common_bins(expected, actual, spec, actual_spec)
    if expected.shape != actual.shape:
        return _shape_mismatch(expected, actual)
    if name in POWER_STAGES:
        of_peak = tolerances.POWER if spec.power == 2 else tolerances.MAGNITUDE
        return _relative(expected, actual, of_peak, axis=-1)
    if name in LOG_STAGES:
        gain = spec.log.gain
        return _worst_part(difference_by_level(expected / gain, actual / gain, levels), tolerances.LOG, " nats")
    if name == "features":
        arranged = levels.with_filler(spec).map(ReferenceFrontend(spec).arrange)
        return _worst_part(difference_by_level(expected, actual, arranged), limit, "")
    # Statistics, affine and length, in output units; the mean is left to the features.
    unit = abs(spec.affine.scale) if name == "statistics" and spec.affine is not None else 1.0
    shaped = levels.with_filler(spec) if name == "length" else levels
    unmeant = FeatureLimit(limit.within_60, limit.within_100, math.inf)
    return _worst_part(difference_by_level(expected / unit, actual / unit, shaped), unmeant, "")


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _shape_mismatch(expected: Any, actual: Any) -> tuple[float, str]:
    shapes = [", ".join(str(part.shape) for part in _tuple(value)) for value in (expected, actual)]
    return np.inf, f"shape {shapes[0]} against {shapes[1]}"


def _relative(expected: _Array, actual: _Array, limit: float, axis: int | None) -> tuple[float, str]:
    """Difference relative to the largest value of the array (axis None) or of each frame (axis -1)."""
    peak = np.abs(expected).max(axis=axis, keepdims=True, initial=0.0)
    difference = np.abs(np.asarray(expected, np.float64) - actual)
    worst = float((difference / np.where(peak > 0, peak, 1.0)).max(initial=0.0))
    return (worst / limit if np.isfinite(worst) else np.inf), f"{worst:.1e} of the peak"


def _on_common_bins(
    expected: _Array, actual: _Array, spec: FrontendSpec, actual_spec: FrontendSpec
) -> tuple[_Array, _Array]:
    """A front end computes only the FFT bins its mel matrix uses; keep those both have."""
    ours, theirs = analysis_tables(spec).bins, analysis_tables(actual_spec).bins
    first, last = max(ours.start, theirs.start), min(ours.stop, theirs.stop)
    return expected[..., first - ours.start : last - ours.start], actual[
        ..., first - theirs.start : last - theirs.start
    ]


def _worst_part(difference: FeatureDifference, limit: FeatureLimit, unit: str) -> tuple[float, str]:
    ratios = difference.of_limit(limit)
    worst = max(ratios, key=lambda part: ratios[part])
    return ratios[worst], f"{worst} {getattr(difference, worst):.1e}{unit}"


def run_parity(
    onnx: str | Path | Sequence[str | Path],
    checkpoint: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> ParityReport:
    """Return how far production departs from research on a folder of recordings, from the file to the decision.

    A model that looks at pictures is given those of the column ``image``, of several the middle one. Of a model that
    embeds, the embeddings are compared, and the lists of the ten nearest.

    Args:
        onnx: exported model, or the name of a shipped one; or several, which answer together.
        checkpoint: the ``.safetensors`` it came from; or several, the mean of whose probabilities is compared.
        data: labelled folder (see DESIGN.md section 5); labels that the model does not know are not scored.
        split: keep this split only.
        limit: compare at most this many clips, evenly spaced over the folder.
        progress: show a progress bar on stderr.

    Raises:
        AudioClassifierError: a model or the folder cannot be used.
    """
    research = TorchPath(checkpoint)
    dataset = read_dataset(data)
    dataset = dataset.select(split=split) if split else dataset
    records = list({record.file: record for record in dataset.records}.values())
    if limit is not None and len(records) > limit:
        records = [records[round(i)] for i in np.linspace(0, len(records) - 1, limit)]
    with TFAudioClassifier(onnx, threads=1) as production:
        return _run(research, production, dataset, records, progress)


def _run(
    research: TorchPath, production: TFAudioClassifier, dataset: Dataset, records: Sequence[Record], progress: bool
) -> ParityReport:
    """Compare the files of ``records``, of which ``dataset`` knows all stretches."""
    after = ("events", "measures") if research.card.task == "event_detection" else ()
    scored = ("logits", "probabilities", "decisions")
    if research.card.task == "embedding":
        scored, after = (), ("embeddings", "retrieval")
    hears = () if research.spec is None else ("decode", *STAGES)
    looks = () if research.card.image is None else ("picture",)
    reports = {name: StageReport(name) for name in (*hears, *looks, *scored, *after)}
    rows: list[tuple[str, Prediction, Prediction, Record]] = []
    embedded: list[tuple[str, _Embeddings, _Embeddings]] = []
    unreadable = []
    for record in tqdm(records, desc="parity", unit="clip", disable=not progress):
        clip = str(record.file)
        try:
            waveform = None if research.spec is None else load_audio(record.file, research.spec)
            if looks and record.image is None:
                raise DataError("has no picture; name it in the column 'image'")
            image = record.image if looks else None
            if scored:
                torch_says = research.predict(waveform, image)
            else:
                torch_embeds = research.embeddings(waveform, image)
        except AudioClassifierError as error:
            unreadable.append((clip, str(error)))
            continue
        try:
            for name, ratio, detail in _seams(research, production, record, waveform):
                reports[name].add(clip, ratio, detail)
            if scored:
                tf_says = production.predict(record.file if hears else None, image=image)
                rows.append((clip, torch_says, tf_says, record))
            else:
                embedded.append((clip, torch_embeds, _served_embeddings(production, record)))
        except AudioClassifierError as error:
            next(iter(reports.values())).add(clip, np.inf, f"production refuses it: {error}")
    changed = _score(rows, research.card, reports)
    if embedded:
        _score_embeddings(embedded, reports)
    detection = _detection(rows, research.card, dataset)
    for name, (ours, theirs) in (detection or {}).items():
        apart = 0.0 if math.isnan(ours) and math.isnan(theirs) else abs(ours - theirs)
        reports["measures"].add(name, _ratio(apart, tolerances.DETECTION), f"{name} differs by {apart:.1e}")
    distributed = research.card.task == "label_distribution"
    return ParityReport(
        list(reports.values()),
        len(rows) + len(embedded),
        changed,
        None if distributed or detection is not None else _accuracy(rows, research.card),
        unreadable,
        _divergence(rows, research.card, dataset) if distributed else None,
        detection,
    )


def _seams(
    research: TorchPath, production: TFAudioClassifier, record: Record, waveform: NDArray[np.float32] | None
) -> Iterator[tuple[str, float, str]]:
    """Yield (stage, difference / limit, detail) of one recording for every seam before the network."""
    if waveform is not None and research.spec is not None and research.frontend is not None:
        theirs = _frontend_of(production.card)
        served = load_audio(record.file, theirs)
        same = waveform.shape == served.shape and bool((waveform == served).all())
        detail = "bit-equal" if same else f"{waveform.size} against {served.size} samples"
        yield "decode", 0.0 if same else np.inf, detail
        segments = legal_segments(waveform, research.card)
        yield from compare_stages(
            research.spec,
            segments,
            research.frontend.stages(torch.from_numpy(segments)),
            production.frontend.stages(segments),
            actual_spec=theirs,
            limit=tolerances.paths_limit(research.spec),
        )
    ours, other = research.card.image, production.card.image
    if ours is not None and record.image is not None:
        same = other is not None and np.array_equal(load_image(record.image, ours), load_image(record.image, other))
        yield "picture", 0.0 if same else np.inf, "bit-equal" if same else f"{ours} against {other}"


def _served_embeddings(production: TFAudioClassifier, record: Record) -> _Embeddings:
    """Return every embedding of production by the name of its output, each asked by itself."""
    found = {}
    for output in production.card.outputs:
        if output.role != "embedding":
            continue
        sources = {part.source == "image" for part in production.card.inputs_of([output.name])}
        if sources == {False}:
            found[output.name] = production.embed_audio(record.file)
        elif sources == {True}:
            found[output.name] = production.embed_image(record.image)
        else:
            found[output.name] = production.embed(record.file, image=record.image)
    return found


def _score_embeddings(
    embedded: Sequence[tuple[str, _Embeddings, _Embeddings]], reports: dict[str, StageReport]
) -> None:
    """Compare embeddings, and the lists of the ten nearest that they lead to."""
    names = list(embedded[0][1])
    sides = [
        {name: np.stack([row[place].get(name, np.full(1, np.nan)) for row in embedded]) for name in names}
        for place in (1, 2)
    ]
    for name in names:
        for (clip, _, _), ours, theirs in zip(embedded, sides[0][name], sides[1][name], strict=True):
            if ours.shape != theirs.shape:
                reports["embeddings"].add(clip, np.inf, f"{name}: shape {ours.shape} against {theirs.shape}")
                continue
            apart = 1 - float(cosine_similarity(ours[None], theirs[None])[0, 0])
            reports["embeddings"].add(clip, _ratio(apart, tolerances.COSINE), f"{name}: 1 - cosine {apart:.1e}")
    if reports["embeddings"].clips:
        return
    pairs = [(one, other) for one in names for other in names if one != other] or [(names[0], names[0])]
    for asked, found in pairs:
        tables = [cosine_similarity(side[asked], side[found]) for side in sides]
        for (clip, _, _), ours, theirs in zip(embedded, *tables, strict=True):
            ratio, detail = compare_nearest(ours, theirs)
            reports["retrieval"].add(clip, ratio, f"{asked} to {found}: {detail}")


def compare_nearest(ours: _Array, theirs: _Array, k: int = 10) -> tuple[float, str]:
    """Return (difference / limit, detail) of the lists of the ``k`` nearest that two rows of cosines lead to.

    They may differ in order only where cosines are nearer to each other than twice what the rows differ by: nothing but
    rounding then decides.
    """
    lists = [np.argsort(-row, kind="stable")[:k] for row in (ours, theirs)]
    if np.array_equal(*lists):
        return 0.0, "equal"
    apart = float(np.abs(ours - theirs).max())
    furthest = float(np.abs(ours[lists[0]] - ours[lists[1]]).max())
    return furthest / (2 * apart) if apart else np.inf, f"another order, by cosines {furthest:.1e} apart"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _both(pair: tuple[float | None, float | None] | None) -> dict[str, float | None] | None:
    return None if pair is None else dict(zip(("torch", "production"), pair, strict=True))


def _score(
    rows: list[tuple[str, Prediction, Prediction, Record]], card: ModelCard, reports: dict[str, StageReport]
) -> list[tuple[str, str, str]]:
    """Fill in the seams after the network, and return the changed decisions."""
    changed = []
    logits = [row[1].logits for row in rows if row[1].logits is not None]
    spread = max(1.0, float(np.std(np.stack(logits)))) if logits else 1.0
    for clip, torch_says, tf_says, _ in rows:
        if torch_says.labels != tf_says.labels:
            reports["decisions"].add(clip, np.inf, "the label lists differ")
            continue
        if torch_says.logits is not None and tf_says.logits is not None:
            apart = float(np.abs(torch_says.logits - tf_says.logits).max()) / spread
            reports["logits"].add(clip, _ratio(apart, tolerances.LOGITS), f"{apart:.1e} of max(1, std {spread:.2f})")
        apart = _apart(torch_says.probabilities, tf_says.probabilities)
        if torch_says.frame_probabilities is not None or tf_says.frame_probabilities is not None:
            apart = max(apart, _apart(torch_says.frame_probabilities, tf_says.frame_probabilities))
        reports["probabilities"].add(clip, _ratio(apart, tolerances.PROBABILITIES), f"{apart:.1e}")
        decisions = [_decision(prediction, card) for prediction in (torch_says, tf_says)]
        same = decisions[0] == decisions[1]
        reports["decisions"].add(clip, 0.0 if same else np.inf, "equal" if same else "changed")
        if not same:
            changed.append((clip, ";".join(decisions[0]), ";".join(decisions[1])))
        if "events" in reports:
            ratio, detail, only = _compare_events(torch_says, tf_says, card)
            reports["events"].add(clip, ratio, detail)
            if any(only):
                changed.append((clip, *(", ".join(map(_shown, events)) or "nothing more" for events in only)))
    return changed


def _compare_events(
    torch_says: Prediction, tf_says: Prediction, card: ModelCard
) -> tuple[float, str, tuple[list[Event], list[Event]]]:
    """Return (difference / limit, detail, events that only the one and only the other found) of one clip.

    Events may differ where a score lies within twice the difference of the clip's scores of its threshold: nothing but
    rounding then decides which side it is on.
    """
    found = [prediction.events or () for prediction in (torch_says, tf_says)]
    known = [{(one.label, one.onset, one.offset) for one in events} for events in found]
    only = (
        [one for one in found[0] if (one.label, one.onset, one.offset) not in known[1]],
        [one for one in found[1] if (one.label, one.onset, one.offset) not in known[0]],
    )
    if not any(only):
        return 0.0, "equal", only
    apart = _apart(torch_says.frame_probabilities, tf_says.frame_probabilities)
    ours, theirs = torch_says.frame_probabilities, tf_says.frame_probabilities
    if ours is None or theirs is None or not 0 < apart < math.inf:
        return math.inf, f"{len(only[0])} and {len(only[1])} events differ, by no difference in score", only
    options = EventOptions.of(card)
    lengths = options.median_frames(torch_says.labels, FrameGrid.of(card))
    thresholds = np.array(options.per_class("thresholds", torch_says.labels))[:, None]
    ours, theirs = filter_scores(ours, lengths), filter_scores(theirs, lengths)
    flipped = (ours > thresholds) != (theirs > thresholds)
    furthest = float(np.abs(ours - thresholds)[flipped].max(initial=0.0)) if flipped.any() else math.inf
    return (
        furthest / (2 * apart),
        f"{flipped.sum()} frames differ, at most {furthest:.1e} from their thresholds; scores differ by {apart:.1e}",
        only,
    )


def _shown(event: Event) -> str:
    return f"{event.label} {event.onset:.3f} to {event.offset:.3f} s"


def _apart(one: NDArray[np.float32] | None, other: NDArray[np.float32] | None) -> float:
    if one is None or other is None or one.shape != other.shape:
        return np.inf
    return float(np.abs(one - other).max())


def _ratio(value: float, limit: float) -> float:
    return value / limit if np.isfinite(value) else np.inf


def _decision(prediction: Prediction, card: ModelCard) -> tuple[str, ...]:
    """What a user is told: the best class, or for tasks with several every class above its threshold."""
    if card.task not in ("multi_label", "event_detection"):
        return (prediction.label,)
    thresholds = card.thresholds or {}
    return tuple(
        label
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
        if probability >= thresholds.get(label, 0.5)
    )


def _detection(
    rows: Sequence[tuple[str, Prediction, Prediction, Record]], card: ModelCard, dataset: Dataset
) -> dict[str, tuple[float, float]] | None:
    """Return measure -> (torch, production), or None where no events are known, or some that the model does not."""
    labels = card.labels or ()
    files = {row[3].file for row in rows if row[3].part != "unlabelled"}
    known = replace(dataset, records=tuple(record for record in dataset.records if record.file in files))
    if card.task != "event_detection" or not set(dataset.labels) <= set(labels) or not any(known.events().values()):
        return None
    options, grid, values = EventOptions.of(card), FrameGrid.of(card), []
    for place in (1, 2):
        answers = {}
        for row in rows:
            says: Prediction = row[place]
            if says.frame_probabilities is None:
                return None
            answers[dataset.name_of(row[3])] = Answer(says.frame_probabilities, says.probabilities, says.end)
        values.append(SceneScores.of(known, answers, labels, grid).metrics(options))
    return {name: (values[0][name], values[1][name]) for name in values[0]}


def _divergence(
    rows: Iterable[tuple[str, Prediction, Prediction, Record]], card: ModelCard, dataset: Dataset
) -> tuple[float, float] | None:
    known = set(card.labels or ())
    scored = [row for row in rows if set(row[3].labels) <= known and (row[3].weights or len(row[3].labels) == 1)]
    if not scored or card.labels is None:
        return None
    records = tuple(row[3] for row in scored)
    truth = replace(dataset, records=records, labels=card.labels).distributions()
    by_torch, by_production = (
        float(kl_divergence(truth, np.stack([row[place].probabilities for row in scored])).mean()) for place in (1, 2)
    )
    return by_torch, by_production


def _accuracy(
    rows: Iterable[tuple[str, Prediction, Prediction, Record]], card: ModelCard
) -> tuple[float, float] | None:
    known = set(card.labels or ())
    scored = [row for row in rows if set(row[3].labels) <= known and row[3].labels]
    if card.task == "embedding" or not scored:
        return None
    right = np.array(
        [[set(_decision(says, card)) == set(record.labels) for says in pair] for _, *pair, record in scored]
    )
    return float(right[:, 0].mean()), float(right[:, 1].mean())
