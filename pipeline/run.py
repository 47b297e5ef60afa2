"""The product, in the order of the paper: load, generate, quantize, write, verify, report."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from graph_tools.containers import Container
from graph_tools.equalization import equalize_channels
from graph_tools.errors import SettingsError, ZsqError
from graph_tools.model import Model, load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.quantizer import Plan
from graph_tools.restore import Restoration, restore_batch_norms
from graph_tools.saving import data_file
from graph_tools.side_file import read_side_file
from pipeline.command_line import command_of
from pipeline.evaluate.datasets import open_dataset
from pipeline.evaluate.placement import Resize
from pipeline.evaluate.task import Evaluation, Measured, open_evaluation
from pipeline.export import Exported, export
from pipeline.fidelity import measure_all
from pipeline.generate import (
    Generated,
    OnStep,
    Quantizer,
    checkpoint_folder,
    default_num_images,
    generate,
    remove_checkpoints,
    with_lanes,
)
from pipeline.generate.input_range import doubt, guess_preprocessing
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.quantize import Quantization, quantize
from pipeline.quantize.ranking import rank_tensors
from pipeline.ranks import ALONE, Ranks
from pipeline.record import Record, metadata, recorded_preprocessing, write_run_json
from pipeline.report import write_report
from pipeline.settings import (
    CheckpointSettings,
    DetectionSettings,
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from pipeline.stopping import Interrupted
from pipeline.target_profiles import TargetProfile, load_profile
from pipeline.target_rules import in_form, not_taken, settings_for, with_batch
from pipeline.verify import verify
from pipeline.verify.accumulators import refuse_overflow
from pipeline.verify.proof import Proof

__all__ = [
    "OnProgress",
    "QuantizeJob",
    "Result",
    "assist",
    "copy_dataset",
    "default_output",
    "doubts_of",
    "evaluate_files",
    "export_file",
    "given_preprocessing",
    "preprocessing_of",
    "quantize_file",
    "quantize_prepared",
    "quantizer_of",
    "restored_from",
    "write_file",
]

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""(stage, done, total, terms)"""

