"""``zsq view``: the float and the quantized graph side by side in netron, and the report.

Netron serves one model a process, so each file gets one; what the browser opens is passed through
a server of our own, which answers this machine only. Netron's pages report usage to their author,
and ask for an update when they are half a year old; here they do neither, and may ask nothing of
others.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from markupsafe import escape

from graph_tools.errors import SettingsError, ZsqError

__all__ = ["Shown", "Viewer", "find_shown", "open_viewer"]

_HOST = "127.0.0.1"  # not localhost, where a netron of the user's own has its cookies
_STARTED = 20.0  # seconds that netron gets
_NETRON = (
    "import sys, netron; netron.start(sys.argv[1], (sys.argv[2], int(sys.argv[3])), browse=False); "
    "netron.wait()"
)
_POLICY = "connect-src 'self'; frame-ancestors http://127.0.0.1:*"
_INDEX = ("/", "/index.html")
_QUIET = (  # version 0.0.0 is a developer's: it reports nothing, and does not expire
    (rb'(<meta name="version" content=")[^"]*', rb"\g<1>0.0.0"),
    (rb'<meta name="date" content="[^"]*">', b""),
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; height: 100vh; display: flex; flex-direction: column; }}
body {{ font: 14px system-ui, sans-serif; }}
header {{ display: flex; flex-wrap: wrap; gap: 0 1.5rem; padding: 0.5rem 1rem; }}
main {{ flex: 1; display: flex; gap: 1px; background: GrayText; }}
section {{ flex: 1; min-width: 0; display: flex; flex-direction: column; background: Canvas; }}
h2 {{ margin: 0; padding: 0.3rem 1rem; font-size: 13px; overflow-wrap: anywhere; }}
iframe {{ flex: 1; border: 0; }}
@media (max-width: 40rem) {{ main {{ flex-direction: column; }} }}
</style></head><body><header><b>{title}</b> {links}</header><main>{frames}</main></body></html>
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to show.

    Attributes:
        graphs: what each file is, and where; one or two.
        report: the page beside one of them, if there is one.
    """

    graphs: tuple[tuple[str, Path], ...]
    report: Path | None


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """Servers that run.

    Attributes:
        addresses: what is where: each graph, both of them, the report.
        start: the one to open first.
    """

    addresses: tuple[tuple[str, str], ...]
    start: str


def find_shown(files: Sequence[Path]) -> Shown:
    """Find what belongs to files: the float network of a quantized one, and the report.

    Args:
        files: a float and a quantized file, or a quantized one, whose report names the other, or
            any one.

    Raises:
        SettingsError: none, or more than two.
        ZsqError: a file that does not exist.
    """
    if not 1 <= len(files) <= 2:
        raise SettingsError(
            f"{len(files)} files given", where="view", hint="give one or two: float, quantized"
        )
    for path in files:
        if not path.is_file():
            raise ZsqError("there is no such file", where=str(path))
    if len(files) == 2:
        report = next((page for path in files[::-1] if (page := _report_of(path))), None)
        return Shown(graphs=(("float", files[0]), ("quantized", files[1])), report=report)
    (path,) = files
    report = _report_of(path)
    if report is None:
        return Shown(graphs=(("model", path),), report=None)
    source = _source_of(report, path)
    graphs = (("float", source),) if source is not None else ()
    return Shown(graphs=(*graphs, ("quantized", path)), report=report)


def _report_of(path: Path) -> Path | None:
    page = path.with_suffix("") / "report.html"
    return page if page.is_file() else None


