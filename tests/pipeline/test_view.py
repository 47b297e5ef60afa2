"""zsq view: what is found beside a file, what is served, and how it ends."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from graph_tools.errors import SettingsError, ZsqError
from pipeline.view import find_shown, open_viewer

needs_netron = pytest.mark.skipif(
    importlib.util.find_spec("netron") is None,
    reason="needs netron: pip install onnx-zsq[view]",
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A float and a quantized file, a report of theirs beside the second."""
    source, quantized = tmp_path / "net.onnx", tmp_path / "out" / "q.onnx"
    source.write_bytes(b"float")
    (tmp_path / "out" / "q").mkdir(parents=True)
    quantized.write_bytes(b"quantized")
    (tmp_path / "out" / "q" / "report.html").write_text("<title>the report</title>")
    model = {"path": str(source), "sha256": hashlib.sha256(b"float").hexdigest()}
    (tmp_path / "out" / "q" / "report.json").write_text(json.dumps({"model": model}))
    return source, quantized


def fetch(address: str, **headers: str) -> http.client.HTTPResponse:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request("GET", parts.path or "/", headers=headers)
    return connection.getresponse()


def test_the_report_names_the_float_network(files):
    source, quantized = files
    shown = find_shown([quantized])
    assert shown.graphs == (("float", source), ("quantized", quantized))
    assert shown.report == quantized.with_suffix("") / "report.html"
    moved = source.rename(quantized.with_name("net.onnx"))
    assert find_shown([quantized]).graphs[0] == ("float", moved)
    moved.write_bytes(b"another network")
    assert find_shown([quantized]).graphs == (("quantized", quantized),)
    assert find_shown([moved]).graphs == (("model", moved),)


def test_two_files_are_float_and_quantized(files, tmp_path):
    source, quantized = files
    shown = find_shown([source, quantized])
    assert [what for what, _ in shown.graphs] == ["float", "quantized"]
    assert shown.report is not None
    with pytest.raises(ZsqError, match="no such file"):
        find_shown([tmp_path / "absent.onnx"])
    with pytest.raises(SettingsError, match="3 files"):
        find_shown([source] * 3)


def test_without_netron_one_line_says_how_to_get_it(files, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZsqError, match=r"pip install 'onnx-zsq\[view\]'") as caught:
        with open_viewer(find_shown(files)):
            pass
    assert "\n" not in str(caught.value)


@needs_netron
def test_graphs_and_report_are_served_to_this_machine_alone(files):
    with open_viewer(find_shown(files)) as viewer:
        addresses = dict(viewer.addresses)
        assert list(addresses) == ["float", "quantized", "both", "report"]
        for what, content in (("float", b"float"), ("quantized", b"quantized")):
            page = fetch(addresses[what])
            text = page.read().decode()
            assert "connect-src 'self'" in page.headers["Content-Security-Policy"]
            assert '<meta name="version" content="0.0.0">' in text  # reports no usage
            assert 'name="date"' not in text  # does not expire
            name = "net.onnx" if what == "float" else "q.onnx"
            assert fetch(f"{addresses[what]}data/{name}").read() == content
        both = fetch(viewer.start).read().decode()
        for what in ("float", "quantized"):
            assert f'src="{addresses[what]}"' in both
        assert fetch(addresses["report"]).read() == b"<title>the report</title>"
        assert fetch(f"{viewer.start}other").status == 404
        for address in addresses.values():
            assert fetch(address, Host="evil.example").status == 403
    for address in addresses.values():
        with pytest.raises(OSError, match="refused"):
            fetch(address)


@needs_netron
def test_ctrl_c_is_a_clean_end(files):
    words = [sys.executable, "-m", "pipeline.cli", "view", str(files[1]), "--no-browser"]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(5)]
        assert [line.split()[0] for line in lines[:4]] == [
            "float",
            "quantized",
            "both",
            "report",
        ]
        address = lines[0].split()[1]
        assert fetch(address).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    with pytest.raises(OSError, match="refused"):
        fetch(address)
