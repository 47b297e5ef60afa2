"""How each tool with a quantizer of its own takes the exported images, in its own words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.preprocessing import Preprocessing

__all__ = ["Pictures", "pages"]

_NOT_RUN = "From the tool's documentation; not run by onnx-zsq.\n"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What the pictures are, and how they become the network's input.

    Attributes:
        source: how the normalization is known: given, or guessed and from what.
    """

    count: int
    height: int
    width: int
    num_channels: int
    preprocessing: Preprocessing
    source: str

    @property
    def means(self) -> list[float]:
        """One a channel, of pixels in 0..255."""
        return self._each(self.preprocessing.mean)

    @property
    def deviations(self) -> list[float]:
        """Likewise."""
        return self._each(self.preprocessing.std)

    @property
    def order(self) -> str:
        """RGB, BGR or GRAY."""
        return "GRAY" if self.num_channels == 1 else self.preprocessing.channels.upper()

    def _each(self, values: Sequence[float]) -> list[float]:
        each = list(values) * (self.num_channels if len(values) == 1 else 1)
        return [round(255 * value, 6) for value in each]


def pages(input_name: str, pictures: Pictures | None) -> dict[str, str]:
    """The README of the folder and one page a tool, by file name.

    Args:
        input_name: of the network.
        pictures: None where there are only arrays.
    """
    found = {
        "README.md": _readme(pictures),
        "onnx2tf.md": _onnx2tf(input_name, pictures),
        "hailo.md": _hailo(),
    }
    if pictures is not None:
        found |= {
            "ncnn.md": _ncnn(pictures),
            "mnn.md": _mnn(pictures),
            "mnn.json": json.dumps(_mnn_settings(pictures), indent=1) + "\n",
            "rknn.md": _rknn(pictures),
        }
    return found


def _readme(pictures: Pictures | None) -> str:
    lines = [
        "# Calibration data\n",
        "- `model.onnx`: the network in float.",
        "- `images.npy`: images in the network's own layout and units, float32.",
        "- `images_nhwc.npy`: the same, channels last.",
        "- `scales.json`: the power-of-two scales that onnx-zsq chose: of each tensor, and of each "
        "weight by output channel; `value = scale * integer`. None of the tools below reads it.",
    ]
    if pictures is not None:
        lines.append(
            f"- `images/`, `images.txt`: the images as RGB or gray pictures, rounded to 0..255 "
            f"(normalization: {pictures.source}); input = (pixel - mean) / std with mean "
            f"{pictures.means}, std {pictures.deviations}, channels {pictures.order}."
        )
    tools = "`ncnn.md`, `mnn.md`, `rknn.md`, " if pictures is not None else ""
    lines += ["", f"One page a tool: {tools}`onnx2tf.md`, `hailo.md`."]
    return "\n".join(lines) + "\n"


def _ncnn(pictures: Pictures) -> str:
    means = ",".join(f"{value:g}" for value in pictures.means)
    factors = ",".join(f"{1 / value:.8g}" for value in pictures.deviations)
    shape = f"{pictures.width},{pictures.height},{pictures.num_channels}"
    return f"""# ncnn

{_NOT_RUN}
Convert `model.onnx` with pnnx (or onnx2ncnn), optimize it with `ncnnoptimize`, then:

    ncnn2table model.param model.bin images.txt model.table \\
      mean=[{means}] norm=[{factors}] shape=[{shape}] pixel={pictures.order} method=kl
    ncnn2int8 model.param model.bin model-int8.param model-int8.bin model.table
"""


def _mnn_settings(pictures: Pictures) -> dict[str, object]:
    return {
        "format": pictures.order,
        "mean": pictures.means,
        "normal": [1 / value for value in pictures.deviations],
        "width": pictures.width,
        "height": pictures.height,
        "path": "images/",
        "used_image_num": pictures.count,
        "feature_quantize_method": "KL",
        "weight_quantize_method": "MAX_ABS",
    }


def _mnn(pictures: Pictures) -> str:
    return f"""# MNN

{_NOT_RUN}
`mnn.json` describes the {pictures.count} pictures in `images/` (`dst = (src - mean) * normal`).

    MNNConvert -f ONNX --modelFile model.onnx --MNNModel model.mnn --bizCode zsq
    quantized.out model.mnn model-int8.mnn mnn.json
"""


def _rknn(pictures: Pictures) -> str:
    swap = ", quant_img_RGB2BGR=True" if pictures.order == "BGR" else ""
    return f"""# RKNN

{_NOT_RUN}
RKNN also reads the quantized file itself: `zsq quantize --target rknn`. With its own quantizer:

    from rknn.api import RKNN
    rknn = RKNN()
    rknn.config(mean_values=[{pictures.means}], std_values=[{pictures.deviations}],
                target_platform="rk3588"{swap})
    rknn.load_onnx(model="model.onnx")
    rknn.build(do_quantization=True, dataset="images.txt")
    rknn.export_rknn("model.rknn")
"""


def _onnx2tf(input_name: str, pictures: Pictures | None) -> str:
    channels = 3 if pictures is None else pictures.num_channels
    zeros, ones = [[[[0.0] * channels]]], [[[[1.0] * channels]]]
    return f"""# onnx2tf (TensorFlow Lite, LiteRT)

{_NOT_RUN}
The array is normalized already, so mean is 0 and std is 1:

    onnx2tf -i model.onnx -oiqt -cind "{input_name}" images_nhwc.npy "{zeros}" "{ones}"
"""


def _hailo() -> str:
    return f"""# Hailo

{_NOT_RUN}
Needs Hailo's Dataflow Compiler. The array is normalized already, so the model script adds no
normalization:

    import numpy as np
    from hailo_sdk_client import ClientRunner
    runner = ClientRunner(hw_arch="hailo8")
    runner.translate_onnx_model("model.onnx", "model")
    runner.optimize(np.load("images_nhwc.npy"))
    open("model.hef", "wb").write(runner.compile())
"""