_GRID = 64  # images shown in the report


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """One run of ``zsq quantize``.

    Attributes:
        model: the exported network; ``output`` the file to write.
        images: calibrate with these images instead of generating any.
        data: calibrate with this folder or archive of real images instead.
        bn_from: weights and statistics of the same network, for BatchNormalization that was
            folded away.
        evaluate_data: labelled images; the report then has the accuracy before and after.
        task: what the network does; auto asks ``evaluate_data``.
        detection: how a detector is evaluated.
        target: name of the compiler or chip that the file is for.
        held_out: images to generate with another seed and measure the fidelity on, too.
    """

    model: Path
    output: Path
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    input: InputSettings = field(default_factory=InputSettings)
    generation: GenerateSettings = field(default_factory=GenerateSettings)
    quantization: QuantizeSettings = field(default_factory=QuantizeSettings)
    verification: VerifySettings = field(default_factory=VerifySettings)
    images: Path | None = None
    data: Path | None = None
    bn_from: Path | None = None
    evaluate_data: Path | None = None
    task: Literal["auto", "classification", "detection"] = "auto"
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    threads: int = 0
    target: str = "onnxruntime"
    held_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind.

    Attributes:
        output: the quantized file; ``folder`` holds images, plan and report beside it.
        report: the report as plain data.
        proof: of the written file.
    """

    output: Path
    folder: Path
    report: dict[str, Any]
    proof: Proof


def default_output(model: Path, settings: QuantizeSettings) -> Path:
    """``model.w8a8.onnx`` beside ``model.onnx``; ``model.wmixeda8.onnx`` with a target size."""
    weights = "mixed" if settings.target_size else settings.weights
    return model.with_name(f"{model.stem}.w{weights}a{settings.activations}.onnx")


def quantize_file(
    job: QuantizeJob, *, on_progress: OnProgress | None = None, ranks: Ranks = ALONE
) -> Result:
    """Quantize an exported network without data, prove the result and report on it.

    Args:
        job: what to do.
        on_progress: called as (stage, done, total, terms).
        ranks: the processes of the run; this one is the first, the others call `assist`.

    Returns:
        Where the results are. The proof may have failed; the file is written all the same.

    Raises:
        ZsqError: bad input; nothing is written then.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    if job.output.resolve() == job.model.resolve():
        raise SettingsError("the output is the input", where=str(job.output))
    command = command_of(job)
    profile = load_profile(job.target)
    lanes = with_lanes(job.generation, ranks)
    job = replace(job, quantization=settings_for(profile, job.quantization), generation=lanes)
    evaluation = None
    if job.evaluate_data is not None:
        evaluation = open_evaluation(
            job.evaluate_data, job.task, job.detection, job.input.resize
        )
    if job.input.resize is None and "detection" in (job.task, evaluation and evaluation.task):
        job = replace(job, input=replace(job.input, resize="stretch"))
    progress = on_progress or (lambda stage, done, total, terms: None)
    clock = _Clock()
    with _resumable(job.output), _output_folder(job.output) as work:
        with clock("load"):
            model, restoration = load_network(job)
        with clock("generate"):
            images, preprocessing, generated = _calibration_images(
                job, model, work, progress, ranks
            )
        with clock("quantize"):
            quantization = quantize_prepared(
                model,
                images,
                job.quantization,
                seed=job.generation.seed,
                on_step=lambda done, total, terms: progress("quantize", done, total, terms),
            )
            network = quantization.model
        with clock("write"):
            written = work / job.output.name
            properties = metadata(model, job, preprocessing, generated)
            write_file(
                quantization,
                written,
                profile,
                container=job.quantization.container,
                metadata=properties,
            )
            quantization.plan.save(work / "plan.json")
        with clock("verify"):
            proof = verify(
                written,
                images,
                job.verification,
                on_step=lambda done, total, terms: progress("verify", done, total, terms),
            )
        with clock("evaluate"):
            accuracies = _accuracies(job, model, written, preprocessing, evaluation, progress)
        with clock("rank"):
            ranking = rank_tensors(
                quantization,
                images,
                correct_biases=job.quantization.bias_correction != "none",
            )
        shown = preprocessing if generated is None else generated.preprocessing
        with clock("fidelity"):
            fidelity = measure_all(
                network,
                written,
                images,
                shown,
                held_out=_held_out(job, model, work, preprocessing, progress),
                seed=job.generation.seed,
                threads=job.threads,
            )
        with clock("compare"):
            record = Record(
                job=job,
                model=model,
                restoration=restoration,
                network=network,
                written=written,
                images=images,
                preprocessing=preprocessing,
                generated=generated,
                quantization=quantization,
                proof=proof,
                accuracies=accuracies,
                command=command,
                ranking=ranking,
                fidelity=fidelity,
                target_warnings=tuple(
                    not_taken(profile, network, tuple(quantization.plan.absorbed))
                ),
                input_warnings=()
                if generated is not None  # it says so itself
                else doubts_of(model, preprocessing, seed=job.generation.seed),
            )
            report = record.to_dict(clock.seconds)
        pictures = shown.invert(images.load(_GRID), model.input.layout)
        write_report(work, report, pictures)
        write_run_json(work / "run.json", report)
        folder = _publish(work, written, job.output)
        remove_checkpoints(job.output)
    return Result(output=job.output, folder=folder, report=report, proof=proof)


def assist(job: QuantizeJob, ranks: Ranks) -> None:
    """Do another process's share of making the images for `quantize_file`."""
    if job.images is not None or job.data is not None:
        return
    if job.threads:
        torch.set_num_threads(job.threads)
    model, _ = load_network(job)
    with ranks.own_path(job.output) as output:
        generate(
            model,
            job.generation,
            output.with_name("images.npz"),
            preprocessing=preprocessing_of(model, job.input, seed=job.generation.seed),
            checkpoints=job.checkpoints,
            output=output,
            ranks=ranks,
        )


def load_network(job: QuantizeJob) -> tuple[Model, Restoration | None]:
    """Load the model of a job, with the BatchNormalization that a side file gives back."""
    model = load(
        job.model,
        input_shape=job.input.shape(),
        layout=job.input.known_layout(),
        inputs=job.input.arrays(),
    )
    restoration = restored_from(job.bn_from, model, job.input)
    return (model if restoration is None else restoration.model), restoration


def write_file(
    quantization: Quantization,
    path: Path,
    profile: TargetProfile,
    *,
    container: Container,
    metadata: Mapping[str, str],
) -> None:
    """Write a quantized network in the form that a target wants.

    Raises:
        IntegerOverflowError: a layer whose 32-bit sums can overflow.
        ZsqError: the file cannot be written.
    """
    proto = write_qdq(
        with_batch(profile, quantization.model),
        quantization.plan,
        metadata=metadata,
        container=container,
    )
    proto = in_form(profile, proto)
    refuse_overflow(QuantizedGraph(proto))
    save(proto, path)


