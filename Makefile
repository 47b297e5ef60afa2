# make demo   quantize the shipped network without data, prove it, evaluate it, write the report
# make test   the whole test suite
# make lint   ruff and mypy
# make docs   the documentation as a site: build/site/index.html
# make ort    an environment for --engine ort (Linux x86-64, Python 3.11): .venv-ort/bin/zsq
# make test-ort   the tests that need it
PYTHON ?= python3
PYTHON_ORT ?= python3.11
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

VENV_ORT := .venv-ort
BIN_ORT := $(VENV_ORT)/bin
INSTALLED_ORT := $(VENV_ORT)/.installed

.PHONY: demo test lint docs ort test-ort benchmarks clean

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

docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

ort: $(INSTALLED_ORT)
	@echo "make images with $(BIN_ORT)/zsq generate MODEL -o IMAGES.npz --engine ort"
	@echo "and quantize with a current onnxruntime: zsq quantize MODEL --images IMAGES.npz"

test-ort: $(INSTALLED_ORT)
	$(BIN_ORT)/python -m pytest -m ort tests/ort tests/graph_tools/test_engines.py

# onnxruntime-training has wheels for this platform and Python up to 3.11 only.
$(INSTALLED_ORT): pyproject.toml constraints-ort.txt
	@test "$$(uname -sm)" = "Linux x86_64" || \
	  { echo "onnxruntime-training exists for Linux on x86-64 only, this is $$(uname -sm)"; exit 2; }
	@test "$$($(PYTHON_ORT) -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" = "3 11" || \
	  { echo "Python 3.11 is needed: make ort PYTHON_ORT=/path/to/python3.11"; exit 2; }
	$(PYTHON_ORT) -m venv --clear $(VENV_ORT)
	$(BIN_ORT)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r constraints-ort.txt
	$(BIN_ORT)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV_ORT) demo build *.egg-info
