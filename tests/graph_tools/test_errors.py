from __future__ import annotations

import inspect

from graph_tools import errors
from graph_tools.errors import UnsupportedOperatorError, ZsqError


def test_message_says_where_what_and_what_to_do_on_one_line():
    error = ZsqError("two\nlines", where="model.onnx", hint="re-export it")
    assert str(error) == "model.onnx: two lines; re-export it"


def test_names_of_any_length_stay_readable():
    path = "a/" * 150 + "model.onnx"
    error = ZsqError(f"operator first{'x' * 9999}last", where=path)
    assert str(error).startswith(f"{path}: operator firstxxx")
    assert str(error).endswith("xxxlast")
    assert len(str(error)) < 800


def test_all_missing_operators_are_named_at_once():
    error = UnsupportedOperatorError(("B", "A", "B"), where="m")
    assert error.missing == ("A", "B")
    assert "A, B" in str(error)


def test_every_error_is_a_zsq_error_and_public():
    classes = {name for name, value in inspect.getmembers(errors, inspect.isclass)}
    assert set(errors.__all__) == classes
    assert all(issubclass(getattr(errors, name), ZsqError) for name in classes)
