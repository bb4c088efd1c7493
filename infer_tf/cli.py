"""The ``crossfade`` command. Results on standard output, everything else on standard error.

Exit codes: 0 fine, 1 some recordings failed, 2 bad usage or bad input (one line says what), 130 interrupted.
Nothing heavy is imported before the command is known to need it, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from models_zoo.errors import AudioClassifierError, DataError, ModelFileError

if TYPE_CHECKING:
    from infer_tf.batch import Request
    from infer_tf.classifier import TFAudioClassifier
    from models_zoo.cards import ModelCard
    from models_zoo.events import EventOptions
    from models_zoo.prediction import Event, Prediction
    from models_zoo.specs import FrontendSpec

__all__ = ["main"]

_PICTURES = (".png", ".svg", ".pdf")

_SHORTER = {"error": "else error", "zero": "else zeros", "repeat": "else repeated"}
"""What happens to a clip below the shortest, in a word."""


_EVENT_OPTIONS = (
    ("--threshold", "P", "a frame is active where its probability is greater"),
    ("--median-filter", "S", "smooth scores by the running median of S seconds"),
    ("--min-duration", "S", "drop shorter events"),
    ("--merge-gap", "S", "join events of a class with a gap of at most S seconds"),
)

_MOST_DRAWN = 50
"""Cells of a contact sheet; each takes about a tenth of a second."""

_TABLES = (".csv", ".jsonl")
_EVENT_FILES = (".tsv", ".json", ".txt")


class _UsageError(AudioClassifierError, ValueError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: arguments without the program's name, or None for the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except AudioClassifierError as error:
        print(f"crossfade: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("crossfade: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_standard_output()
        return 141
    except OSError as error:  # standard output cannot be written; what works on files raises errors of its own
        try:
            sys.stdout.flush()
        except OSError:
            _drop_standard_output()
        print(f"crossfade: error: cannot read or write: {error.strerror or error}", file=sys.stderr)
        return 2


def _drop_standard_output() -> None:
    """Give Python, which flushes standard output once more at exit, somewhere to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="crossfade", description="Classify recordings with exported models.")
    parser.add_argument("--version", action="version", version=f"crossfade {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    predict = commands.add_parser("predict", help="labels and probabilities of recordings")
    predict.add_argument("model", metavar="MODEL", help="an .onnx file, or the name of a shipped model")
    predict.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="*",
        help="a recording, a video, '-' for standard input, a folder, or a manifest (.csv); of a model that looks at "
        "pictures alone, a picture",
    )
    predict.add_argument(
        "--image", metavar="FILE", help="the picture that belongs to the recording, or, without, alone"
    )
    predict.add_argument(
        "--frames",
        type=_frames,
        default="middle",
        metavar="WHICH",
        help="of a video's ten frames: middle (default), all, or some of 0 to 9 with commas, whose mean answer it is",
    )
    predict.add_argument("--json", action="store_true", help="one JSON object per line, per clip or window")
    predict.add_argument("--top", type=_count, default=5, metavar="K", help="classes shown (default 5)")
    predict.add_argument("--plot", type=_picture, metavar="FILE", help="picture of the spectrogram and the scores")
    predict.add_argument("--window", type=_seconds, metavar="S", help="score sliding windows of S seconds")
    predict.add_argument("--hop", type=_seconds, metavar="S", help="seconds between windows (default: half a window)")
    predict.add_argument(
        "--average", action="store_true", help="one answer per recording: the mean over its windows (with --window)"
    )
    predict.add_argument("--embedding", action="store_true", help="include the embedding in JSON and tables")
    predict.add_argument(
        "-o",
        "--output",
        type=_table,
        metavar="FILE",
        help="write a .csv or .jsonl table, or events: .tsv (DCASE's columns), .json, .txt (Audacity labels)",
    )
    events = predict.add_argument_group(
        "events",
        "of models for event detection; a number for all classes, or LABEL=NUMBER, several times; else the card's",
    )
    for option, metavar, text in _EVENT_OPTIONS:
        events.add_argument(option, type=_per_class, action="append", metavar=metavar, help=text)
    predict.add_argument("--force", action="store_true", help="replace existing outputs")
    _add_runtime(predict)
    _add_members(predict)
    predict.set_defaults(run=_predict)

    evaluate = commands.add_parser("evaluate", help="accuracy and other measures on labelled recordings")
    evaluate.add_argument(
        "model",
        metavar="MODEL",
        nargs="+",
        help="an .onnx file, or the name of a shipped model; of several, or of a folder of them, the mean of their "
        "probabilities is measured",
    )
    evaluate.add_argument("--data", required=True, metavar="DIR", help="class folders, or a folder with metadata.csv")
    evaluate.add_argument("--split", default="test", help="train, validation, test (default) or all")
    evaluate.add_argument(
        "--members",
        action="store_true",
        help="of several models: measure each by itself too, and the mean against the best of them",
    )
    evaluate.add_argument(
        "--fit-weights",
        action="store_true",
        help="of several models: print the --weights that suit these recordings best, and nothing else",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--plot", type=_picture, metavar="FILE", help="picture of the confusion matrix")
    evaluate.add_argument("--force", action="store_true", help="replace existing outputs")
    _add_runtime(evaluate)
    _add_members(evaluate)
    evaluate.set_defaults(run=_evaluate)

    index = commands.add_parser("index", help="make sounds and pictures findable by each other")
    index.add_argument("model", metavar="MODEL", help="a model with an embedding for sound and one for pictures")
    index.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="sounds, pictures, videos; folders of them; folders with metadata.csv, whose labels are kept",
    )
    index.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the index")
    index.add_argument(
        "--split", default="all", help="of folders with metadata.csv: train, validation, test or all (default)"
    )
    index.add_argument("--force", action="store_true", help="replace an existing index")
    _add_runtime(index)
    index.set_defaults(run=_index, plot=None)

    search = commands.add_parser("search", help="find sounds by a picture, and pictures by a sound")
    search.add_argument("index", metavar="INDEX", type=Path, help="made by crossfade index")
    search.add_argument("query", metavar="QUERY", help="a sound or a picture")
    search.add_argument("-k", type=_count, metavar="K", help="how many (default 10, or all there are)")
    search.add_argument(
        "--among", choices=("audio", "image"), help="search these (default: the other kind than QUERY's)"
    )
    search.add_argument("--model", metavar="MODEL", help="the index's model, where it is not at its old place any more")
    search.add_argument("--json", action="store_true", help="print one JSON object")
    search.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="contact sheet of the query and what was found, the first 50 of it",
    )
    search.add_argument("--force", action="store_true", help="replace existing outputs")
    _add_runtime(search)
    search.set_defaults(run=_search)

    info = commands.add_parser("info", help="what a model is, takes and returns, and how it was verified")
    info.add_argument("model", metavar="MODEL", help="an .onnx file, or the name of a shipped or published model")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    models = commands.add_parser("models", help="models that ship, and published ones that can be exported")
    models.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="e.g. 'dymn*'")
    models.add_argument("--json", action="store_true", help="print one JSON object per line")
    models.set_defaults(run=_models)

    export = commands.add_parser("export-frontend", help="a front end as a SavedModel, for TensorFlow alone")
    export.add_argument("source", metavar="MODEL_OR_PRESET", help="a model, or a front end such as 'efficientat'")
    export.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="the SavedModel's folder")
    export.add_argument("--force", action="store_true", help="replace an existing folder")
    export.set_defaults(run=_export_frontend)
    return parser


