PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PIP_OPTIONS ?=

.PHONY: run test test-browser lab notebooks clean

run: $(VENV)/installed  ## execute the three notebooks with progress and render them to rendered/*.html
	$(BIN)/python tools/run_notebooks.py

test: $(VENV)/installed  ## style, unit tests, and the notebooks executed again and compared
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -m "not browser"
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout 1800 notebooks

test-browser: $(VENV)/installed  ## the panel in JupyterLab, driven by Chromium; screenshots in test-artifacts/
	$(BIN)/pytest -m browser -rs

lab: $(VENV)/installed  ## open JupyterLab
	$(BIN)/jupyter lab notebooks

notebooks: $(VENV)/installed  ## execute the notebooks and store their outputs, to be committed
	$(BIN)/python tools/run_notebooks.py --store

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) rendered
