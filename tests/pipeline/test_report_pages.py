"""The report in a browser: nothing overflows or complains, tables sort and filter, paper is whole.

Needs a Chromium (or $CHROMIUM); the pages of all states are opened at the width of a phone and of
a desktop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report import write_report
from pipeline.report_targets import describe_targets
from tests.browser import Browser, find_chromium, open_browser
from tests.pipeline.test_report import (
    SECTIONS,
    make_agreement,
    make_images,
    make_proof,
    make_report,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs chromium, or $CHROMIUM"),
]

WIDTHS = {"phone": 390, "desktop": 1280}


def _passed(report: dict[str, Any]) -> None:
    report["targets"] = describe_targets(make_agreement())


def _failed(report: dict[str, Any]) -> None:
    failure = "logits: 12 elements differ between the unoptimized and the optimized run"
    report["proof"] = make_proof(differing=12, failures=(failure,)).to_dict()
    report["warnings"] = ["the proof failed: see the proof section"]


def _warnings(report: dict[str, Any]) -> None:
    report["quantization"]["outputs"][0]["sqnr_db"] = 4.2
    report["warnings"] = [
        "normalization was guessed: the first BatchNormalization; give --mean and --std if wrong",
        "output " + "/a_name/without/end" * 9 + " has an SQNR of only 4.2 dB",
    ]
    report["evaluation"] = None
    report["fidelity"]["estimate"] = {"drop": 9.1, "low": 5.2, "high": 13.0, "note": "So far."}


def _no_batch_norm(report: dict[str, Any]) -> None:
    report["generation"] |= {
        "method": "prior",
        "statistics": [],
        "iterations": 0,
        "history": [],
    }
    report["model"] |= {"num_batch_norms": 0, "notes": []}
    report["evaluation"] = None


def _detection(report: dict[str, Any]) -> None:
    histogram = report["quantization"]["outputs"][0]["histogram"]
    report["quantization"]["outputs"] = [
        {"name": f"head_{i}/scores_and_boxes", "sqnr_db": 20.0 + i, "agreement": None,
         "same_top1": None, "histogram": histogram}
        for i in range(6)
    ]  # fmt: skip
    report["quantization"]["float"] = [
        {
            "node": f"/decode/step_{i}",
            "op_type": "Mul",
            "reason": "behind the last convolution",
        }
        for i in range(30)
    ]
    report["evaluation"] = None
    report["fidelity"] = {
        "measures": [
            {"kind": "calibration", "images": 64, "agreement": None, "sqnr_db": 20.0},
            {"kind": "prior", "images": 64, "agreement": None, "sqnr_db": 17.5},
        ],
        "estimate": None,
        "why": "The network does not have one output of class scores.",
    }


STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "passed": _passed,
    "failed": _failed,
    "warnings": _warnings,
    "no batch norm": _no_batch_norm,
    "detection": _detection,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    assert chromium is not None
    with open_browser(chromium) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, change in STATES.items():
        report = make_report()
        change(report)
        side = 224 if name == "detection" else 32
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        found[name] = write_report(folder, report, make_images(64, side))
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_fits_its_window_without_complaint(
    browser: Browser, pages: dict[str, Path], state: str, width: str
) -> None:
    for dark in (False, True):
        browser.open(pages[state], width=WIDTHS[width], dark=dark)
        assert browser.run("document.documentElement.scrollWidth") == WIDTHS[width]
        assert browser.complaints == []
    # What sticks out of its own box without a scroll bar would be cut off.
    wide = """[...document.querySelectorAll('body *')].filter((e) =>
        !e.closest('.scroll, nav, svg, details:not([open]), .skip, thead') &&
        e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.run(wide) == []
    shown = browser.run(
        "[...document.querySelectorAll('section')].map((s) => [s.id, s.offsetHeight])"
    )
    assert [name for name, _ in shown] == SECTIONS
    assert min(height for _, height in shown) > 40
    tone = browser.run("getComputedStyle(document.querySelector('.verdict')).borderLeftColor")
    assert tone != browser.run("getComputedStyle(document.body).color")


def names(browser: Browser) -> list[str]:
    return browser.run(
        """[...document.querySelectorAll('#tensors .cards tbody tr')].filter((r) => !r.hidden)
        .map((r) => r.querySelector('.name').textContent)"""
    )


def numbers(browser: Browser, column: int) -> list[float]:
    return browser.run(
        f"""[...document.querySelectorAll('#tensors .cards tbody tr')].filter((r) => !r.hidden)
        .map((r) => r.cells[{column}].dataset.value).filter((v) => v !== '').map(Number)"""
    )


def test_tensors_can_be_sorted_and_filtered(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["passed"], width=1280)
    everything = names(browser)
    assert len(everything) == 57
    head = "document.querySelectorAll('#tensors .cards th button')"
    browser.run(f"{head}[1].click()")  # SQNR
    ascending = numbers(browser, 1)
    assert ascending == sorted(ascending)
    assert ascending != sorted(ascending, reverse=True)
    browser.run(f"{head}[1].click()")
    assert numbers(browser, 1) == sorted(ascending, reverse=True)
    assert (
        browser.run("document.querySelector('#tensors .cards th[aria-sort]').ariaSort")
        == "descending"
    )
    browser.run(f"{head}[0].click()")
    assert sorted(names(browser)) == sorted(everything)
    write = """(text) => { const f = document.querySelector('#tensors .filter');
        f.value = text; f.dispatchEvent(new Event('input')); }"""
    browser.run(f"({write})('BLOCK3/conv')")
    assert len(names(browser)) == 9  # three layers, three kinds
    assert all("block3/conv" in name for name in names(browser))
    assert browser.run("document.querySelector('#tensors .count').textContent") == "9 of 57"
    browser.run("document.querySelector('#tensors .kinds button:nth-child(3)').click()")
    assert names(browser) == [name for name in names(browser) if name.endswith("_weight")]
    assert len(names(browser)) == 3
    browser.run(f"({write})('nothing is called that')")
    assert names(browser) == []


def test_on_a_phone_rows_are_cards_that_a_menu_sorts(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["passed"], width=390)
    assert browser.run("document.querySelector('.cards').scrollWidth <= 390")
    columns = browser.run(
        "getComputedStyle(document.querySelector('.cards tbody tr')).display"
    )
    assert columns == "grid"
    browser.run(
        """(() => { const s = document.querySelector('#tensors .order');
        s.value = '1 -1'; s.dispatchEvent(new Event('change')); })()"""
    )
    values = numbers(browser, 1)
    assert values == sorted(values, reverse=True)


def test_the_theme_follows_the_system_until_it_is_chosen(
    browser: Browser, pages: dict[str, Path]
) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 28)"
    browser.open(pages["passed"], width=1280)
    assert browser.run(background) == light
    browser.open(pages["passed"], width=1280, dark=True)
    assert browser.run(background) == dark
    browser.run("document.querySelector('.theme').click()")
    assert browser.run(background) == light
    browser.run("localStorage.clear()")


