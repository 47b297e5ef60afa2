"""Validated settings, one frozen dataclass a stage.

The command line builds its flags and help from these classes and their attribute docstrings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import tyro

from graph_tools.errors import SettingsError
from graph_tools.fixed_inputs import read_input

__all__ = [
    "CheckpointSettings",
    "DetectionSettings",
    "GenerateSettings",
    "InputSettings",
    "Method",
    "QuantizeSettings",
    "Rounding",
    "SweepGrid",
    "TargetSize",
    "VerifySettings",
]


def _require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        option = "--" + field.replace("_", "-")
        raise SettingsError(f"{value!r} is not {rule}", where=option)


Method = Literal["auto", "dgh", "zeroq", "dsg", "intraq", "genie", "sadag", "prior", "noise"]
Rounding = Literal["nearest", "adaround", "brecq"]


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How images are made: by DGH (arXiv 2410.22110) unless --method says otherwise."""

    method: Method = "auto"
    """dgh: match BatchNormalization statistics over all images; zeroq: by each image; dsg: by each
    image, with margins; intraq: by each batch, images of classes (classifiers only); genie: by each
    batch, images out of a generator network; sadag: those of genie or dgh, refined on the quantized
    network (classifiers only); prior: images with the statistics of natural ones, adapted to the
    network, needs no BatchNormalization; noise: Gaussian noise; auto: dgh where there is
    BatchNormalization, else prior."""
    num_images: int = 0
    """How many images to make (or to take from --data); 0 chooses by image size: 256 up to
    128x128 pixels, 64 beyond."""
    iterations: int = 0
    """Optimization steps per batch; 0 chooses by method and image size (published: 1000)."""
    batch_size: int = 0
    """Images optimized together; 0 chooses by image size."""
    chunk_size: int = 0
    """Images of a batch that go through the network at a time, to save memory: the gradient stays
    that of the whole batch, for one more forward pass; 0: all of them. Not for genie and sadag,
    whose gradient goes on into a generator or a quantized copy."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "cpu"
    """torch device, such as cpu or cuda."""
    engine: Literal["torch", "ort"] = "torch"
    """What computes the network and its gradients: torch, or onnxruntime-training, which needs an
    environment of its own (`make ort`)."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Of convolutions and matrix products while images are made: auto is float32 on a CPU, tf32 on
    a GPU. Moments are summed in float32 and float64 with each."""
    start: Literal["natural", "noise"] = "natural"
    """What dgh starts from: synthetic images with the statistics of natural ones, whose
    structure the images then keep; or Gaussian noise, as published."""
    learning_rate: float = 0.0
    """The optimizer's learning rate, in standardized pixel units (genie: that of the generator's
    weights); 0 chooses by method, start and iterations. sadag's refinement has rates of its own."""
    loss: Literal["code", "paper"] = "code"
    """Form of the statistics loss: that of DGH's published code, or the paper's equation 4."""
    std_weight: float = 10.0
    """With dgh: weight of the standard deviations against the means."""
    site_balance: float = 0.5
    """With dgh and genie: how far BatchNormalization nodes with small values count like those
    with large ones: 0 as published, 1 fully."""
    pixel_prior: bool = True
    """Match the statistics of the pixels, too, where they are known."""
    slack: float | None = None
    """Let statistics be off as far as this share of the channels are with Gaussian images, 0..1;
    by default 0.9 for dsg, none for dgh."""
    layer_enhancement: bool = False
    """With dgh: let each image follow one BatchNormalization node twice as far, as dsg does."""
    output_weight: float | None = None
    """Weight (lambda) of the output loss, 0 for none; by default set from output-ratio, and 1 for
    method prior."""
    output_ratio: float = 0.2
    """Gradient of the output loss as a share of that of the statistics loss."""
    stretch_unbound: bool = False
    """With dgh: stretch not only the outputs but every convolution's output that no
    BatchNormalization reads, each to its own scale."""
    output_range: Literal["linear", "squared"] = "linear"
    """Stretch the range of the outputs (published code) or its square (paper)."""
    output_hinge: float | None = None
    """Bound each image's statistics at the last BatchNormalization node (paper's delta)."""
    oversample: float = 1.0
    """Make so many times the images, and keep those that are least alike to the network."""
    flip: bool = True
    """Mirror images at random while they are optimized (not zeroq and dsg)."""
    padding: int | None = None
    """Pixels by which canvases exceed the images; by default by method and image size."""
    blur: float | None = None
    """Sigma of the blur in pixels, 0 for none; by default by method and image size."""
    crop_scale: float | None = None
    """In half of the steps, show every image by a resized crop of its own of at least this share
    of its area; 1: never; by default by method."""
    scope: int = 0
    """How many batches share the statistics that dgh matches: 0 for all of them (as published),
    1 for each batch by itself."""
    refresh: int = 0
    """Iterations between measurements of all images as they are shown next: with 1 each step takes
    the exact gradient of the loss over all images, for half as much time again; 0: never, other
    batches count as they were when they last moved (DGH's published code). Not genie and sadag."""
    parallel_batches: int = 0
    """How many batches advance at the same time, each by the statistics that the others had before
    the step (not intraq, genie, sadag); 0: as many as torchrun starts processes, 1 without it. The
    images depend on this number, not on that of processes, which must divide it."""

    sadag_form: Literal["generator", "pixels"] = "generator"
    """What sadag refines: genie's images through their generators, as published, or those of dgh
    pixel by pixel, which takes less time."""
    sadag_matching: float = 1.0
    """Weight of sadag's term that asks neighbors for gradients alike; 0 for none."""
    sadag_diversity: float = 1.0
    """Weight of sadag's term that asks other images for gradients unlike; 0 for none."""

    def __post_init__(self) -> None:
        _require(self.num_images >= 0, "num_images", self.num_images, "0 or more")
        _require(self.iterations >= 0, "iterations", self.iterations, "0 or more")
        _require(self.batch_size >= 0, "batch_size", self.batch_size, "0 or more")
        _require(self.chunk_size >= 0, "chunk_size", self.chunk_size, "0 or more")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in 0..2^63-1")
        for field in ("std_weight", "output_ratio"):
            value = getattr(self, field)
            _require(0 < value < math.inf, field, value, "a positive number")
        rate = self.learning_rate
        _require(0 <= rate < math.inf, "learning_rate", rate, "0 or more")
        _require(self.scope >= 0, "scope", self.scope, "0 or more")
        _require(self.refresh >= 0, "refresh", self.refresh, "0 or more")
        exact = self.engine == "torch" or self.precision == "auto"
        _require(exact, "precision", self.precision, "auto with --engine ort")
        parallel = self.parallel_batches
        _require(parallel >= 0, "parallel_batches", parallel, "0 or more")
        more = self.oversample
        _require(1 <= more < math.inf, "oversample", more, "1 or more")
        slack = self.slack
        _require(slack is None or 0 <= slack <= 1, "slack", slack, "in 0..1")
        if self.slack is not None and self.loss == "paper":
            raise SettingsError(
                "margins belong to the code's form of the loss",
                where="--slack",
                hint="leave out one of it and --loss paper",
            )
        scale = self.crop_scale
        _require(scale is None or 0 < scale <= 1, "crop_scale", scale, "above 0 and at most 1")
        _require(0 <= self.site_balance <= 1, "site_balance", self.site_balance, "in 0..1")
        for field in (
            "output_weight",
            "output_hinge",
            "padding",
            "blur",
            "sadag_matching",
            "sadag_diversity",
        ):
            value = getattr(self, field)
            _require(value is None or 0 <= value < math.inf, field, value, "0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What survives when the making of images is cut short."""

    checkpoint_every: int = 0
    """Iterations between checkpoints, which lie beside the output and are removed at the end; 0:
    about one a minute, none in shorter runs."""
    resume: bool = False
    """Go on from the checkpoint beside the output, if there is one, to the same bytes as without
    interruption. Model, settings and versions must be those of then."""

    def __post_init__(self) -> None:
        every = self.checkpoint_every
        _require(every >= 0, "checkpoint_every", every, "0 or more")


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """What is quantized, to how many bits, and how thresholds are chosen (HPTQ)."""

    weights: Literal[8, 4, 3, 2] = 8
    """Bits of the weights."""
    activations: Literal[16, 8, 4] = 8
    """Bits of the activations."""
    scheme: Literal["full", "academic"] = "full"
    """full: every tensor that crosses an operator, input and outputs included; academic (BRECQ's):
    8 bits at the first and last layers, float outputs, residual branches rounded once, behind
    their Add."""
    bits: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATTERN=W4A8 (or =W4, =A16): other bits for the layers or tensors that PATTERN names; may be
    repeated, later ones win. A shell pattern on node names (W: the weight, A: what the node makes)
    or tensor names (A), or one of @first @last @depthwise (W, A) @input @output @add @into-last
    (A)."""
    target_size: str = ""
    """Size of all weights, as a share of their size at 8 bits (0.6x) or in bytes (500kB): each
    layer gets 8, 4, 3 or 2 bits by how much its rounding disturbs the outputs, in place of
    --weights; layers that --bits or the academic scheme names keep theirs. Packed integers count;
    biases and scales do not."""
    threshold: Literal["mse", "mae", "kl", "no-clipping"] = "mse"
    """Error that the power-of-two threshold search minimizes."""
    weight_scale: Literal["pot", "free"] = "pot"
    """pot: the scales of weights are powers of two; free: any number, one a channel, to see the
    price of that. Activations stay powers of two, but requantization is no shift any more."""
    weight_range: Literal["full", "7bit"] = "full"
    """full: 8-bit weights are -128..127; 7bit: -64..63, so that kernels which add two products in
    16 bits (x64 CPUs without VNNI in onnxruntime's default mode and in OpenVINO) cannot saturate.
    It costs accuracy; weights of fewer bits stay as they are."""
    container: Literal["int8", "int4"] = "int8"
    """Type that holds integers of 4 bits and fewer: int8 (uint8 behind a Clip), for which
    onnxruntime has integer kernels, or int4 (uint4; opset 21), half the size. The values are the
    same. Weights of 3 and 2 bits take int4, too."""
    rounding: Rounding = "nearest"
    """How weights become integers. nearest: the nearest one; adaround: up or down, learned layer
    by layer; brecq: learned block by block. Both learn on the calibration images, which takes
    time; they are for weights of few bits."""
    rounding_iterations: int = 0
    """With adaround and brecq: steps for each layer or block; 0 chooses 100."""
    weight_error: Literal["outputs", "weights"] = "outputs"
    """What chooses the scales of weights of 2 bits before roundings are learned: the error
    of the operator's outputs on the calibration images, or that of the weights alone."""
    reconstruction: Literal["mse", "fisher"] = "mse"
    """With adaround and brecq: minimize the mean squared error of the outputs of each layer or
    block, or weigh it by how much the network's outputs depend on it (Fisher information)."""
    qdrop: float = 0.5
    """With adaround and brecq: share of a layer's or block's inner activations that stay
    unquantized while its weights are learned, 0..1."""
    learn_exponents: bool = False
    """Learn the scale exponents of the activations: those one up or down with which the outputs of
    the network are nearer to the float network's are taken."""
    zero_point: Literal["auto", "zero", "middle", "below"] = "auto"
    """auto: signed tensors that several operators read are stored as uint8 around 128, the form
    for which onnxruntime has integer kernels; middle: all signed tensors are; zero: int8, zero
    point 0, everywhere; below: signed tensors are uint8 around 126 and weights int8 around -2,
    for compilers that take those of the others for -127 to 127 (RKNN)."""
    signedness: Literal["auto", "signed"] = "auto"
    """auto: tensors that are never negative are unsigned, which doubles their steps; signed: every
    tensor is signed, with --zero-point auto or zero int8, for targets without uint8."""
    weight_granularity: Literal["auto", "channel", "tensor"] = "auto"
    """Scales of a weight: one for each output channel (auto), or one for the whole tensor."""
    bias_storage: Literal["auto", "int32", "float"] = "auto"
    """Biases in int32 behind a DequantizeLinear (auto), or the same values in float."""
    fused_sums: Literal["auto", "yes"] = "auto"
    """yes: what a convolution gives only to an Add is rounded once, behind the Add, as compilers
    compute it that fuse the two (OpenVINO); auto: before the Add, too."""
    outlier_z: float = 0.0
    """Values further than this many standard deviations from a tensor's mean do not count when its
    threshold is chosen (published: 24); 0 counts all."""
    equalization: bool = False
    """Cross-layer equalization: scale the channels between two weighted operators, by powers of
    two and so without changing the float values, until the weights before and behind are alike."""
    scale_absorption: bool = False
    """Scale the channels between two weighted operators, where the weights before them have fewer
    than 8 bits, so that power-of-two scales suit these; the weights behind absorb the rest."""
    shift_negative: bool = False
    """Shift the outputs of SiLU, hard-swish, GELU, PReLU and the like so that they are never
    negative where that gives them finer steps; the biases behind take it back."""
    bias_correction: Literal["none", "empirical", "analytic"] = "empirical"
    """How biases are corrected for the rounding of the weights. empirical: by each channel's mean
    error on the quantized prefix, layer by layer; analytic: by the rounding errors of the weights
    times the float network's mean input. With adaround and brecq biases are learned beside the
    roundings instead, unless none is given."""
    second_moment_correction: bool = False
    """Rescale each output channel's weights, before they are rounded, so that its standard
    deviation on the quantized prefix is that of the float network; its mean is what
    --bias-correction empirical brings back."""

    def __post_init__(self) -> None:
        iterations = self.rounding_iterations
        _require(iterations >= 0, "rounding_iterations", iterations, "0 or more")
        _require(0 <= self.qdrop <= 1, "qdrop", self.qdrop, "in 0..1")
        self.widths()
        self.target()
        z = self.outlier_z
        _require(z == 0 or 1 <= z < math.inf, "outlier_z", z, "0, or 1 or more")
        if self.scale_absorption:
            self._check_scale_absorption()
        if self.second_moment_correction:
            self._check_second_moment_correction()
        if self.weight_granularity == "tensor" and self.weight_scale == "free":
            raise SettingsError(
                "free scales are one a channel",
                where="--weight-granularity tensor",
                hint="leave out --weight-scale free",
            )
        if self.lifted and self.container == "int4":
            raise SettingsError(
                "4-bit types have no room below their smallest integer",
                where="--zero-point below",
                hint="leave out --container int4",
            )

    def _check_scale_absorption(self) -> None:
        where = "--scale-absorption"
        if self.weight_scale == "free":
            raise SettingsError(
                "free scales leave nothing to absorb",
                where=where,
                hint="leave out this or --weight-scale free",
            )
        if self.weight_granularity == "tensor":
            raise SettingsError(
                "channels are scaled for scales of their own, and weights have one for all",
                where=where,
                hint="leave it out, or --weight-granularity tensor and targets that ask for it",
            )
        if self.target_size:
            raise SettingsError(
                "channels are scaled before the bits of the weights are chosen",
                where=where,
                hint="leave out this or --target-size; --bits names bits beforehand",
            )

    def _check_second_moment_correction(self) -> None:
        where = "--second-moment-correction"
        if self.rounding != "nearest":
            raise SettingsError(
                "weights are rescaled and rounded anew, which undoes learned roundings",
                where=where,
                hint=f"leave out one of it and --rounding {self.rounding}",
            )
        if self.bias_correction != "empirical":
            raise SettingsError(
                "the means are brought back by the biases, which are corrected otherwise",
                where=where,
                hint="leave --bias-correction at empirical",
            )
        if self.weight_scale == "free":
            raise SettingsError(
                "weights are rescaled in powers of two",
                where=where,
                hint="leave out one of it and --weight-scale free",
            )

    @property
    def lifted(self) -> bool:
        """Whether signed quantizers are lifted (`graph_tools.quantizer`)."""
        return self.zero_point == "below"

    def target(self) -> TargetSize | None:
        """``target_size`` as numbers, None if it was not given.

        Raises:
            SettingsError: not like 0.6x, 500kB, 1.5MB or 300000.
        """
        return TargetSize.parse(self.target_size) if self.target_size else None

    def widths(self) -> tuple[tuple[str, int | None, int | None], ...]:
        """Entries of ``bits``: pattern, bits of weights, bits of activations (None: as they are).

        Raises:
            SettingsError: not PATTERN=W4A8, or a width that does not exist.
        """
        return tuple(_width_entry(entry) for entry in self.bits)


@dataclass(frozen=True, kw_only=True)
class TargetSize:
    """A size of packed weights: a ``share`` of that at 8 bits, or else ``num_bytes``."""

    text: str
    share: float | None = None
    num_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> TargetSize:
        """Read ``0.6x``, ``500kB``, ``1.5MB`` or ``300000`` (bytes)."""
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(x|b|kb|mb|gb|)", text.strip().lower())
        good = found is not None and float(found[1]) > 0
        _require(good, "target_size", text, "a size such as 0.6x, 500kB or 1.5MB")
        assert found is not None
        number, unit = float(found[1]), found[2]
        if unit == "x":
            return cls(text=text, share=number)
        factor = {"kb": 1e3, "mb": 1e6, "gb": 1e9}.get(unit, 1)
        return cls(text=text, num_bytes=round(number * factor))

    def bytes_of(self, size_w8: int) -> int:
        """The size in bytes, rounded down, where weights of 8 bits take ``size_w8``."""
        if self.num_bytes is not None:
            return self.num_bytes
        assert self.share is not None
        return math.floor(self.share * size_w8 + 1e-6)

    def __str__(self) -> str:
        return self.text


_WIDTHS = {"W": (2, 3, 4, 8), "A": (4, 8, 16)}


def _width_entry(entry: str) -> tuple[str, int | None, int | None]:
    pattern, _, words = entry.rpartition("=")
    found = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", words.upper())
    good = bool(pattern and words) and found is not None
    _require(good, "bits", entry, "PATTERN=W4A8, PATTERN=W4 or PATTERN=A8")
    assert found is not None
    numbers = [None if text is None else int(text) for text in found.groups()]
    for (letter, known), number in zip(_WIDTHS.items(), numbers, strict=True):
        if number is not None:
            listed = ", ".join(f"{letter}{bits}" for bits in known)
            text = f"{letter}{number} in {entry}"
            _require(number in known, "bits", text, f"a width that exists: {listed}")
    return pattern, numbers[0], numbers[1]


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """How a quantized file is checked against onnxruntime."""

    max_images: int = 500
    """Images to compare."""
    interpreter_images: int | None = None
    """How many of them the integer interpreter runs, too, in whole batches; 0 for none. By default
    64 of up to 147x147 pixels, fewer beyond."""
    threads: int = 0
    """onnxruntime threads; 0 lets it choose."""
    timeout: float = 900.0
    """Seconds that another compiler gets to compile and run the file."""

    def __post_init__(self) -> None:
        count = self.interpreter_images
        _require(count is None or count >= 0, "interpreter_images", count, "0 or more")
        _require(self.max_images > 0, "max_images", self.max_images, "a positive number")
        _require(self.timeout > 0, "timeout", self.timeout, "a positive number")
        _require(self.threads >= 0, "threads", self.threads, "0 or more")


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """How a detector's outputs become boxes."""

    decoder: str = ""
    """From outputs to boxes: yolo-fastest-v2, ssd, boxes, or a function of your own as
    path/to/file.py:function."""
    min_score: float = 0.001
    """Detections with a lower score do not count."""
    nms_overlap: float = 0.5
    """Of two boxes of a class whose intersection is more than this share of their union, the one
    with the lower score is dropped."""

    def __post_init__(self) -> None:
        for field in ("min_score", "nms_overlap"):
            value = getattr(self, field)
            _require(0 <= value <= 1, field, value, "in 0..1")


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """What the network's input means."""

    input_shape: str = ""
    """Shape of the input, such as 1,3,224,224, for files that leave it open."""
    layout: Literal["auto", "NCHW", "NHWC"] = "auto"
    """Axes of the input; auto detects them from the graph."""
    mean: tuple[str, ...] = ()
    """Mean that the normalization subtracts from pixels in 0..1: one number, or one per channel
    as in 0.485,0.456,0.406."""
    std: tuple[str, ...] = ()
    """Standard deviation that it divides by, likewise."""
    channels: Literal["rgb", "bgr"] | None = None
    """Channel order that the network expects; rgb with --mean or --range, else found like the
    rest."""
    range: str = ""
    """LOW,HIGH: what black and white pixels are to the network, such as 0,255 or -1,1; instead of
    --mean and --std."""
    resize: Literal["crop", "stretch", "letterbox"] | None = None
    """How real pictures of another size are laid on the input. crop: scaled until they cover it,
    then cropped at the center (the default); stretch: both sides scaled to fit (the default for
    detection); letterbox: scaled until they fit, with gray bars."""

    input: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FILE.npy: fixes an input that is not the image to an array; may be repeated. One row
    is taken for every image where the input's first dimension is the batch."""

    def __post_init__(self) -> None:
        _require(
            bool(self.mean) == bool(self.std), "std", self.std, "given together with --mean"
        )
        for field in ("mean", "std"):
            self.numbers(field)
        if self.range and self.mean:
            raise SettingsError(
                "--mean and --std say the same otherwise",
                where="--range",
                hint="give one of them",
            )
        self.ends()
        self.shape()

    def shape(self) -> tuple[int, ...] | None:
        """``input_shape`` as integers, None if it was not given."""
        if not self.input_shape:
            return None
        try:
            shape = tuple(int(size) for size in self.input_shape.replace("x", ",").split(","))
        except ValueError:
            shape = ()
        _require(
            len(shape) == 4 and min(shape) > 0,
            "input_shape",
            self.input_shape,
            "four positive integers, such as 1,3,224,224",
        )
        return shape

    def ends(self) -> tuple[float, float] | None:
        """``range`` as numbers, None if it was not given.

        Raises:
            SettingsError: not two numbers, the first one less.
        """
        if not self.range:
            return None
        try:
            low, high = (float(word) for word in self.range.replace(",", " ").split())
        except ValueError:
            low = high = math.nan
        good = math.isfinite(low) and math.isfinite(high) and low < high
        _require(good, "range", self.range, "two numbers, the first one less, such as 0,255")
        return low, high

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of ``input`` by name, read from their files.

        Raises:
            SettingsError: not NAME=FILE, a name given twice, or a file that cannot be used.
        """
        found: dict[str, np.ndarray] = {}
        for entry in self.input:
            name, _, path = entry.rpartition("=")
            _require(bool(name and path), "input", entry, "NAME=FILE.npy")
            _require(name not in found, "input", name, "given once")
            found[name] = read_input(path)
        return found

    def known_layout(self) -> Literal["NCHW", "NHWC"] | None:
        """``layout``, None if it is to be detected."""
        return None if self.layout == "auto" else self.layout

    def numbers(self, field: Literal["mean", "std"] | str) -> tuple[float, ...]:
        """``mean`` or ``std`` as floats; commas and spaces both separate."""
        words = " ".join(getattr(self, field)).replace(",", " ").split()
        try:
            return tuple(float(word) for word in words)
        except ValueError:
            raise SettingsError(
                f"{' '.join(words)!r} is not a list of numbers", where=f"--{field}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class SweepGrid:
    """What a sweep varies; every combination is a cell."""

    weights: tuple[Literal[8, 4, 3, 2], ...] = (8, 4)
    """Bits of the weights."""
    activations: tuple[Literal[16, 8, 4], ...] = (8,)
    """Bits of the activations."""
    rounding: tuple[Rounding, ...] = ("nearest", "adaround")
    """How weights become integers."""
    method: tuple[Method, ...] = ("auto",)
    """How images are made."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the images."""

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if not values or len(set(values)) < len(values):
                rule = "names one twice" if values else "names none"
                raise SettingsError(rule, where=f"--{name}")

    def images(self) -> Iterator[tuple[Method, int]]:
        """Every method with every seed."""
        return product(self.method, self.seeds)

    def held_out(self) -> tuple[Method, int]:
        """Method and seed of the images that fidelity is measured on."""
        return self.method[0], max(self.seeds) + 1
