PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
NBGRADER ?= .venv-nbgrader
PIP_OPTIONS ?=

.PHONY: run check test test-browser lab notebooks assignment test-assignment clean

run: $(VENV)/installed  ## execute the three notebooks with progress and render them to rendered/*.html
	$(BIN)/python tools/run_notebooks.py

check: $(VENV)/installed  ## style and unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -m "not browser"

test: check  ## check, and the notebooks executed again and compared
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout 1800 notebooks

test-browser: $(VENV)/installed  ## the panel in JupyterLab, driven by Chromium; screenshots in test-artifacts/
	$(BIN)/pytest -m browser -rs

lab: $(VENV)/installed  ## open JupyterLab, which takes uploads of up to 200 MB
	$(BIN)/jupyter lab --ServerApp.tornado_settings='{"websocket_max_message_size": 300000000}' notebooks

notebooks: $(VENV)/installed  ## execute the notebooks and store their outputs, to be committed
	$(BIN)/python tools/run_notebooks.py --store

assignment: $(NBGRADER)/installed  ## the notebooks as homework, without solutions, in assignment/
	$(NBGRADER)/bin/python tools/make_assignment.py

test-assignment: $(VENV)/installed $(NBGRADER)/installed  ## grade the homework's solution and four wrong submissions
	$(NBGRADER)/bin/python tools/check_assignment.py $(BIN)/python

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) -r requirements.txt
	touch $@

# nbgrader has an environment of its own, which only those who give the homework need.
$(NBGRADER)/installed: tools/nbgrader.txt
	$(PYTHON) -m venv $(NBGRADER)
	$(NBGRADER)/bin/python -m pip install $(PIP_OPTIONS) -r tools/nbgrader.txt
	touch $@

clean:
	rm -rf $(VENV) $(NBGRADER) rendered assignment
