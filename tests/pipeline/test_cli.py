"""The command line as a user meets it: results, exit codes, one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from graph_tools.batchnorm import fold_batch_norms
from graph_tools.model import load, save
from pipeline.cli import main

FAST = ["--num-images", "16", "--iterations", "3", "--mean", "0.5", "--std", "0.5"]


@pytest.fixture
def digits(digits_models, tmp_path) -> Path:
    return Path(shutil.copy(digits_models / "digits_mobilenet.onnx", tmp_path / "digits.onnx"))


@pytest.fixture
def held_out(tmp_path) -> Path:
    """Labelled images of the right shape; what they show does not matter here."""
    rng = np.random.default_rng(0)
    path = tmp_path / "held_out.npz"
    pixels = rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(30) % 10)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refuse(capsys, folder: Path, *arguments) -> str:
    """The one line of an error; nothing may have been written."""
    before = sorted(folder.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2, err
    assert out == ""
    assert err.startswith("zsq: ")
    assert err.count("\n") == 1, err
    assert sorted(folder.rglob("*")) == before
    return err


def test_quantize_leaves_a_model_and_a_folder(digits, held_out, capsys):
    code, out, err = run(capsys, "quantize", digits, "--evaluate", held_out, *FAST)
    assert code == 0, err
    output = digits.with_name("digits.w8a8.onnx")
    folder = digits.with_name("digits.w8a8")
    assert sorted(p.name for p in folder.iterdir()) == [
        "images.npz",
        "plan.json",
        "plan.safetensors",
        "report.html",
        "report.json",
        "run.json",
    ]
    assert not [p for p in digits.parent.iterdir() if p.name.startswith(".")]
    assert "W8A8, power of two, proved bit-exact" in out
    report = json.loads((folder / "report.json").read_text())
    assert report["proof"]["passed"]
    assert report["proof"]["scales"]["power_of_two"]
    assert len(report["evaluation"]) == 2
    assert report["generation"]["num_images"] == 16
    assert np.load(folder / "images.npz")["images"].shape == (16, 1, 8, 8)
    written = onnx.load(output)
    assert {p.key for p in written.metadata_props} >= {"zsq.settings", "zsq.source_sha256"}
    floats = [entry["node"] for entry in report["proof"]["kernels"]["float"]]
    operators = {n.name: n.op_type for n in written.graph.node}
    computing = {"Conv", "Gemm", "Add", "GlobalAveragePool"}
    assert not [n for n in floats if operators.get(n) in computing]


def test_academic_scheme_with_free_scales_and_widths_in_4_bit_types(digits, capsys):
    output = digits.with_name("q.onnx")
    options = [
        "--weights",
        4,
        "--activations",
        4,
        "--scheme",
        "academic",
        "--container",
        "int4",
    ]
    options += ["--weight-scale", "free", "--bits", "@first=W4", "--bits", "*residual.0*=W2A8"]
    code, out, err = run(capsys, "quantize", digits, "-o", output, *options, *FAST)
    assert code == 0, out + err
    assert "W4A4, free weight scales" in out
    assert "power of two, " not in out
    assert "(academic scheme)" in out
    report = json.loads((output.with_suffix("") / "report.json").read_text())
    bits = {
        t["node"]: t["bits"]
        for t in report["quantization"]["tensors"]
        if t["kind"] == "weight"
    }
    assert {count for node, count in bits.items() if "residual.0" in node} == {2}
    assert next(iter(bits.values())) == 4
    assert [node for node, count in bits.items() if count == 8] == [list(bits)[-1]]
    assert report["settings"]["bits"] == ["@first=W4", "*residual.0*=W2A8"]
    types = {entry.data_type for entry in onnx.load(output).graph.initializer}
    assert types >= {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8}
    code, out, _ = run(capsys, "verify", output)
    assert code == 0
    assert "are free, as the file says" in out


def test_widths_for_nothing_are_refused(digits, capsys):
    err = refuse(capsys, digits.parent, "quantize", digits, "--bits", "stem=W4", *FAST)
    assert "nearest: /stem" in err
    err = refuse(capsys, digits.parent, "quantize", digits, "--bits", "@first=W5", *FAST)
    assert "W2, W3, W4, W8" in err


def test_the_same_seed_gives_the_same_bytes(digits, capsys):
    outputs = []
    for name in ("a.onnx", "b.onnx"):
        output = digits.with_name(name)
        assert run(capsys, "quantize", digits, "-o", output, "--seed", 3, *FAST)[0] == 0
        outputs.append(
            (output.read_bytes(), (output.with_suffix("") / "images.npz").read_bytes())
        )
    assert outputs[0] == outputs[1]
    other = digits.with_name("c.onnx")
    assert run(capsys, "quantize", digits, "-o", other, "--seed", 4, *FAST)[0] == 0
    assert (other.with_suffix("") / "images.npz").read_bytes() != outputs[0][1]


def test_json_is_all_that_stdout_holds(digits, held_out, capsys):
    code, out, _ = run(capsys, "quantize", digits, "--json", *FAST)
    assert code == 0
    assert json.loads(out)["quantization"]["power_of_two"]
    quantized = digits.with_name("digits.w8a8.onnx")
    for arguments in (
        ["inspect", digits],
        ["verify", quantized],
        ["evaluate", digits, quantized, "--data", held_out, "--mean", "0.5", "--std", "0.5"],
        ["expose", digits, "-o", digits.with_name("exposed.onnx")],
        ["generate", digits, "-o", digits.with_name("images.npz"), *FAST],
    ):
        code, out, err = run(capsys, *arguments, "--json")
        assert code == 0, err
        json.loads(out)


def test_the_normalization_is_said_and_doubted(digits, tmp_path, capsys):
    """The network takes -1..1 by its metadata."""
    words = [
        "generate",
        digits,
        "-o",
        tmp_path / "i.npz",
        "--method",
        "noise",
        "--num-images",
        2,
    ]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "normalization: mean 0.5, std 0.5, channels rgb, source model metadata" in out
    code, out, err = run(capsys, *words, "--range", "0,255", "--json")
    assert code == 0
    assert "contradicts the first BatchNormalization" in json.loads(out)["warnings"][0]
    assert json.loads(out)["preprocessing"]["std"] == pytest.approx([1 / 255])
    for given in (["--range=-1,1"], ["--range", "-1,1"]):
        code, out, err = run(capsys, *words, *given, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["preprocessing"]["mean"] == [0.5]
        assert json.loads(out)["warnings"] == []
    for wrong in ("1,0", "1", "a,b", "0,1,2", "0,inf"):
        assert "two numbers, the first one less" in refuse(
            capsys, tmp_path, *words, f"--range={wrong}"
        )
    both = ["--range", "0,1", "--mean", "0", "--std", "1"]
    assert "--mean and --std say the same otherwise" in refuse(capsys, tmp_path, *words, *both)


def test_quiet_says_nothing(digits, capsys):
    assert run(capsys, "quantize", digits, "--quiet", *FAST) == (0, "", "")


def test_exposed_tensors_are_outputs(digits, capsys):
    exposed = digits.with_name("exposed.onnx")
    assert run(capsys, "expose", digits, "-o", exposed)[0] == 0
    model = onnx.load(exposed)
    norms = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    assert [n.input[0] for n in norms] == [o.name for o in model.graph.output][1:]


def test_an_interrupted_quantization_does_not_make_its_images_again(
    digits, tmp_path, capsys, monkeypatch
):
    words = ["quantize", digits, "-o", tmp_path / "out.onnx", "--checkpoint-every", 2, *FAST]
    assert run(capsys, *words)[0] == 0
    images = (tmp_path / "out" / "images.npz").read_bytes()
    written = (tmp_path / "out.onnx").read_bytes()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out.onnx").unlink()
    before = sorted(tmp_path.iterdir())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.quantize", interrupted)
        code, _, err = run(capsys, *words)
    assert code == 130
    assert "checkpoints are kept; --resume goes on" in err
    kept = tmp_path / ".out.onnx.checkpoint"
    assert sorted(tmp_path.iterdir()) == sorted([*before, kept])

    monkeypatch.setattr("pipeline.generate.loop.Step", interrupted)
    code, out, err = run(capsys, *words, "--resume", "--json")
    assert code == 0, err
    assert "went on from the checkpoint at iteration 3" in out
    assert (tmp_path / "out" / "images.npz").read_bytes() == images
    assert (tmp_path / "out.onnx").read_bytes() == written
    assert not kept.exists()


def test_images_and_data_replace_generation(digits, tmp_path, capsys):
    pictures = tmp_path / "pictures" / "one"
    pictures.mkdir(parents=True)
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    given = ["--mean", "0.5", "--std", "0.5"]
    assert run(capsys, "quantize", digits, "--data", tmp_path / "pictures", *given)[0] == 0
    images = digits.with_name("digits.w8a8") / "images.npz"
    assert np.load(images)["images"].shape == (4, 1, 8, 8)
    output = digits.with_name("again.onnx")
    assert run(capsys, "quantize", digits, "--images", images, "-o", output, *given)[0] == 0
    first = digits.with_name("digits.w8a8") / "plan.json"
    assert first.read_bytes() == (output.with_suffix("") / "plan.json").read_bytes()


def test_a_network_without_batch_norm_names_the_remedies(make_model, tmp_path, capsys):
    make_model(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w) }",
        w=np.ones((4, 3, 3, 3), np.float32),
    )
    path = tmp_path / "built.onnx"
    err = refuse(capsys, tmp_path, "quantize", path, "--method", "dgh")
    for remedy in ("--bn-from", "PRESERVE", "optimize=False", "--data", "--method noise"):
        assert remedy in err
    assert run(capsys, "quantize", path, "--method", "noise", *FAST)[0] == 0


def test_without_batch_norm_a_prior_steps_in_and_says_so(digits, tmp_path, capsys):
    folded = tmp_path / "folded.onnx"
    save(fold_batch_norms(load(digits)).proto, folded)
    code, out, err = run(capsys, "quantize", folded, *FAST)
    assert code == 0
    assert err.startswith("zsq: warning: no BatchNormalization: images from an image prior")
    assert err.count("\n") == 1
    assert "images from an image prior" in out
    report = json.loads((tmp_path / "folded.w8a8" / "report.json").read_text())
    assert report["generation"]["method"] == "prior"
    assert report["warnings"][0] == report["generation"]["warnings"][0]
    assert report["restoration"] is None
    page = (tmp_path / "folded.w8a8" / "report.html").read_text()
    assert "accuracy cannot be promised" in page
    properties = {
        p.key: p.value for p in onnx.load(tmp_path / "folded.w8a8.onnx").metadata_props
    }
    assert properties["zsq.images"] == "16 generated (prior)"
    assert run(capsys, "generate", folded, "-o", tmp_path / "x.npz", "--quiet", *FAST) == (
        0,
        "",
        "",
    )


def test_statistics_from_a_side_file_give_the_same_images(digits, tmp_path, capsys):
    folded = tmp_path / "folded.onnx"
    save(fold_batch_norms(load(digits)).proto, folded)
    code, out, err = run(capsys, "quantize", folded, "--bn-from", digits, *FAST)
    assert code == 0
    assert all("hardly nearer" in line for line in err.splitlines())  # after so few steps
    assert out.startswith("17 of 17 BatchNormalization restored from digits.onnx")
    assert "restored from a side file" in out
    assert run(capsys, "quantize", digits, *FAST)[0] == 0
    kept, restored = (
        np.load(tmp_path / f"{name}.w8a8" / "images.npz")["images"]
        for name in ("digits", "folded")
    )
    np.testing.assert_allclose(restored, kept, atol=1e-4)
    report = json.loads((tmp_path / "folded.w8a8" / "report.json").read_text())
    restoration = report["restoration"]
    assert (
        restoration["restored"]
        == restoration["candidates"]
        == report["model"]["num_batch_norms"]
    )
    assert {match["state"] for match in restoration["matches"]} == {"restored", "unchanged"}
    page = (tmp_path / "folded.w8a8" / "report.html").read_text()
    assert "BatchNormalization restored" in page
    code, out, _ = run(
        capsys,
        "generate",
        folded,
        "--bn-from",
        digits,
        "-o",
        tmp_path / "x.npz",
        "--json",
        *FAST,
    )
    assert code == 0
    assert json.loads(out)["restoration"]["restored"] == restoration["restored"]


def test_a_side_file_of_another_network_is_one_line(digits, digits_models, tmp_path, capsys):
    folded = tmp_path / "folded.onnx"
    save(fold_batch_norms(load(digits)).proto, folded)
    other = digits_models / "digits_resnet.onnx"
    err = refuse(capsys, tmp_path, "quantize", folded, "--bn-from", other)
    assert "nothing in it belongs to this network" in err


def test_a_failed_proof_exits_with_one(digits, tmp_path, capsys):
    assert run(capsys, "quantize", digits, *FAST)[0] == 0
    path = digits.with_name("digits.w8a8.onnx")
    model = onnx.load(path)
    scale = next(i for i in model.graph.initializer if i.name.endswith(".weight_scale"))
    values = onnx.numpy_helper.to_array(scale) * np.float32(1.1)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(model, path)
    code, out, _ = run(capsys, "verify", path, "--max-images", 4)
    assert code == 1
    assert scale.name in out


def _bad_models(folder: Path, digits: Path) -> dict[str, tuple[Path, str]]:
    model = onnx.load(digits)
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "truncated.onnx").write_bytes(digits.read_bytes()[:5000])
    (folder / "text.onnx").write_text("not a network")
    weight = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    broken.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(broken, folder / "nan.onnx")
    return {
        "missing": (folder / "missing.onnx", "no such file"),
        "empty": (folder / "empty.onnx", ""),
        "truncated": (folder / "truncated.onnx", ""),
        "text": (folder / "text.onnx", ""),
        "nan": (folder / "nan.onnx", "NaN"),
    }


@pytest.mark.parametrize(
    ("command", "case"),
    [
        *((c, k) for c in ("inspect", "quantize") for k in ("missing", "empty", "nan")),
        *((c, k) for c in ("expose", "verify") for k in ("missing", "empty")),
        *((c, k) for c in ("inspect", "quantize", "verify") for k in ("truncated", "text")),
    ],
)
def test_bad_models_are_refused(digits, tmp_path, capsys, case, command):
    path, word = _bad_models(tmp_path, digits)[case]
    output = ["-o", tmp_path / "out.onnx"] if command == "expose" else []
    assert word in refuse(capsys, tmp_path, command, path, *output)


def test_other_bad_input_is_refused(digits, held_out, tmp_path, capsys):
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, images=np.zeros((2, 3, 8, 8), np.float32))
    integers = tmp_path / "integers.npz"
    np.savez(integers, images=np.zeros((2, 1, 8, 8), np.int64))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, word in (
        (["quantize", digits, "--images", wrong], "shape"),
        (["quantize", digits, "--images", integers], "float32"),
        (["quantize", digits, "--data", tmp_path / "nothing"], "nothing"),
        (["quantize", digits, "--data", tmp_path / "absent"], "absent"),
        (["quantize", digits, "-o", tmp_path / "absent" / "q.onnx"], "absent"),
        (["quantize", digits, "-o", tmp_path / "q.txt"], "q.txt"),
        (["quantize", digits, "-o", digits], "is the input"),
        (["quantize", digits, "--num-images", "-1"], "--num-images"),
        (["quantize", digits, "--weights", "5"], "5"),
        (["quantize", digits, "--mean", "0.5"], "--mean"),
        (["quantize", digits, "--mean", "a", "--std", "1"], "--mean"),
        (["quantize", digits, "--input-shape", "1,2"], "--input-shape"),
        (["quantize", digits, "--mean", "1,2,3", "--std", "1"], "--mean"),
        (["quantize", digits, "--device", "gpu7"], "--device"),
        (["quantize"], "Missing"),
        (["generate", digits, "-o", tmp_path / "images.txt"], "images.txt"),
        (["generate", digits, "-o", tmp_path / "absent" / "i.npz"], "absent"),
        (["expose", digits, "-o", tmp_path / "absent" / "e.onnx"], "absent"),
        (["verify", digits], "not quantized"),
        (["evaluate", digits, "--data", tmp_path / "nothing"], "nothing"),
        (["evaluate", digits, "--data", held_out, "--task", "poetry"], "poetry"),
        (["frobnicate"], "frobnicate"),
        ([], "subcommand"),
    ):
        assert word in refuse(capsys, tmp_path, *arguments), arguments


def test_a_quantized_model_is_not_quantized_again(digits, tmp_path, capsys):
    assert run(capsys, "quantize", digits, *FAST)[0] == 0
    quantized = digits.with_name("digits.w8a8.onnx")
    assert "already quantized" in refuse(capsys, tmp_path, "quantize", quantized)


def test_help_is_no_error(capsys):
    assert main(["--help"]) == 0
    assert main(["quantize", "--help"]) == 0
    assert "--num-images" in capsys.readouterr().out


def test_a_target_size_is_met_and_reported(digits, capsys):
    code, out, err = run(capsys, "quantize", digits, "--target-size", "0.4x", *FAST)
    assert code == 0, err
    report = json.loads((digits.parent / "digits.wmixeda8" / "report.json").read_text())
    mixed = report["quantization"]["mixed_precision"]
    assert mixed["size"] <= mixed["budget"] == int(0.4 * mixed["size_w8"])
    assert f"packed weights: {mixed['size']:,} bytes of {mixed['budget']:,} allowed" in out
    bits = {t["name"]: t["bits"] for t in report["quantization"]["tensors"]}
    for weight, layer in mixed["layers"].items():
        assert bits[weight] == layer["bits"]
        assert list(layer["errors"]) == ["8", "4", "3", "2"]


def test_an_impossible_target_size_says_the_least_possible(digits, tmp_path, capsys):
    line = refuse(capsys, tmp_path, "quantize", digits, "--target-size", "3kB", *FAST)
    assert (
        "--target-size: 3kB is 3,000 bytes of packed weights, and the least possible" in line
    )