def test_everything_can_be_reached_by_keyboard(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["passed"], width=1280)
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left >= 0")
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "theme"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.run("document.querySelector('#sensitivity summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('#sensitivity details').open")


def test_commands_are_copied(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["passed"], width=1280)
    assert browser.run("document.querySelectorAll('.copy').length") == 5
    browser.run(
        """(() => { window.copied = []; navigator.clipboard.writeText =
        (t) => { window.copied.push(t); return Promise.resolve(); }; })()"""
    )
    browser.run("document.querySelector('#reproduce .copy').click()")
    (copied,) = browser.run("window.copied")
    assert copied == make_report()["command"]


def test_paper_has_everything(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    browser.open(pages["passed"], width=1280, dark=True)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelectorAll('details:not([open])').length") > 0
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert (
        browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    assert browser.run(
        "getComputedStyle(document.querySelector('.scroll.tall')).overflow"
    ) == ("visible")
    browser.send("Emulation.setEmulatedMedia", media="")
    browser.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") > 3


def test_a_picture_of_each_state_is_not_blank(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    for state, page in pages.items():
        browser.open(page, width=390)
        browser.screenshot(tmp_path / "state.png", height=900)
        pixels = np.asarray(Image.open(tmp_path / "state.png").convert("L"))
        assert pixels.shape == (900, 390), state
        assert len(np.unique(pixels)) > 50, state
