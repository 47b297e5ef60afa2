"""Put what was found on other compilers into the report that stands beside a file."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from graph_tools.errors import ZsqError
from pipeline.images import open_images
from pipeline.preprocessing import Preprocessing
from pipeline.report import write_report
from pipeline.verify.rows import Agreement

__all__ = ["add_targets", "describe_targets"]

logger = logging.getLogger(__name__)

_SHOWN = 64  # images


def describe_targets(agreement: Agreement) -> dict[str, Any]:
    """The ``targets`` part of a report: `Agreement.to_dict`, each row with its ``note``."""
    rows = [{**row.to_dict(), "note": row.note()} for row in agreement.rows]
    return {**agreement.to_dict(), "rows": rows}


def add_targets(path: Path, agreement: Agreement) -> Path | None:
    """Write the report beside a quantized file anew, with its targets.

    Args:
        path: the file.
        agreement: what was found on the targets.

    Returns:
        The page; None if there is no report of this very file beside it, or it cannot be
        written.
    """
    folder = path.with_suffix("")
    try:
        report = json.loads((folder / "report.json").read_text())
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if report["output"]["sha256"] != digest:
            logger.info("%s is the report of another file", folder)
            return None
        layout = report["model"]["input"]["layout"]
        preprocessing = Preprocessing.from_dict(report["preprocessing"])
        images = next((i for i in folder.glob("images.np[yz]")), None)
        pictures = np.zeros((0, 1, 1, 3), np.uint8)
        if images is not None:
            pictures = preprocessing.invert(open_images(images).load(_SHOWN), layout)
        report["targets"] = describe_targets(agreement)
        return write_report(folder, report, pictures)
    except (OSError, ValueError, KeyError, TypeError, ZsqError) as error:
        logger.info("no report was written anew: %s", error)
        return None
