# make demo   quantize the shipped network without data, prove it, evaluate it, write the report
# make test   the whole test suite
# make lint   ruff and mypy
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint benchmarks clean

demo: $(INSTALLED)
	rm -rf demo && mkdir demo
	$(BIN)/python models/train_digits.py --export-held-out demo/held_out_digits.npz
	cp models/digits_mobilenet.onnx demo/digits.onnx
	$(BIN)/zsq quantize demo/digits.onnx -o demo/digits.w8a8.onnx \
	  --mean 0.5 --std 0.5 --evaluate demo/held_out_digits.npz
	$(BIN)/zsq verify demo/digits.w8a8.onnx --images demo/digits.w8a8/images.npz
	$(BIN)/zsq evaluate demo/digits.onnx demo/digits.w8a8.onnx \
	  --data demo/held_out_digits.npz --task classification --mean 0.5 --std 0.5
	@echo "quantized model: demo/digits.w8a8.onnx"
	@echo "report:          demo/digits.w8a8/report.html"

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