def _source_of(report: Path, path: Path) -> Path | None:
    """The float network that a report is of: where it was, or beside the quantized file."""
    try:
        model = json.loads(report.with_name("report.json").read_text())["model"]
        named, digest = Path(model["path"]), model["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for found in (named, path.with_name(named.name)):
        with contextlib.suppress(OSError), found.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return found
    return None


@contextlib.contextmanager
def open_viewer(shown: Shown) -> Iterator[Viewer]:
    """Serve graphs and report until the block ends.

    Raises:
        ZsqError: netron is not installed, or does not start.
    """
    if importlib.util.find_spec("netron") is None:
        raise ZsqError(
            "graphs are shown by netron, which is not installed",
            hint="pip install 'onnx-zsq[view]', or open the report in a browser",
        )
    with contextlib.ExitStack() as stack:
        addresses = []
        for what, path in shown.graphs:
            port = stack.enter_context(_netron(path))
            addresses.append((what, stack.enter_context(_serving(_passing_on(port)))))
        pages = {} if shown.report is None else {"/report.html": shown.report.read_bytes()}
        if pages or len(addresses) > 1:
            pages["/"] = _page(shown, addresses, bool(pages)).encode()
            base = stack.enter_context(_serving(_handing_out(pages)))
            if len(addresses) > 1:
                addresses.append(("both", base))
            if shown.report is not None:
                addresses.append(("report", f"{base}report.html"))
            yield Viewer(addresses=tuple(addresses), start=base)
        else:
            yield Viewer(addresses=tuple(addresses), start=addresses[0][1])


def _page(shown: Shown, addresses: Sequence[tuple[str, str]], has_report: bool) -> str:
    names = [path.name for _, path in shown.graphs]
    frames = "".join(
        f'<section><h2>{escape(what)}: {escape(name)}</h2><iframe src="{escape(address)}" '
        f'title="{escape(name)}"></iframe></section>'
        for (what, address), name in zip(addresses, names, strict=True)
    )
    links = '<a href="/report.html" target="_blank">report</a>' if has_report else ""
    title = escape(" and ".join(names))
    return _PAGE.format(title=title, links=links, frames=frames)


@contextlib.contextmanager
def _netron(path: Path) -> Iterator[int]:
    """Run netron on a file, in a process of its own; gives its port."""
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = int(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-c", _NETRON, str(path.resolve()), _HOST, str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us, who end it
    )
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _STARTED
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((_HOST, port), 1):
            return
        time.sleep(0.05)
    raise ZsqError("netron did not start", where=f"port {port}", hint="pip install -U netron")


class _Local(BaseHTTPRequestHandler):
    """Answers only who asks for this machine by name: pages of others cannot read the model."""

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") != f"{_HOST}:{port}":
            self.send_error(403)
            return
        self.answer()

    do_HEAD = do_GET

    def answer(self) -> None:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _passing_on(port: int) -> type[_Local]:
    class Passing(_Local):
        def answer(self) -> None:
            connection = http.client.HTTPConnection(_HOST, port, timeout=60)
            with contextlib.closing(connection):
                connection.request(self.command, quote(self.path, safe="/%?&=+-_.~!'()*,;:@"))
                found = connection.getresponse()
                length, body = found.getheader("Content-Length"), b""
                if self.command == "GET" and self.path in _INDEX:
                    body = found.read()
                    for pattern, instead in _QUIET:
                        body = re.sub(pattern, instead, body)
                    length = str(len(body))
                self.send_response(found.status)
                self.send_header("Content-Type", found.getheader("Content-Type", "text/plain"))
                if length is not None:
                    self.send_header("Content-Length", length)
                self.send_header("Content-Security-Policy", _POLICY)
                # There is nothing to consent to: nothing is reported.
                self.send_header("Set-Cookie", "consent=1; SameSite=Strict")
                self.end_headers()
                self.wfile.write(body)
                shutil.copyfileobj(found, self.wfile)

    return Passing


def _handing_out(pages: dict[str, bytes]) -> type[_Local]:
    class Handing(_Local):
        def answer(self) -> None:
            page = pages.get(self.path)
            if page is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(page)

    return Handing


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A browser that hangs up is no error of ours."""


@contextlib.contextmanager
def _serving(handler: type[_Local]) -> Iterator[str]:
    """Serve on a free port; gives the address."""
    server = _Server((_HOST, 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{_HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
