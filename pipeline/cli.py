"""The ``zsq`` command: the only module that prints.

Exit codes: 0 done; 1 a proof failed; 2 bad usage or bad input, one line on stderr; 3 internal
error; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from graph_tools.errors import SettingsError, ZsqError
from pipeline.config import from_values, read_values, repeatable_flags, to_toml
from pipeline.crash import run_guarded
from pipeline.settings import (
    CheckpointSettings,
    DetectionSettings,
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    SweepGrid,
    VerifySettings,
)
from pipeline.stopping import Interrupted, terminable
from pipeline.torchrun import started_rank
from pipeline.usage import overview, usage_error

if TYPE_CHECKING:
    from graph_tools.model import Model
    from pipeline.comparing import Comparison
    from pipeline.sweep import Sweep as Swept
    from pipeline.target_profiles import TargetProfile
    from pipeline.verify.rows import Agreement

__all__ = ["main"]

_ABSENT = Path()  # stands for a path that --dump-config was not given
_OUTPUT = tyro.conf.arg(aliases=["-o"], metavar="PATH")
_stderr = Console(stderr=True, highlight=False)
_stdout = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """How the command talks."""

    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr."""
    quiet: bool = False
    """No progress and no tables."""
    threads: int = 0
    """Threads of torch and onnxruntime; 0 lets them choose."""
    debug: bool = False
    """Show a traceback with errors, and the log."""
    config: Path | None = None
    """Take settings from this TOML file; flags win over it."""
    dump_config: bool = False
    """Print the settings as a file for --config, and do nothing else."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a model holds: input, operators, BatchNormalization, what is in the way."""

    model: tyro.conf.Positional[Path]
    """Exported ONNX file."""
    input: InputSettings = field(default_factory=InputSettings)
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Load, find, report."""
        from graph_tools.integer_tail import find_integer_tail
        from graph_tools.prepare import prepare_for_quantization
        from graph_tools.torch_graph import TorchGraph
        from pipeline.record import describe_model

        model = _load(self.model, self.input)
        TorchGraph(model.proto, outputs=find_integer_tail(model.proto).ends)
        facts = describe_model(model)
        facts["prepared"] = list(prepare_for_quantization(model).notes[len(model.notes) :])
        if not _silent(self.common):
            _print_model(facts)
        return 0, facts


@dataclass(frozen=True, kw_only=True)
class Expose:
    """Write a model whose BatchNormalization inputs are outputs, too."""

    model: tyro.conf.Positional[Path]
    """Exported ONNX file."""
    output: Annotated[Path, _OUTPUT]
    """File to write."""
    input: InputSettings = field(default_factory=InputSettings)
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Find the sites and write."""
        from graph_tools.batchnorm import expose_inputs, find_batch_norms
        from graph_tools.errors import NoBatchNormError
        from graph_tools.model import save

        model = _load(self.model, self.input)
        sites = find_batch_norms(model)
        if not sites:
            raise NoBatchNormError("no BatchNormalization to expose", where=str(self.model))
        save(expose_inputs(model, sites).proto, self.output)
        if not _silent(self.common):
            _stdout.print(f"{len(sites)} BatchNormalization inputs exposed in {self.output}")
        return 0, {"output": str(self.output), "tensors": [site.tensor for site in sites]}


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make calibration images from the model alone."""

    model: tyro.conf.Positional[Path]
    """Exported ONNX file."""
    output: Annotated[Path, _OUTPUT]
    """Images to write (.npz, array "images", float32 in the model's own layout)."""
    bn_from: Path | None = None
    """Put folded BatchNormalization back with the statistics of this file: a state_dict (.pt, .pth,
    .bin), .safetensors, or an .onnx of the same network that kept them."""
    generation: GenerateSettings = field(default_factory=GenerateSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    input: InputSettings = field(default_factory=InputSettings)
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Generate into the file."""
        import torch

        from pipeline.generate import generate
        from pipeline.ranks import join_ranks
        from pipeline.record import describe_generation, describe_restoration
        from pipeline.run import preprocessing_of, quantizer_of, restored_from

        if started_rank() == 0:
            _check_output(self.output, ".npz")
        if self.common.threads:
            torch.set_num_threads(self.common.threads)
        model = _load(self.model, self.input)
        restoration = restored_from(self.bn_from, model, self.input)
        if restoration is not None:
            model = restoration.model
        preprocessing = preprocessing_of(model, self.input, seed=self.generation.seed)
        with (
            join_ranks(self.generation.device) as ranks,
            ranks.own_path(self.output) as output,
            _progress(self.common) as progress,
        ):
            generated = generate(
                model,
                self.generation,
                output,
                preprocessing=preprocessing,
                quantizer=quantizer_of(model, seed=self.generation.seed),
                on_step=lambda done, total, terms: progress("generate", done, total, terms),
                checkpoints=self.checkpoints,
                ranks=ranks,
            )
            if ranks.rank:
                return 0, {}
        facts = describe_generation(generated, self.generation, model)
        facts["output"] = str(self.output)
        facts["preprocessing"] = generated.preprocessing.to_dict()
        if restoration is not None and self.bn_from is not None:
            facts["restoration"] = describe_restoration(restoration, self.bn_from)
        _warn(self.common, facts["warnings"])
        if not _silent(self.common):
            _print_restoration(facts.get("restoration"))
            _print_generation(facts)
        return 0, facts


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize a model to power-of-two integers, without data, and prove the result."""

    model: tyro.conf.Positional[Path]
    """Exported ONNX file."""
    output: Annotated[Path | None, _OUTPUT] = None
    """File to write; by default MODEL.w8a8.onnx beside the model. Images, plan and report go to
    a folder of that name."""
    images: Path | None = None
    """Calibrate with these images (.npz or .npy, as zsq generate writes them)."""
    data: Path | None = None
    """Calibrate with real images: a folder or archive."""
    bn_from: Path | None = None
    """Put folded BatchNormalization back with the statistics of this file: a state_dict (.pt, .pth,
    .bin), .safetensors, or an .onnx of the same network that kept them."""
    evaluate: Path | None = None
    """Labelled images: the report then has the accuracy before and after."""
    task: Literal["auto", "classification", "detection"] = "auto"
    """What the model does; auto takes detection where --evaluate has boxes."""
    held_out: int = 0
    """Make so many more images with another seed, and measure the fidelity on them, too."""
    verify_images: int = 500
    """Most images that the proof runs on."""
    target: str = "onnxruntime"
    """Compiler or chip that the file is for: its rules choose what else would be chosen by flags
    (README, Targets)."""
    interpreter_images: int | None = None
    """How many of them the integer interpreter runs, too, in whole batches; 0 for none. By default
    64 of up to 147x147 pixels, fewer beyond."""
    quantization: QuantizeSettings = field(default_factory=QuantizeSettings)
    generation: GenerateSettings = field(default_factory=GenerateSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    input: InputSettings = field(default_factory=InputSettings)
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """The whole way."""
        from pipeline.ranks import join_ranks
        from pipeline.run import QuantizeJob, assist, default_output, quantize_file
        from pipeline.target_profiles import load_profile

        if self.held_out < 0:
            raise SettingsError(f"{self.held_out} is not 0 or more", where="--held-out")
        job = QuantizeJob(
            model=self.model,
            output=self.output or default_output(self.model, self.quantization),
            images=self.images,
            data=self.data,
            bn_from=self.bn_from,
            evaluate_data=self.evaluate,
            task=self.task,
            detection=self.detection,
            input=self.input,
            generation=self.generation,
            checkpoints=self.checkpoints,
            quantization=self.quantization,
            verification=VerifySettings(
                max_images=self.verify_images,
                interpreter_images=self.interpreter_images,
                threads=self.common.threads,
            ),
            threads=self.common.threads,
            target=self.target,
            held_out=self.held_out,
        )
        with join_ranks(self.generation.device) as ranks, _progress(self.common) as progress:
            if ranks.rank:
                assist(job, ranks)
                return 0, {}
            result = quantize_file(job, on_progress=progress, ranks=ranks)
        _warn(self.common, (result.report["generation"] or {}).get("warnings", []))
        if not _silent(self.common):
            _print_restoration(result.report["restoration"])
            _print_result(result.report)
            if note := load_profile(self.target).note:
                _stdout.print(f"target {self.target}: {note}", markup=False)
            _stdout.print(
                f"\nmodel   {result.output}\nreport  {result.folder / 'report.html'}"
            )
        return 0 if result.proof.passed else 1, result.report


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove a quantized file: onnxruntime, optimized or not, and integers agree bit by bit."""

    model: tyro.conf.Positional[Path]
    """Quantized ONNX file."""
    images: Path | None = None
    """Images to run; by default those beside the model, else Gaussian noise."""
    max_images: int = 500
    """Most images to run."""
    targets: str = ""
    """Compilers that the file is run on, too, and compared with the integer interpreter: all, or
    names with commas between them (zsq targets list)."""
    timeout: float = 900.0
    """Seconds that a compiler gets to compile and run the file."""
    interpreter_images: int | None = None
    """How many of them the integer interpreter runs, too, in whole batches; 0 for none. By default
    64 of up to 147x147 pixels, fewer beyond."""
    seed: int = 0
    """Seed of the noise."""
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Run and compare."""
        from pipeline.proving import verify_file
        from pipeline.report_targets import add_targets

        settings = VerifySettings(
            max_images=self.max_images,
            interpreter_images=self.interpreter_images,
            threads=self.common.threads,
            timeout=self.timeout,
        )
        with _progress(self.common) as progress:
            proof, agreement = verify_file(
                self.model,
                self.images,
                settings,
                targets=self.targets,
                seed=self.seed,
                on_progress=progress,
            )
        facts = proof.to_dict()
        if not _silent(self.common):
            for line in proof.summary_lines():
                _stdout.print(line)
        if agreement is None:
            return 0 if proof.passed else 1, facts
        facts["targets"] = agreement.to_dict()
        report = add_targets(self.model, agreement)
        if not _silent(self.common):
            _print_agreement(agreement)
            if report is not None:
                _stdout.print(f"report  {report}", markup=False)
        return 0 if proof.passed and agreement.passed else 1, facts


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a quantized file in the dialect of a compiler, and run its converter."""

    model: tyro.conf.Positional[Path]
    """Quantized ONNX file."""
    target: Literal["calibration", "imx500", "qonnx"]
    """imx500: Sony's converter for the sensor; qonnx: FINN and hls4ml; calibration: what tools
    with a quantizer of their own want."""
    output: Annotated[Path, _OUTPUT]
    """Folder to write."""
    images: Path | None = None
    """With calibration: the images; by default those beside the model."""
    float_model: Path | None = None
    """With calibration: the network in float; by default the one beside the model."""
    timeout: float = 1800.0
    """Seconds that a converter gets."""
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Translate and convert."""
        from pipeline.run import export_file

        exported = export_file(
            self.model,
            self.target,
            self.output,
            images=self.images,
            float_model=self.float_model,
            timeout=self.timeout,
        )
        if not _silent(self.common):
            for line in exported.lines:
                _stdout.print(line, markup=False)
            _stdout.print(f"\nfolder  {exported.folder}", markup=False)
        return 0, {
            "target": self.target,
            "folder": str(exported.folder),
            "files": list(exported.files),
            **exported.facts,
        }


@dataclass(frozen=True, kw_only=True)
class Targets:
    """List the compilers and chips that files are for, or install their compilers."""

    action: tyro.conf.Positional[Literal["list", "install"]]
    """list: name, title, version; install: make the environments of the named ones."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Targets; for list, none means all."""
    force: bool = False
    """Make the environment anew if there is one."""
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """List or install."""
        from pipeline.environments import environments_folder, install_environment
        from pipeline.target_profiles import load_profile, profile_names

        if self.action == "install" and not self.names:
            raise SettingsError("names no target", where="install", hint="zsq targets list")
        profiles = [load_profile(name) for name in self.names or profile_names()]
        if self.action == "install":
            for profile in profiles:
                with _status(self.common, profile.name) as on_line:
                    made = install_environment(profile, force=self.force, on_line=on_line)
                if not _silent(self.common):
                    _stdout.print(
                        f"{profile.name} {made.version}: {made.folder}", markup=False
                    )
        facts = [_describe_target(profile) for profile in profiles]
        if self.action == "list" and not _silent(self.common):
            _print_targets(facts)
        return 0, {"folder": str(environments_folder()), "targets": facts}


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the accuracy of models on labelled images, in onnxruntime."""

    models: tyro.conf.Positional[tuple[Path, ...]]
    """ONNX files, float or quantized."""
    data: Path
    """Folder, zip or npz; classes by folder name or by labels.csv (file,label), boxes in YOLO's
    or COCO's format."""
    task: Literal["auto", "classification", "detection"] = "auto"
    """What the models do; auto takes detection where the data have boxes."""
    limit: int = 0
    """Use only this many images, drawn at random; 0 uses all."""
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    input: InputSettings = field(default_factory=InputSettings)
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Evaluate in the order given."""
        from pipeline.evaluate.classification import Accuracy
        from pipeline.run import evaluate_files

        if not self.models:
            raise SettingsError("no model given", where="evaluate")
        with _progress(self.common) as progress:
            accuracies, preprocessing = evaluate_files(
                self.models,
                self.data,
                self.input,
                task=self.task,
                detection=self.detection,
                threads=self.common.threads,
                limit=self.limit or None,
                on_progress=progress,
            )
        classes = isinstance(accuracies[0], Accuracy)
        rows = [accuracy.to_dict() for accuracy in accuracies]
        facts = {
            "task": "classification" if classes else "detection",
            "data": str(self.data),
            "preprocessing": preprocessing.to_dict(),
            "models": rows,
        }
        if not _silent(self.common):
            _stdout.print(f"normalization: {_words(preprocessing.to_dict())}", markup=False)
            _print_accuracies(rows)
        return 0, facts


@dataclass(frozen=True, kw_only=True)
class View:
    """Open the float and the quantized graph side by side, in netron, and the report."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """A float and a quantized file; of a quantized one alone its report names the other."""
    no_browser: bool = False
    """Only print the addresses."""
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Serve until Ctrl-C."""
        import time
        import webbrowser

        from pipeline.view import find_shown, open_viewer

        shown = find_shown(self.files)
        with contextlib.suppress(KeyboardInterrupt), open_viewer(shown) as viewer:
            if self.common.json:
                sys.stdout.write(json.dumps(dict(viewer.addresses)) + "\n")
                sys.stdout.flush()
            elif not self.common.quiet:
                for what, address in viewer.addresses:
                    _stdout.print(f"{what:<10}{address}", markup=False)
                _stdout.print("Ctrl-C ends it")
            if not self.no_browser:
                webbrowser.open(viewer.start)
            while True:
                time.sleep(3600)
        return 0, {}


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare two models tensor by tensor on the same images: SQNR, the worst marked."""

    first: tyro.conf.Positional[Path]
    """The reference, float or quantized."""
    second: tyro.conf.Positional[Path]
    """The other model, float or quantized."""
    images: Path | None = None
    """Images to run (.npz or .npy, as zsq generate writes them); by default those beside either
    model."""
    max_images: int = 64
    """Most images to run."""
    input: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FILE.npy: fixes an input that is not the image; may be repeated."""
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Match and compare."""
        from pipeline.comparing import compare_files

        if self.max_images < 1:
            raise SettingsError(f"{self.max_images} is not 1 or more", where="--max-images")
        with _progress(self.common) as progress:
            comparison = compare_files(
                self.first,
                self.second,
                self.images,
                max_images=self.max_images,
                fixed=InputSettings(input=self.input).arrays(),
                threads=self.common.threads,
                on_progress=progress,
            )
        if not _silent(self.common):
            _print_comparison(comparison)
        return 0, {
            "first": str(self.first),
            "second": str(self.second),
            **comparison.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Quantize a model in every way of a grid: a table, JSON, and a plot of size and fidelity."""

    model: tyro.conf.Positional[Path]
    """Exported ONNX file."""
    output: Annotated[Path | None, _OUTPUT] = None
    """Folder for images, files, sweep.json and pareto.png; by default MODEL.sweep beside the
    model. A sweep that was stopped goes on where it was."""
    grid: SweepGrid = field(default_factory=SweepGrid)
    evaluate: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    """Labelled images: fidelity is then the accuracy on them."""
    settings: Path | None = None
    """Further settings of zsq quantize for all cells: a file as --dump-config writes it."""
    num_images: int | None = None
    """How many images to make of each kind."""
    iterations: int | None = None
    """Optimization steps per batch of images."""
    input: InputSettings = field(default_factory=InputSettings)
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Cell by cell."""
        from pipeline.run import QuantizeJob
        from pipeline.sweep import sweep_file

        others = _quantize_settings(self.settings)
        given: dict[str, Any] = {"num_images": self.num_images, "iterations": self.iterations}
        given = {name: value for name, value in given.items() if value is not None}
        base = QuantizeJob(
            model=self.model,
            output=self.model,
            task=others.task,
            bn_from=others.bn_from,
            evaluate_data=self.evaluate or others.evaluate,
            input=others.input if self.input == InputSettings() else self.input,
            generation=replace(others.generation, **given),
            quantization=others.quantization,
            verification=VerifySettings(
                max_images=others.verify_images,
                interpreter_images=others.interpreter_images,
                threads=self.common.threads,
            ),
            threads=self.common.threads,
            target=others.target,
        )
        with _progress(self.common) as progress:
            done = sweep_file(
                base,
                self.grid,
                self.output or self.model.with_name(f"{self.model.stem}.sweep"),
                on_progress=progress,
            )
        _warn(self.common, [f"{cell.name}: {cell.error}" for cell in done.cells if cell.error])
        if not _silent(self.common):
            _print_sweep(done)
        return 0 if all(cell.proved for cell in done.cells) else 1, done.to_dict()


def _quantize_settings(path: Path | None) -> Quantize:
    """The settings of a file for `zsq quantize`, without its model."""
    values = {} if path is None else read_values(path, "quantize", _COMMANDS)
    dropped = ("model", "output", "images", "data")
    values = {key: value for key, value in values.items() if key not in dropped}
    return from_values(Quantize, values, where=str(path), absent=_ABSENT)


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Print completions for a shell: eval "$(zsq completions bash)"."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh: a line in the shell's start file; fish: zsq completions fish | source."""
    common: CommonSettings = field(default_factory=CommonSettings)

    def run(self) -> tuple[int, dict[str, Any]]:
        """Have tyro write them."""
        script = io.StringIO()
        with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
            _parse(["--tyro-print-completion", self.shell])
        if not self.common.json:
            sys.stdout.write(script.getvalue())
        return 0, {"shell": self.shell, "script": script.getvalue()}


Command = (
    Inspect
    | Expose
    | Generate
    | Quantize
    | Verify
    | Export
    | Evaluate
    | Targets
    | Compare
    | Sweep
    | Completions
    | View
)
_COMMANDS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "expose": Expose,
    "generate": Generate,
    "quantize": Quantize,
    "verify": Verify,
    "export": Export,
    "evaluate": Evaluate,
    "targets": Targets,
    "view": View,
    "compare": Compare,
    "sweep": Sweep,
    "completions": Completions,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``zsq``; the process's own by default.

    Returns:
        The exit code.
    """
    # torch's threads spin while they wait, and on a busy machine that costs a factor of ten; to
    # be read by the OpenMP runtime this must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "RANK" in os.environ:  # of a process that is gone one line of ours is enough
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if arguments is None and "--debug" not in sys.argv:
        return run_guarded(lambda: main(sys.argv[1:]), _say_crash)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        command = _parse(arguments)
        if command is None:
            return 0
        if command.common.dump_config:
            sys.stdout.write(to_toml(command, absent=_ABSENT))
            return 0
        logging.basicConfig(
            level=logging.INFO if command.common.debug else logging.ERROR,
            stream=sys.stderr,
            format="%(name)s: %(message)s",
        )
        from graph_tools.limits import within_memory

        if started_rank() and not isinstance(command, Generate | Quantize):
            return 0  # the first process does it
        with terminable(), within_memory(arguments[0]):
            code, facts = command.run()
        if command.common.json and facts and not started_rank():
            sys.stdout.write(json.dumps(_finite(facts), indent=1) + "\n")
        return code
    except ZsqError as error:
        if debug:
            traceback.print_exc()
        if not getattr(error, "told", False):  # by another process
            _stderr.print(f"zsq: {error}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as stop:
        how = f": {stop}" if isinstance(stop, Interrupted) else ""
        if started_rank():
            return 130
        _stderr.print(f"zsq: interrupted{how}", markup=False, soft_wrap=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        _stderr.print(
            f"zsq: internal error: {type(error).__name__}: {' '.join(str(error).split())}; "
            "run again with --debug and report it",
            markup=False,
            soft_wrap=True,
        )
        return 3


def _say_crash(name: str) -> int:
    """One line for a process that could say nothing itself."""
    if name == "SIGKILL":
        what, hint = "the process was killed", "most likely memory ran out"
    else:
        what = f"a library crashed ({name})"
        hint = "the model may be damaged, or memory ran out; --debug shows how far it came"
    _stderr.print(f"zsq: {what}; {hint}", markup=False, soft_wrap=True)
    return 3


def _parse(arguments: Sequence[str]) -> Command | None:
    """The command, or None after help was shown; usage errors become one line."""
    if arguments and arguments[0] in ("-h", "--help"):
        _stdout.print(overview(_COMMANDS), markup=False)
        return None
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            if arguments and arguments[0] in _COMMANDS and _is_from_file(arguments):
                return _parse_with_file(arguments)
            command = tyro.extras.subcommand_cli_from_dict(
                cast(dict[str, Callable[..., object]], _COMMANDS),
                args=list(arguments),
                prog="zsq",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
            return cast(Command, command)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise usage_error(messages.getvalue(), arguments, _COMMANDS) from None


def _is_from_file(arguments: Sequence[str]) -> bool:
    names = {word.split("=")[0] for word in arguments}
    return bool(names & {"--config", "--dump-config"})


def _parse_with_file(arguments: Sequence[str]) -> Command:
    """Flags over the settings of a file; whatever a file switches has a flag for both ways."""
    name, words = arguments[0], list(arguments[1:])
    kind = _COMMANDS[name]
    path = next(
        (
            Path(word.partition("=")[2]) if "=" in word else Path(following)
            for word, following in zip(words, words[1:] or [""], strict=False)
            if word.split("=")[0] == "--config"
        ),
        None,
    )
    values = read_values(path, name, _COMMANDS) if path is not None else {}
    given = {word.split("=")[0] for word in words}
    default = from_values(
        kind,
        values,
        where=str(path),
        absent=_ABSENT if "--dump-config" in words else tyro.MISSING,
        overridden=[field for flag, field in repeatable_flags(kind).items() if flag in given],
    )
    parsed = tyro.cli(
        kind,
        args=words,
        default=default,
        prog=f"zsq {name}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed


def _load(path: Path, settings: InputSettings) -> Model:
    from graph_tools.model import load

    return load(
        path,
        input_shape=settings.shape(),
        layout=settings.known_layout(),
        inputs=settings.arrays(),
    )


def _check_output(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise SettingsError(f"the output is not named *{suffix}", where=str(path))
    if not os.access(path.parent, os.W_OK):
        raise ZsqError("cannot write there", where=str(path), hint="choose another place")


def _silent(common: CommonSettings) -> bool:
    return common.json or common.quiet


def _warn(common: CommonSettings, warnings: Sequence[str]) -> None:
    """Say on stderr what must not be missed, beside JSON, too."""
    for warning in warnings if not common.quiet else ():
        _stderr.print(f"zsq: warning: {warning}", markup=False, soft_wrap=True)


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _progress(
    common: CommonSettings,
) -> Iterator[Callable[[str, int, int, Mapping[str, float]], None]]:
    """Progress bars on stderr, one a stage; silent when quiet or not on a terminal."""
    if common.quiet or started_rank() or not _stderr.is_terminal:
        yield lambda stage, done, total, terms: None
        return
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
        console=_stderr,
    ) as bars:

        def update(stage: str, done: int, total: int, terms: Mapping[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, terms="")
            shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
            bars.update(tasks[stage], completed=done, total=total, terms=shown)

        yield update


@contextlib.contextmanager
def _status(common: CommonSettings, name: str) -> Iterator[Callable[[str], None]]:
    """What an installation is at, in one line on stderr; silent when quiet."""
    if common.quiet or not _stderr.is_terminal:
        yield lambda line: None
        return
    with _stderr.status(f"{name}: making the environment") as status:
        yield lambda line: status.update(Text(f"{name}: {line}"[: _stderr.width - 4]))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_words(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_accuracies(rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each number that was measured: top-1 and top-5, or mAP."""
    numbers = [name for name in rows[0] if name not in ("model", "count", "seconds")]
    named = {"top1": "top-1", "top5": "top-5"}
    table = Table("model", *(f"{named.get(name, name)} %" for name in numbers), "images", "s")
    for row in rows:
        percents = (row[name] for name in numbers)
        # a class alone has no second best
        shown = ["-" if percent != percent else f"{percent:.2f}" for percent in percents]
        table.add_row(row["model"], *shown, str(row["count"]), f"{row['seconds']:.1f}")
    _stdout.print(table)


def _print_model(facts: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    for name in ("path", "input", "outputs", "num_nodes", "num_batch_norms", "operators"):
        table.add_row(name.replace("_", " "), _words(facts[name]))
    table.add_row("Mul+Add left of BN", str(len(facts["affine_leftovers"])))
    table.add_row("for quantization", "\n".join(facts["prepared"]))
    _stdout.print(table)
    for note in facts["notes"]:
        _stdout.print(f"note: {note}", markup=False)


def _print_restoration(facts: Mapping[str, Any] | None) -> None:
    if not facts:
        return
    name = Path(facts["file"]).name
    _stdout.print(
        f"{facts['restored']} of {facts['candidates']} BatchNormalization restored from {name}, "
        f"outputs differ by {facts['difference']:.1e}",
        markup=False,
    )
    table = Table("node", f"weight in {name}", "BatchNormalization", "cosine", "bias error")
    for match in facts["matches"]:
        cosine, residual = match["cosine"], match["bias_residual"]
        names = match["node"], match["weight"] or "-", match["norm"] or match["reason"]
        table.add_row(
            *(Text(name, overflow="fold") for name in names),
            "-" if cosine is None else f"{cosine:.6f}",
            "-" if residual is None else f"{residual:.1e}",
        )
    _stdout.print(table)


def _print_generation(facts: Mapping[str, Any]) -> None:
    _stdout.print(
        f"{facts['num_images']} images ({facts['method']}) in {facts['seconds']:.1f} s: "
        f"{facts['output']}",
        markup=False,
    )
    _stdout.print(f"normalization: {_words(facts['preprocessing'])}", markup=False)
    for note in facts["notes"]:
        _stdout.print(f"note: {note}", markup=False)
    _stdout.print(f"quality: {facts['quality']['line']}", markup=False)


def _print_result(report: Mapping[str, Any]) -> None:
    from pipeline.report.verdict import judge

    verdict = judge(report)
    _stdout.print(f"normalization: {_words(report['preprocessing'])}", markup=False)
    _stdout.print(verdict.lead, markup=False)
    for clause in verdict.clauses:
        _stdout.print(f"  {clause}", markup=False)
    outputs = report["quantization"]["outputs"]
    for output in outputs if len(outputs) > 1 else ():  # the verdict has that of a single one
        if output["agreement"] is not None:
            text = f"{_words(100 * output['agreement'])} % as in float"
        elif output["sqnr_db"] is not None:
            text = f"SQNR {_words(output['sqnr_db'])} dB"
        else:
            continue
        _stdout.print(f"  output {output['name']}: {text}", markup=False)
    for entry in report["quantization"]["float"]:
        _stdout.print(
            f"  stays in float: {entry['op_type']} {entry['node']} ({entry['reason']})",
            markup=False,
        )
    said = (report["generation"] or {}).get("warnings", [])  # on stderr
    for warning in [one for one in report["warnings"] if one not in said]:
        _stdout.print(f"warning: {warning}", markup=False)


def _print_comparison(comparison: Comparison) -> None:
    table = Table(
        Column("tensor", overflow="fold"),
        "operator",
        Column("SQNR dB", justify="right", no_wrap=True),
        "",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for row in comparison.rows:
        value = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        if row.agreement is not None:
            value = f"{100 * row.agreement:.1f} % equal"
        said = [
            *([f"worst {row.rank}"] if row.rank else []),
            *(["output"] if row.is_output else []),
            *([f"x {row.gain:.4g}"] if row.gain != 1 else []),
            *([f"by {row.matched}"] if row.matched != "name" else []),
        ]
        style = "bold red" if row.rank == 1 else "red" if row.rank else ""
        table.add_row(Text(row.first), row.op_type, value, ", ".join(said), style=style)
    _stdout.print(table)
    for what, names in (
        ("only in the first", comparison.only_first),
        ("only in the second", comparison.only_second),
        ("of another shape", comparison.other_shape),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            _stdout.print(f"{what}: {', '.join(names[:3])}{more}", markup=False)
    if any(row.gain != 1 for row in comparison.rows):
        _stdout.print("x FACTOR: the second model holds the tensor at so many times the value")
    _stdout.print(f"{comparison.images} images: {comparison.source}", markup=False)


def _print_sweep(done: Swept) -> None:
    table = Table(
        *("images", "bits", "rounding"),
        *(Column(name, justify="right") for name in ("kB", "as float %", "SQNR dB")),
        *(Column(name, justify="right") for name in ("top-1 %", "s")),
        "",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for cell in done.cells:
        bits = f"W{cell.weights}A{cell.activations}"
        images = f"{cell.method} {cell.seed}"
        if cell.error:
            table.add_row(images, bits, cell.rounding, *["-"] * 5, "failed")
            continue
        said = "not beaten" if cell.optimal else ""
        table.add_row(
            *(images, bits, cell.rounding, f"{cell.weight_bytes / 1000:.1f}"),
            "-" if cell.agreement is None else f"{100 * cell.agreement:.1f}",
            "-" if cell.sqnr_db is None else f"{cell.sqnr_db:.1f}",
            "-" if cell.top1 is None else f"{cell.top1:.2f}",
            f"{cell.seconds:.1f}",
            said if cell.proved else f"{said} not proved".strip(),
            style="bold" if cell.optimal else "",
        )
    _stdout.print(table)
    if done.float_top1 is not None:
        _stdout.print(f"float: top-1 {done.float_top1:.2f} %")
    if done.resumed:
        _stdout.print(f"{done.resumed} of {len(done.cells)} cells were there before")
    _stdout.print(f"cells  {done.folder / 'sweep.json'}", markup=False)
    if done.plot is not None:
        _stdout.print(f"plot   {done.plot}", markup=False)


def _describe_target(profile: TargetProfile) -> dict[str, Any]:
    from pipeline.environments import find_environment, how_to_get

    environment = find_environment(profile)
    install = profile.install
    return {
        "name": profile.name,
        "title": profile.title,
        "requirements": list(install.requirements) if install else [],
        "needs": list(install.needs) if install else [],
        "runs": profile.verify is not None and not profile.verify.converts,
        "version": environment.version if environment else None,
        "outdated": environment is not None and environment.outdated,
        "folder": str(environment.folder) if environment else None,
        "install": how_to_get(profile),
    }


def _print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    table = Table("target", "what it is", "verify", "installed")
    for target in targets:
        said = target["version"] or target["install"]
        if target["outdated"]:
            said += f", outdated: `zsq targets install {target['name']}`"
        words = target["name"], target["title"], "yes" if target["runs"] else "-", said
        table.add_row(*(Text(word, overflow="fold") for word in words))
    _stdout.print(table)


def _print_agreement(agreement: Agreement) -> None:
    table = Table(
        Column("target", no_wrap=True),
        *("version", "compiled", "ran", "differing", "steps", "integer", "ms/image"),
        Column(no_wrap=True),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for row in agreement.rows:
        tried = not row.skipped
        kernels, seconds = row.integer_kernels, row.seconds_per_image
        table.add_row(
            row.target,
            row.version or "-",
            ("yes" if row.compiled else "no") if tried else "-",
            ("yes" if row.ran else "no") if tried and row.packed is None else "-",
            f"{100 * row.share:.3g} %" if row.ran else "-",
            f"{row.largest_steps:g}" if row.ran else "-",
            ("?" if row.ran else "-") if kernels is None else f"{kernels[0]}/{kernels[1]}",
            "-" if seconds is None else f"{1000 * seconds:.3g}",
            row.verdict,
        )
    _stdout.print(table)
    for row in agreement.rows:
        if note := row.note():
            _stdout.print(f"{row.target}: {note}", markup=False)
    if agreement.float_nodes:
        _stdout.print(
            f"in float in the interpreter, too: {', '.join(agreement.float_nodes)}",
            markup=False,
        )
    ran = [row for row in agreement.rows if row.ran]
    if all(row.skipped for row in agreement.rows):
        _stdout.print("nothing was compared: none of these compilers is installed")
        return
    exact = sum(not row.differing for row in ran)
    differing = len(ran) - exact
    explained = f", {differing} may differ" if agreement.passed and differing else ""
    _stdout.print(
        f"{'PASSED' if agreement.passed else 'FAILED'}: {exact} of {len(ran)} runs give the "
        f"interpreter's integers{explained}, {agreement.images} images"
    )


if __name__ == "__main__":
    sys.exit(main())