def restored_from(
    bn_from: Path | None, model: Model, settings: InputSettings
) -> Restoration | None:
    """Put BatchNormalization back with the statistics of a side file; None without one."""
    if bn_from is None:
        return None
    side = read_side_file(bn_from, input_shape=settings.shape())
    restoration = restore_batch_norms(model, side)
    logger.info("%s", restoration.model.notes[-1])
    return restoration


def given_preprocessing(settings: InputSettings) -> Preprocessing | None:
    """The normalization that the user gave, or None."""
    mean, std, ends = settings.numbers("mean"), settings.numbers("std"), settings.ends()
    if ends is not None:
        return Preprocessing.of_range(*ends, channels=settings.channels or "rgb")
    if not mean:
        return None
    return Preprocessing(mean=mean, std=std, channels=settings.channels or "rgb")


def doubts_of(model: Model, preprocessing: Preprocessing, *, seed: int = 0) -> tuple[str, ...]:
    """What in the network speaks against a normalization that the user gave."""
    found = doubt(model, preprocessing, seed=seed) if preprocessing.source == "given" else None
    return () if found is None else (found.text,)


def preprocessing_of(model: Model, settings: InputSettings, *, seed: int = 0) -> Preprocessing:
    """The normalization given, else the one the file states, else the best guess."""
    given = given_preprocessing(settings)
    return given or guess_preprocessing(model, channels=settings.channels, seed=seed)


def copy_dataset(
    data: Path,
    model: Model,
    preprocessing: Preprocessing,
    path: Path,
    *,
    count: int,
    seed: int,
    resize: Resize = "crop",
) -> ImageSet:
    """Write ``count`` images of a folder or archive, drawn at random, as calibration images."""
    dataset = open_dataset(data)
    count = min(count, dataset.count)
    with ImageWriter(path, count=count, shape=model.input.shape) as writer:
        for images, _ in dataset.batches(
            model.input, preprocessing, 64, limit=count, seed=seed, resize=resize
        ):
            writer.append(images)
    return open_images(path, shape=model.input.shape)


def quantizer_of(
    model: Model, settings: QuantizeSettings | None = None, *, seed: int = 0
) -> Quantizer:
    """Return what quantizes a network for methods of generation that look at one.

    Args:
        model: the network.
        settings: those that the images are for; if they are not known, 4 bits and blocks
            reconstructed.
        seed: of the images drawn while roundings are learned.
    """
    chosen = settings or QuantizeSettings(weights=4, activations=4, rounding="brecq")

    def decide(images: ImageSet) -> tuple[Model, Plan]:
        quantization = quantize_prepared(model, images, chosen, seed=seed)
        return quantization.model, quantization.plan

    return decide


