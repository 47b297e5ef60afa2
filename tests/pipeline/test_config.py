"""Settings from files, the settings written, the overview, completions, colours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import main
from pipeline.usage import overview

FAST = ["--num-images", "16", "--iterations", "3", "--mean", "0.5", "--std", "0.5"]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def digits(digits_models, tmp_path) -> Path:
    return Path(shutil.copy(digits_models / "digits_mobilenet.onnx", tmp_path / "digits.onnx"))


def dumped(capsys, *arguments) -> str:
    assert main([*map(str, arguments), "--dump-config"]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_dumped_settings_give_the_same_bytes(digits, tmp_path, capsys):
    flags = ["--weights", "4", "--no-flip", "--bits", "@first=W8", "--slack", "0.5", *FAST]
    path = tmp_path / "run.toml"
    path.write_text(dumped(capsys, "quantize", digits, "-o", tmp_path / "a.onnx", *flags))
    assert path.read_text() == dumped(capsys, "quantize", "--config", path)
    assert main(["quantize", str(digits), "-o", str(tmp_path / "b.onnx"), *flags]) == 0
    assert main(["quantize", f"--config={path}"]) == 0
    first, second = ((tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert first == second


@pytest.mark.parametrize("command", sorted(cli._COMMANDS))
def test_every_command_writes_settings_that_it_reads(command, tmp_path, capsys):
    needed = {
        "targets": ["list"],
        "completions": ["bash"],
        "export": ["--target", "qonnx"],
    }.get(command, [])
    path = tmp_path / "run.toml"
    path.write_text(dumped(capsys, command, *needed))
    tomllib.loads(path.read_text())
    assert path.read_text() == dumped(capsys, command, "--config", path)


def test_flags_win_over_the_file_both_ways(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(
        "model = 'a.onnx'\nweights = 4\nequalization = true\npixel_prior = false\n"
        "bits = ['@first=W8']\nmean = [0.5, 0.25, 1]\nstd = [1, 1, 1]\n"
        "activations = 4\n[quantize]\nactivations = 16\n[evaluate]\nlimit = 3\n"
    )
    read = tomllib.loads(dumped(capsys, "quantize", "--config", path))
    assert (read["model"], read["weights"], read["activations"]) == ("a.onnx", 4, 16)
    assert read["mean"] == ["0.5", "0.25", "1"]
    assert (read["equalization"], read["pixel-prior"]) == (True, False)
    flags = "b.onnx --weights 3 --no-equalization --pixel-prior --bits @last=W8".split()
    won = tomllib.loads(dumped(capsys, "quantize", *flags, "--config", path))
    assert (won["model"], won["weights"], won["bits"]) == ("b.onnx", 3, ["@last=W8"])
    assert (won["equalization"], won["pixel-prior"]) == (False, True)
    # A flag that says what the file says is no error.
    assert main(["quantize", "--equalization", "--config", str(path), "--dump-config"]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wieghts = 4", ["unknown setting 'wieghts'", "did you mean 'weights'?"]),
        ("config = 'b.toml'", ["unknown setting 'config'"]),
        ("weights = 5", ["weights: 5 is not one of 8, 4, 3, 2"]),
        ("weights = true", ["weights: true is not one of"]),
        ("num-images = '64'", ['num-images: "64" is not a whole number']),
        ("flip = 1", ["flip: 1 is not true or false"]),
        ("num-images = -1", ["run.toml: --num-images", "0 or more"]),
        ("qdrop = 'much'", ["qdrop", "is not a number"]),
        ("bits = [[1]]", ["bits: [1] is not a text"]),
        ("[quantise]\nweights = 4", ["[quantise]", "did you mean 'quantize'?"]),
        ("weights 4", ["is no TOML", "--dump-config"]),
        ("\x00", ["is no TOML"]),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(text, words, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(text)
    line = refused(capsys, "quantize", "a.onnx", "--config", path)
    assert "run.toml" in line
    for word in words:
        assert word in line


def test_a_file_that_is_not_there(tmp_path, capsys):
    line = refused(capsys, "quantize", "a.onnx", "--config", tmp_path / "absent.toml")
    assert "absent.toml: cannot be read: No such file" in line
    assert "--config" in refused(capsys, "quantize", "a.onnx", "--config")
    assert "Missing" in refused(capsys, "quantize", "--config", os.devnull)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("quantiz a.onnx", "there is no command 'quantiz'; did you mean quantize?"),
        (
            "quantize a --wieghts 4",
            "quantize has no option --wieghts; did you mean --weights?",
        ),
        (
            "quantize a --weights 5",
            "--weights: '5' is not one of 8, 4, 3, 2; see zsq quantize",
        ),
        ("quantize a --num-images x", "--num-images: invalid literal for int()"),
        ("quantize a b", "quantize has no argument b; see zsq quantize --help"),
    ],
)
def test_errors_of_usage_name_the_remedy(arguments, line, capsys):
    assert refused(capsys, *arguments.split()).startswith(f"zsq: {line}")


def test_help_has_a_line_a_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted(cli._COMMANDS)
    assert named[:2] == ["quantize", "evaluate"]
    for name, kind in cli._COMMANDS.items():  # a new command needs a line of its own
        assert f"{name} {kind.__doc__.splitlines()[0]}" not in " ".join(text.split())
    assert "frobs" in overview({"frob": type("Frob", (), {"__doc__": "It frobs."})})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_are_read_by_the_shell(shell, tmp_path, capsys):
    assert main(["completions", shell]) == 0
    script = tmp_path / "completions"
    script.write_text(capsys.readouterr().out)
    assert "quantize" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here to read it")
    subprocess.run([shell, "-n", script], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_flags(tmp_path, capsys):
    assert main(["completions", "bash"]) == 0
    script = tmp_path / "completions"
    script.write_text(capsys.readouterr().out)
    ask = f"""source {script}
        complete_words() {{ COMP_WORDS=("$@"); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=()
            "$(complete -p zsq | sed 's/.*-F \\([^ ]*\\).*/\\1/')" zsq "${{!#}}" zsq
            echo "${{COMPREPLY[@]}}"; }}
        complete_words zsq quant
        complete_words zsq quantize --round"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    commands, flags = done.stdout.splitlines()
    assert commands.split() == ["quantize"]
    assert {"--rounding", "--rounding-iterations"} <= set(flags.split())


def test_no_colours_where_there_is_no_terminal(digits):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    for arguments in (["inspect", digits], ["quantize", "--help"], ["inspect", "absent.onnx"]):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *arguments],
            capture_output=True,
            env=environment,
            check=False,
        )
        assert b"\x1b" not in done.stdout + done.stderr


def test_json_is_all_of_stdout_for_small_commands(digits, capsys):
    for arguments in (["inspect", str(digits)], ["targets", "list"], ["completions", "zsh"]):
        assert main([*arguments, "--json"]) == 0
        json.loads(capsys.readouterr().out)
    for arguments in (["inspect", str(digits)], ["targets", "list"]):
        assert main([*arguments, "--quiet"]) == 0
        assert capsys.readouterr().out == ""