def _version() -> str:
    from importlib.metadata import version

    return version("crossfade")


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the network (default: one per core)")
    parser.add_argument(
        "--max-seconds", type=_seconds, default=600.0, metavar="S", help="longest recording read whole (default 600)"
    )


def _add_members(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", metavar="MODEL", help="the model that computes the embeddings MODEL takes beside audio"
    )
    parser.add_argument(
        "--weights", type=_weights, metavar="W,W,...", help="of several models' answers, in order (default: equal)"
    )


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected numbers with commas between them") from None


def _frames(text: str) -> str | tuple[int, ...]:
    if text in ("middle", "all"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r:.40}; expected middle, all, or numbers with commas") from None


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r:.40}; expected a whole number, at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected seconds, more than 0")
    return seconds


def _path_with_suffix(text: str, suffixes: Sequence[str]) -> Path:
    if Path(text).suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a file name ending in {' or '.join(suffixes)}")
    return Path(text)


def _picture(text: str) -> Path:
    return _path_with_suffix(text, _PICTURES)


def _table(text: str) -> Path:
    return _path_with_suffix(text, (*_TABLES, *_EVENT_FILES))


def _per_class(text: str) -> tuple[str | None, float]:
    """Return (label, number) of ``LABEL=NUMBER``, or (None, number) of a number for all."""
    label, _, number = text.rpartition("=")
    try:
        return label or None, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r:.60}; expected a number, or LABEL=NUMBER") from None