def quantize_prepared(
    model: Model,
    images: ImageSet,
    settings: QuantizeSettings,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> Quantization:
    """Prepare a loaded network and choose its quantizers."""
    network = prepare_for_quantization(model)
    if settings.equalization:
        network = equalize_channels(network)
    return quantize(network, images, settings, seed=seed, on_step=on_step)


def export_file(
    path: Path,
    target: str,
    output: Path,
    *,
    images: Path | None = None,
    float_model: Path | None = None,
    timeout: float = 1800.0,
) -> Exported:
    """Write a quantized file in the dialect of a compiler, and run its converter.

    Args:
        path: the file.
        target: name of the target.
        output: the folder to write.
        images: for calibration: images; by default those beside the file.
        float_model: for calibration: the network in float; by default the one beside the file.
        timeout: seconds that a converter gets.

    Raises:
        ZsqError: the target cannot take the file; nothing is written then.
    """
    beside = path.with_suffix("") / "images.npz"
    chosen = images or (beside if beside.is_file() else None)
    return export(
        path,
        load_profile(target),
        output,
        images=open_images(chosen) if target == "calibration" and chosen else None,
        float_model=float_model,
        timeout=timeout,
    )


def evaluate_files(
    models: Sequence[Path],
    data: Path,
    settings: InputSettings,
    *,
    task: Literal["auto", "classification", "detection"] = "auto",
    detection: DetectionSettings | None = None,
    threads: int = 0,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[tuple[Measured, ...], Preprocessing]:
    """Accuracy of models on labelled images.

    Args:
        models: float or quantized files.
        data: folder, zip or npz.
        settings: the normalization; if it is not given, that in a quantized file's metadata is
            taken, else it is guessed from the first model.
        task: what the models do; auto asks the data.
        detection: how a detector's outputs become boxes.
        threads: onnxruntime threads.
        limit: use only this many images, drawn at random.
        on_progress: called as (stage, done, total, terms).

    Returns:
        One accuracy a model, and the normalization used.
    """
    progress = on_progress or (lambda stage, done, total, terms: None)
    evaluation = open_evaluation(data, task, detection, settings.resize)
    preprocessing = given_preprocessing(settings)
    model_input = None
    if preprocessing is None:
        preprocessing = next(filter(None, map(recorded_preprocessing, models)), None)
    if preprocessing is None or settings.input_shape or settings.layout != "auto":
        model = load(
            models[0],
            input_shape=settings.shape(),
            layout=settings.known_layout(),
            inputs=settings.arrays(),
        )
        model_input = model.input
        preprocessing = preprocessing or preprocessing_of(model, settings)
    accuracies = evaluation.run(
        models,
        preprocessing,
        threads=threads,
        limit=limit,
        model_input=model_input,
        fixed=settings.arrays(),
        on_step=lambda done, total, terms: progress("evaluate", done, total, terms),
    )
    return accuracies, preprocessing


def _calibration_images(
    job: QuantizeJob, model: Model, work: Path, progress: OnProgress, ranks: Ranks
) -> tuple[ImageSet, Preprocessing, Generated | None]:
    preprocessing = preprocessing_of(model, job.input, seed=job.generation.seed)
    path = work / "images.npz"
    if job.images is not None and job.data is not None:
        raise SettingsError("--images and --data exclude each other", hint="give one of them")
    if job.images is None and job.data is None:
        generated = generate(
            model,
            job.generation,
            path,
            preprocessing=preprocessing,
            quantizer=quantizer_of(model, job.quantization, seed=job.generation.seed),
            on_step=lambda done, total, terms: progress("generate", done, total, terms),
            checkpoints=job.checkpoints,
            output=job.output,
            purpose=asdict(job.quantization) if job.generation.method == "sadag" else None,
            ranks=ranks,
        )
        return generated.images, preprocessing, generated
    if job.data is not None:
        images = copy_dataset(
            job.data,
            model,
            preprocessing,
            path,
            count=job.generation.num_images
            or default_num_images(model.input.height, model.input.width),
            seed=job.generation.seed,
            resize=job.input.resize or "crop",
        )
        return images, preprocessing, None
    assert job.images is not None
    images = open_images(job.images, shape=model.input.shape)
    shutil.copyfile(job.images, work / f"images{job.images.suffix}")
    return images, preprocessing, None


def _held_out(
    job: QuantizeJob,
    model: Model,
    work: Path,
    preprocessing: Preprocessing,
    progress: OnProgress,
) -> ImageSet | None:
    """Images by the seed behind the run's own, that no quantizer was calibrated with."""
    if not job.held_out:
        return None
    settings = replace(
        job.generation, num_images=job.held_out, seed=(job.generation.seed + 1) % 2**63
    )
    return generate(
        model,
        settings,
        work / "held_out.npz",
        preprocessing=preprocessing,
        quantizer=quantizer_of(model, job.quantization, seed=settings.seed),
        on_step=lambda done, total, terms: progress("held-out", done, total, terms),
    ).images


def _accuracies(
    job: QuantizeJob,
    model: Model,
    written: Path,
    preprocessing: Preprocessing,
    evaluation: Evaluation | None,
    progress: OnProgress,
) -> tuple[Measured, ...]:
    if evaluation is None:
        return ()
    return evaluation.run(
        [job.model, written],
        preprocessing,
        threads=job.threads,
        model_input=model.input,
        fixed=job.input.arrays(),
        on_step=lambda done, total, terms: progress("evaluate", done, total, terms),
    )


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        logger.info("%s: %.1f s", stage, self.seconds[stage])


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Say how to go on when the block is interrupted behind the making of images."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted) or not checkpoint_folder(output).is_dir():
            raise
        raise Interrupted("checkpoints are kept; --resume goes on from the last one") from stop


@contextmanager
def _output_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output``, removed at the end whatever happens."""
    if output.suffix != ".onnx":
        raise SettingsError("the output is not named *.onnx", where=str(output))
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{output.stem}.", dir=output.parent))
    except OSError as error:
        raise ZsqError(
            f"cannot write there: {error.strerror or error}",
            where=str(output),
            hint="choose another place with -o",
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, written: Path, output: Path) -> Path:
    """Move the results to their names: first the folder, last the model."""
    folder, data = output.with_suffix(""), data_file(written)
    try:
        folder.mkdir(exist_ok=True)
        for item in sorted(work.iterdir()):
            if item not in (written, data):
                item.replace(folder / item.name)
        if data.is_file():
            data.replace(data_file(output))
        written.replace(output)
    except OSError as error:
        raise ZsqError(
            f"cannot write the results: {error.strerror or error}", where=str(folder)
        ) from error
    return folder
