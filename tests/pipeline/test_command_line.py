"""The command that a report shows gives the run that it is of."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from pipeline.cli import Quantize, _parse
from pipeline.command_line import command_of
from pipeline.run import QuantizeJob
from pipeline.settings import (
    DetectionSettings,
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

JOBS = {
    "defaults": {},
    "paths": {
        "images": Path("my images.npz"),
        "bn_from": Path("it's.pt"),
        "evaluate_data": Path("test.zip"),
        "target": "openvino",
        "threads": 2,
        "verification": VerifySettings(max_images=7, interpreter_images=0, threads=2),
    },
    "detection": {
        "evaluate_data": Path("coco.zip"),
        "task": "detection",
        "detection": DetectionSettings(decoder="ssd", nms_overlap=0.4),
        "input": InputSettings(range="-1,1", resize="letterbox"),
    },
    "settings": {
        "data": Path("train"),
        "quantization": QuantizeSettings(
            weights=4,
            activations=16,
            bits=("@first=W8", "/a b/Conv=W4A8"),
            rounding="brecq",
            learn_exponents=True,
            qdrop=0.25,
        ),
        "generation": GenerateSettings(
            method="dgh", num_images=3, flip=False, pixel_prior=False, slack=0.5, seed=7
        ),
        "input": InputSettings(
            mean=("0.5,0.4,0.3",),
            std=("0.2", "0.2", "0.2"),
            channels="bgr",
            input=("a=b.npy",),
        ),
    },
}


@pytest.mark.parametrize("name", JOBS)
def test_the_command_gives_the_job_back(name):
    given = {
        "input": InputSettings(),
        "generation": GenerateSettings(),
        "quantization": QuantizeSettings(),
        "verification": VerifySettings(),
        **JOBS[name],
    }
    job = QuantizeJob(
        model=Path("-m odel.onnx").parent / "m.onnx", output=Path("q.onnx"), **given
    )
    words = shlex.split(command_of(job))
    assert words[:3] == ["zsq", "quantize", "m.onnx"]
    command = _parse(words[1:])
    assert isinstance(command, Quantize)
    assert (command.model, command.output) == (job.model, job.output)
    for field in (
        "images",
        "data",
        "bn_from",
        "target",
        "quantization",
        "generation",
        "input",
    ):
        assert getattr(command, field) == getattr(job, field), field
    assert command.evaluate == job.evaluate_data
    assert command.common.threads == job.threads
    assert command.verify_images == job.verification.max_images
    assert command.interpreter_images == job.verification.interpreter_images


def test_every_setting_can_be_given():
    """A field of another type would need a rule of its own."""
    for settings in (QuantizeSettings, GenerateSettings, InputSettings, DetectionSettings):
        for field in dataclasses.fields(settings):
            assert isinstance(field.default, bool | int | float | str | tuple | None), (
                field.name
            )