def _event_options(arguments: argparse.Namespace, labels: Sequence[str]) -> EventOptions | None:
    """Return what the command line says about events, or None where it says nothing."""
    from models_zoo.events import EventOptions

    fields: dict[str, Any] = {}
    for option, field in zip(_EVENT_OPTIONS, EventOptions.model_fields, strict=True):
        given = getattr(arguments, option[0].removeprefix("--").replace("-", "_"))
        if given:
            for_all = dict(given).get(None)
            by_label = {label: number for label, number in given if label is not None}
            fields[field] = by_label if for_all is None else {**dict.fromkeys(labels, for_all), **by_label}
    return EventOptions(**fields) if fields else None


def _classifier(arguments: argparse.Namespace) -> TFAudioClassifier:
    from infer_tf.classifier import TFAudioClassifier

    models = arguments.model
    # One folder stands for the models in it, one in a list for itself.
    model = models[0] if isinstance(models, list) and len(models) == 1 else models
    return TFAudioClassifier(model, **_runtime(arguments), encoder=arguments.encoder, weights=arguments.weights)


def _runtime(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what :func:`_add_runtime` asks for, as TFAudioClassifier takes it."""
    return {name: getattr(arguments, name) for name in ("device", "threads", "max_seconds")}


def _check_outputs(
    arguments: argparse.Namespace, outputs: Sequence[Path | None], inputs: Iterable[str | os.PathLike[str] | None]
) -> None:
    """Refuse, before any work, what could not be written after it, or would replace what is worked on."""
    from models_zoo.files import check_writable

    given = [name for name in inputs if name is not None]
    for output in outputs:
        if output is not None:
            check_writable(output, force=arguments.force)
            _refuse_inputs(output, given)
    if arguments.plot is not None:
        from infer_tf.plot import require_matplotlib

        require_matplotlib()


def _refuse_inputs(output: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    if os.path.exists(output) and any(_same_file(output, name) for name in inputs):
        raise _UsageError(f"{output} is also an input; choose another output")


def _predict(arguments: argparse.Namespace) -> int:
    from infer_tf.batch import Request, find_events, is_collection, list_recordings, predict_files

    for option in ("hop", "average"):
        if getattr(arguments, option) and arguments.window is None:
            raise _UsageError(f"--{option} needs --window")
    request = Request(
        arguments.top,
        arguments.window,
        arguments.hop,
        arguments.average,
        arguments.embedding,
        image=arguments.image,
        frames=arguments.frames,
    )
    if not arguments.inputs and arguments.image is None:
        raise _UsageError("nothing to predict; name a recording, a video, or a picture (--image)")
    if arguments.image is not None and (len(arguments.inputs) > 1 or arguments.output is not None):
        raise _UsageError("--image takes one recording, without -o")
    collections = [name for name in arguments.inputs if is_collection(name)]
    if collections and arguments.output is None:
        raise _UsageError(f"{collections[0]} is a folder or a manifest; add -o FILE.csv, .jsonl or .tsv")
    if arguments.plot is not None and (len(arguments.inputs) > 1 or arguments.output is not None):
        raise _UsageError("--plot takes one recording, without -o")
    if arguments.output is not None and (arguments.json or "-" in arguments.inputs):
        raise _UsageError("-o writes a table of files; leave out --json and '-'")
    given = [*arguments.inputs, arguments.image, arguments.model, arguments.encoder]
    _check_outputs(arguments, [arguments.output, arguments.plot], given)

    if arguments.output is not None:
        recordings = list_recordings(arguments.inputs)
        _refuse_inputs(arguments.output, recordings)
        write = find_events if arguments.output.suffix.lower() in _EVENT_FILES else predict_files
        with _classifier(arguments) as classifier:
            request = replace(request, events=_event_options(arguments, classifier.labels))
            summary = write(classifier, recordings, arguments.output, request, force=arguments.force)
        print(
            f"{summary.total - summary.failed} of {summary.total} recordings predicted, {summary.failed} failed; "
            f"wrote {arguments.output}",
            file=sys.stderr,
        )
        return 1 if summary.failed else 0

    with _classifier(arguments) as classifier:
        request = replace(request, events=_event_options(arguments, classifier.labels))
        if arguments.plot is not None:
            _plot(arguments, classifier, request)
            return 0
        failed = 0
        for name in arguments.inputs or [None]:
            try:
                source = None if name is None else _source(name)
                _print_scores(arguments, classifier, source, name or arguments.image, request)
            except AudioClassifierError as error:
                if len(arguments.inputs) <= 1:
                    raise
                failed += 1
                text = " ".join(str(error).split())
                print(f"crossfade: error: {text if name in text else f'{name}: {text}'}", file=sys.stderr)
        if failed:
            print(f"{failed} of {len(arguments.inputs)} recordings failed", file=sys.stderr)
        return 1 if failed else 0


def _same_file(output: Path, name: str | os.PathLike[str]) -> bool:
    return os.path.exists(output) and os.path.exists(name) and os.path.samefile(output, name)


def _source(name: str) -> Any:
    return sys.stdin.buffer if name == "-" else name


def _plot(arguments: argparse.Namespace, classifier: TFAudioClassifier, request: Request) -> None:
    from infer_tf.batch import hearing_all, scores_of
    from infer_tf.plot import plot_prediction
    from models_zoo.audio import load_audio
    from models_zoo.decoding import legal_segments
    from models_zoo.images import is_picture, read_image
    from models_zoo.video import chosen_frames, is_video, read_video_audio, read_video_frames

    name = arguments.inputs[0] if arguments.inputs else arguments.image
    source = _source(name) if arguments.inputs else None
    frontend = waveform = picture = None
    if classifier.card.frontend is not None and not is_picture(name):
        frontend = classifier.frontend
        if is_video(name):
            waveform = read_video_audio(name, frontend.spec, max_seconds=arguments.max_seconds)
        else:
            source = waveform = load_audio(_source(name), frontend.spec, max_seconds=arguments.max_seconds)
    if classifier.card.image is not None:
        if is_video(name):
            picture = read_video_frames(name, chosen_frames(request.frames)[:1])[0]
        elif request.image is not None or is_picture(name):
            picture = read_image(request.image or name)
    request = hearing_all(classifier, name, request)
    predictions = list(scores_of(classifier, source, request))
    for prediction in predictions:
        _print_prediction(arguments, name, prediction, request)
    if waveform is not None and request.window is None:
        segments = legal_segments(waveform, classifier.card)
        waveform = segments[0] if len(segments) == 1 else waveform
    plot_prediction(
        arguments.plot,
        frontend,
        waveform,
        predictions,
        picture=picture,
        title=f"{Path(name).name}: {classifier.card.name}",
        top=arguments.top,
        force=arguments.force,
    )
    print(f"wrote {arguments.plot}", file=sys.stderr)


def _print_scores(
    arguments: argparse.Namespace, classifier: TFAudioClassifier, source: Any, name: str, request: Request
) -> None:
    from infer_tf.batch import hearing_all, scores_of, with_progress

    request = hearing_all(classifier, source, request)
    answers = scores_of(classifier, source, request)
    if request.window is not None and classifier.card.task == "event_detection":
        answers = with_progress(answers, source)
    for prediction in answers:
        _print_prediction(arguments, name, prediction, request)


def _print_prediction(arguments: argparse.Namespace, name: str, prediction: Prediction, request: Request) -> None:
    if arguments.json:
        _print(json.dumps({"file": name, **prediction.to_dict(request.top)}), flush=request.window is not None)
    elif request.window is not None and not request.average:
        if prediction.events is not None:
            for event in prediction.events:
                _print(f"{name}  {_event_line(event)}", flush=True)
            return
        best = ", ".join(f"{label} {value:.4f}" for label, _, value in prediction.top(request.top))
        print(f"{name}  {prediction.start:9.2f} s to {prediction.end:9.2f} s  {best}", flush=True)
    else:
        print(f"{name}  ({prediction.end:.2f} s)")
        width = max(len(label) for label, _, _ in prediction.top(request.top))
        for label, _, value in prediction.top(request.top):
            print(f"  {label:<{width}}  {value:.4f}  {'#' * round(40 * value)}".rstrip())
        if prediction.events is not None:
            print(f"  events: {len(prediction.events) or 'none'}")
            for event in prediction.events:
                print(f"  {_event_line(event)}")
        if prediction.embedding is not None:
            print(f"  embedding  {' '.join(f'{value:.6g}' for value in prediction.embedding)}")


def _event_line(event: Event) -> str:
    return f"{event.onset:9.3f} s to {event.offset:9.3f} s  {event.label}  {event.probability:.4f}"


def _print(text: str, *, flush: bool) -> None:
    """Print a line that does not run into a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    if flush:
        sys.stdout.flush()


def _evaluate(arguments: argparse.Namespace) -> int:
    from infer_tf.evaluation import best_weights, compare_members, comparison_lines, evaluate, report_lines
    from models_zoo.dataset import read_dataset

    _check_outputs(arguments, [arguments.plot], [*arguments.model, arguments.encoder])
    dataset = read_dataset(arguments.data)
    if arguments.plot is not None:
        _refuse_inputs(arguments.plot, [path for one in dataset.records for path in (one.file, *one.images)])
    chosen = dataset.select(None if arguments.split == "all" else arguments.split)
    with _classifier(arguments) as classifier:
        if (arguments.members or arguments.fit_weights) and len(classifier.paths) < 2:
            asked = "--members compares" if arguments.members else "--fit-weights weighs"
            raise _UsageError(f"{asked} several models with their mean; give two or more, or a folder")
        if arguments.fit_weights:
            weights = best_weights(classifier, chosen, device=arguments.device, threads=arguments.threads)
            print(",".join(f"{weight:.4f}" for weight in weights))
            return 0
        report = evaluate(classifier, chosen)
        comparison = None
        if arguments.members:
            comparison = compare_members(classifier, report, chosen, device=arguments.device, threads=arguments.threads)
    if arguments.plot is not None:
        from infer_tf.plot import plot_confusion

        if report.confusion is None:
            raise DataError("a recording has several labels, so there is no confusion matrix; leave out --plot")
        plot_confusion(
            arguments.plot,
            report.confusion,
            report.labels,
            title=f"{classifier.card.name}, {arguments.split}: accuracy {report.measures['accuracy']:.3f}",
            force=arguments.force,
        )
        print(f"wrote {arguments.plot}", file=sys.stderr)
    if arguments.json:
        data = {"model": classifier.card.name, "split": arguments.split, **report.to_dict()}
        print(json.dumps(data if comparison is None else {**data, "comparison": comparison.to_dict()}))
    else:
        print(f"{classifier.card.name} on {arguments.data} ({arguments.split}): {report.num_clips} recordings")
        print("\n".join(report_lines(report)))
        if comparison is not None:
            print()
            print("\n".join(comparison_lines(comparison)))
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from infer_tf.classifier import TFAudioClassifier
    from infer_tf.index import AudioVisualIndex, list_files

    tables = [Path(folder) / "metadata.csv" for folder in arguments.inputs]
    _check_outputs(arguments, [arguments.output], [*arguments.inputs, *tables, arguments.model])
    files = list_files(arguments.inputs, None if arguments.split == "all" else arguments.split)
    _refuse_inputs(arguments.output, [path for path, _ in files])
    with TFAudioClassifier(arguments.model, **_runtime(arguments)) as classifier:
        index = AudioVisualIndex.build(classifier, files)
        index.save(arguments.output, force=arguments.force)
    kinds = [entry.kind for entry in index.entries]
    print(
        f"entered {kinds.count('audio')} sounds and {kinds.count('image')} pictures of {len(files)} files; wrote "
        f"{arguments.output}",
        file=sys.stderr,
    )
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from infer_tf.index import AudioVisualIndex, kind_of

    _check_outputs(arguments, [arguments.plot], [arguments.query, arguments.index, arguments.model])
    kind = kind_of(arguments.query)
    if kind == "video":
        raise _UsageError(f"{arguments.query} is a video; search by its sound or by one of its pictures, as a file")
    index = AudioVisualIndex.load(arguments.index, arguments.model, **_runtime(arguments))
    with index.classifier as classifier:
        if arguments.plot is not None:
            _refuse_inputs(arguments.plot, [entry.path for entry in index.entries])
        query: dict[str, Any] = {kind: arguments.query}
        k = arguments.k or min(10, index.count(index.searched(kind, arguments.among)))
        matches = index.search(**query, k=k, among=arguments.among)
        if arguments.plot is not None:
            from infer_tf.plot import plot_matches

            drawn = matches[:_MOST_DRAWN]
            plot_matches(arguments.plot, classifier, arguments.query, drawn, force=arguments.force)
            few = f", with the first {len(drawn)} of {len(matches)}" if len(drawn) < len(matches) else ""
            print(f"wrote {arguments.plot}{few}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"query": arguments.query, "matches": [vars(match) for match in matches]}))
        return 0
    print(arguments.query)
    width = max(len(match.label or "") for match in matches)
    for rank, match in enumerate(matches, start=1):
        label = f"{match.label or '':<{width}}  " if width else ""
        print(f"  {rank:>3}  {match.cosine:7.4f}  {label}{match.path}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from infer_tf.classifier import find_model
    from infer_tf.session import OnnxSession
    from models_zoo.cards import CONVOLUTIONS_KEY, VERIFICATION_KEY
    from models_zoo.registry import get_card, list_models, list_shipped

    name = arguments.model
    if not os.path.isfile(name) and name in list_models() and name not in list_shipped():
        return _info_of_card(get_card(name), as_json=arguments.json)
    path = find_model(arguments.model)
    session = OnnxSession(path, threads=1)
    card = session.card
    verification = _verification(session.metadata.get(VERIFICATION_KEY, "null"), path)
    convolutions = session.metadata.get(CONVOLUTIONS_KEY)
    if arguments.json:
        print(
            json.dumps(
                {
                    "file": str(path),
                    "card": card.to_dict(),
                    "legal_lengths": _legal_lengths(card),
                    "inputs": {name: {"dtype": dtype, "axes": axes} for name, (dtype, axes) in session.inputs.items()},
                    "outputs": {
                        name: {"dtype": dtype, "axes": axes} for name, (dtype, axes) in session.outputs.items()
                    },
                    "convolutions": convolutions,
                    "verification": verification,
                }
            )
        )
        return 0
    graph = [
        *((f"input {name}", f"{dtype} {_axes(axes)}") for name, (dtype, axes) in session.inputs.items()),
        *((f"output {name}", f"{dtype} {_axes(axes)}") for name, (dtype, axes) in session.outputs.items()),
    ]
    rows = [("file", str(path)), *_card_rows(card, graph)]
    if convolutions is not None:
        rows.append(("convolutions", convolutions))
    _print_rows([*rows, ("verification", _verification_line(verification))])
    return 0


def _info_of_card(card: ModelCard, *, as_json: bool) -> int:
    """Print what is known of a published model without its weights."""
    if as_json:
        print(json.dumps({"file": None, "card": card.to_dict(), "legal_lengths": _legal_lengths(card)}))
        return 0
    graph = [
        (f"{kind} {part.name}", _axes(part.axes))
        for kind, parts in (("input", card.inputs), ("output", card.outputs))
        for part in parts
    ]
    source = card.checkpoint
    rows = [
        ("file", f"does not ship; in a checkout: python export/pt2onnx.py {card.name} -o {card.name}.onnx"),
        *_card_rows(card, graph),
    ]
    if source is not None:
        rows += [
            ("published", source.url),
            ("sha256", source.sha256 or "not stated; remembered from the first download"),
        ]
    _print_rows(rows)
    return 0


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def _card_rows(card: ModelCard, graph: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        ("model", f"{card.name} ({card.system}, {card.architecture})"),
        ("task", card.task),
        ("labels", _label_line(card)),
        *graph,
        *_frontend_rows(card),
        *_image_rows(card),
        *((name.replace("_", " "), text) for name, text in _length_rows(card)),
        *_event_rows(card),
        ("parameters", "not stated" if card.parameters is None else f"{card.parameters:,}"),
        ("10 s clip", "not stated" if card.macs is None else f"{card.macs:,} multiply-accumulates in the network"),
        *((f"metric {name}", f"{value:g}") for name, value in card.metrics.items()),
        ("licence", card.license or "not stated"),
        ("trained on", card.training_data or "not stated"),
    ]


def _axes(axes: Sequence[int | str | None]) -> str:
    return f"({', '.join(str(axis) for axis in axes)})"


def _label_line(card: ModelCard) -> str:
    if card.labels is None:
        return "none"
    shown = ", ".join(card.labels[:10])
    return f"{len(card.labels)}: {shown}{', ...' if len(card.labels) > 10 else ''}"


def _frontend_rows(card: ModelCard) -> list[tuple[str, str]]:
    spec = card.frontend
    if spec is None:
        return [("front end", "none")]
    preset = _preset_of(spec)
    windows = " + ".join(f"{window.shape} {window.win_length}" for window in spec.windows)
    return [
        (
            "front end",
            f"{preset}: {spec.sample_rate} Hz, {windows}, n_fft {spec.framing.n_fft}, hop {spec.framing.hop_length}",
        ),
        ("mel", f"{spec.mel.n_mels} bands, {spec.mel.f_min:g} to {spec.mel.f_max:g} Hz, {spec.mel.scale}"),
        ("features", f"axes {spec.layout}"),
    ]


def _image_rows(card: ModelCard) -> list[tuple[str, str]]:
    spec = card.image
    if spec is None:
        return []
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    return [
        ("picture", f"short side to {spec.size} ({spec.resample}), centre {spec.size} x {spec.size}"),
        ("normalised", f"red, green, blue in 0 to 1, minus {mean}, by {std}"),
    ]


def _event_rows(card: ModelCard) -> list[tuple[str, str]]:
    if card.task != "event_detection" or card.labels is None or card.frame_output() is None:
        return []
    from models_zoo.events import EventOptions, FrameGrid

    options = EventOptions.of(card)
    numbers = {
        field: sorted({f"{number:g}" for number in options.per_class(field, card.labels)}, key=float)
        for field in ("thresholds", "median_filters")
    }
    return [
        ("frames", f"a score every {FrameGrid.of(card).seconds:g} s"),
        ("thresholds", ", ".join(numbers["thresholds"])),
        ("median filters", ", ".join(f"{number} s" for number in numbers["median_filters"])),
    ]


def _preset_of(spec: FrontendSpec) -> str:
    from models_zoo.presets import get_frontend, list_frontends

    return next((name for name in list_frontends() if get_frontend(name) == spec), "own")


def _legal_lengths(card: ModelCard) -> dict[str, Any]:
    policy = card.length_policy
    if card.frontend is None:
        return {}
    rate = card.sample_rate
    return {
        "sample_rate": rate,
        "min_samples": card.min_samples,
        "min_seconds": card.min_samples / rate,
        "max_samples": policy.max,
        "max_seconds": None if policy.max is None else policy.max / rate,
        "multiple_of": policy.multiple_of,
        "short": policy.short,
        "long": policy.long,
        "uneven": policy.uneven,
    }


def _length_rows(card: ModelCard) -> list[tuple[str, str]]:
    lengths = _legal_lengths(card)
    if not lengths:
        return []
    rows = [
        (
            "shortest_clip",
            f"{lengths['min_samples']} samples ({lengths['min_seconds']:.4f} s); shorter: {lengths['short']}",
        )
    ]
    if lengths["max_samples"] is None:
        rows.append(("longest_clip", "no limit"))
    else:
        rows.append(
            (
                "longest_clip",
                f"{lengths['max_samples']} samples ({lengths['max_seconds']:.4f} s); longer: {lengths['long']}",
            )
        )
    if lengths["multiple_of"] > 1:
        rows.append(("multiple_of", f"{lengths['multiple_of']} samples; others: {lengths['uneven']}"))
    return rows


def _verification(text: str, path: Path) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"the record of verification inside {path} is not valid: {error}; export it again"
        ) from error


def _verification_line(verification: Any) -> str:
    if not isinstance(verification, dict):
        return "none recorded"
    scalars = {key: value for key, value in verification.items() if not isinstance(value, (dict, list))}
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in scalars.items()
    )


def _models(arguments: argparse.Namespace) -> int:
    from models_zoo.registry import get_card, list_models, list_shipped

    shipped = set(list_shipped())
    rows: list[dict[str, Any]] = []
    for name in sorted(list_models(arguments.pattern), key=lambda name: (name not in shipped, name)):
        card = get_card(name)
        rows.append(
            {
                "name": name,
                "shipped": name in shipped,
                "architecture": card.architecture,
                "parameters": card.parameters,
                "macs": card.macs,
                "mAP": card.metrics.get("mAP"),
                "test_accuracy": card.metrics.get("test_accuracy"),
                "frontend": None if card.frontend is None else _preset_of(card.frontend),
                "legal_lengths": _legal_lengths(card),
                "file": None if card.checkpoint is None else card.checkpoint.file,
                "url": None if card.checkpoint is None else card.checkpoint.url,
            }
        )
    if not rows:
        raise DataError(f"no model matches {arguments.pattern!r}; there are {len(list_models())}, see crossfade models")
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
        return 0
    header = ("name", "parameters", "MACs, 10 s", "measured", "front end", "shortest clip", "weights")
    table = [header, *map(_model_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        # Numbers stand right in their column.
        padded = (
            cell.rjust(width) if i in (1, 2) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        print("  ".join(padded).rstrip())
    return 0


def _model_cells(row: dict[str, Any]) -> tuple[str, str, str, str, str, str, str]:
    measured = [f"{key.replace('_', ' ')} {row[key]:.3f}" for key in ("mAP", "test_accuracy") if row[key] is not None]
    lengths = row["legal_lengths"]
    return (
        row["name"],
        "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M",
        "" if row["macs"] is None else f"{row['macs'] / 1e9:.2f} G",
        ", ".join(measured),
        row["frontend"] or "",
        f"{lengths['min_seconds']:.3f} s, {_SHORTER[lengths['short']]}" if lengths else "",
        "ships; load it by name" if row["shipped"] else row["file"] or "",
    )


def _export_frontend(arguments: argparse.Namespace) -> int:
    from models_zoo.errors import CardError
    from models_zoo.files import check_folder_writable, replacing_folder
    from models_zoo.presets import get_frontend, list_frontends

    check_folder_writable(arguments.output, force=arguments.force)
    if any(_same_file(arguments.output, folder) for folder in Path(arguments.source).resolve().parents):
        raise _UsageError(f"{arguments.output} holds {arguments.source}; choose another folder")
    if arguments.source in list_frontends() and not os.path.exists(arguments.source):
        spec = get_frontend(arguments.source)
    else:
        from infer_tf.classifier import find_model
        from infer_tf.session import OnnxSession

        card = OnnxSession(find_model(arguments.source), threads=1).card
        if card.frontend is None:
            raise CardError(f"model {card.name!r} has no front end to export", field="frontend")
        spec = card.frontend
    from infer_tf.backend import claim_tensorflow

    claim_tensorflow()
    from infer_tf.frontend import TFFrontend

    with replacing_folder(arguments.output, force=arguments.force) as partial:
        TFFrontend(spec).save(partial)
        extra = partial / "assets.extra"
        extra.mkdir()
        (extra / "frontend.json").write_text(spec.to_json(indent=2) + "\n", encoding="utf-8")
    print(
        f"wrote {arguments.output}: waveform (batch, num_samples) float32 -> features ({spec.layout})", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
