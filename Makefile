# The first Python that runs and is 3.11 or newer: a name on PATH may be a shim that fails.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
BIN = $(VENV)/bin
NBGRADER ?= .venv-nbgrader
# nbgrader's configuration and its kernel, the notebooks' Python, are in tools/; its database library warns, so not here.
FOR_NBGRADER = PATH="$(abspath $(NBGRADER))/bin:$$PATH" NOTEBOOKS_PYTHON="$(abspath $(BIN))/python" \
	JUPYTER_PATH="$(CURDIR)/tools" JUPYTER_CONFIG_PATH="$(CURDIR)/tools" PYTHONWARNINGS=ignore
PIP_OPTIONS ?=
ENVIRONMENTS ?= .venv-environments
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)

.PHONY: install run check test test-browser test-environments address lab panel notebooks assignment grade mark test-assignment clean

install: $(VENV)/installed  ## everything but the developers' tools, into .venv

FIRST = images/content/kitten_on_fence.jpg images/style/great_wave.jpg

run: $(VENV)/installed  ## a first picture, rendered/first.png; then execute the notebooks and render them to rendered/*.html
	mkdir -p rendered
	test -f rendered/first.png || $(BIN)/stylise $(FIRST) --size 160 -o rendered/first.png
	$(BIN)/python tools/run_notebooks.py

check: $(VENV)/for-developers  ## lint and unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not (browser or breaks or parameters or assignment)"  # two tests at once, each on one thread

test: check  ## check, and the notebooks executed again and compared
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout 1800 notebooks

test-browser: $(VENV)/for-developers  ## the panel in JupyterLab, driven by Chromium; screenshots in test-artifacts/
	$(BIN)/pytest -m browser -rs

test-environments: $(VENV)/for-developers  ## the oldest, Colab's and the newest versions, 6 GB each; see environments/README.md
	$(MAKE) $(ENVIRONMENTS)/oldest/installed PYTHON="$(OLDEST_PYTHON)"
	$(MAKE) $(ENVIRONMENTS)/colab/installed $(ENVIRONMENTS)/newest/installed PYTHON="$(NEWEST_PYTHON)"
	$(BIN)/python tools/try_environment.py $(foreach name,oldest colab newest,$(ENVIRONMENTS)/$(name)/bin/python)

$(ENVIRONMENTS)/%/installed: environments/%.txt
	$(PYTHON) -m venv $(ENVIRONMENTS)/$*
	$(ENVIRONMENTS)/$*/bin/python -m pip install $(PIP_OPTIONS) -r $<
	touch $@

address: $(VENV)/installed  ## write ADDRESS=https://... of this repository, and the version, wherever they appear
	$(BIN)/python tools/address.py $(ADDRESS)

lab: $(VENV)/installed  ## open JupyterLab, which takes uploads of up to 200 MB
	$(BIN)/jupyter lab --ServerApp.tornado_settings='{"websocket_max_message_size": 300000000}' --LabApp.default_url=/lab/tree/notebooks .

# A closed tab leaves its kernel running: kernels without a connection end after five minutes.
panel: $(VENV)/for-panel  ## the panel alone, as a web page; each visitor has a kernel of two gigabytes
	$(BIN)/voila tools/panel.ipynb --show_tracebacks=True --Voila.tornado_settings='{"websocket_max_message_size": 300000000}' \
		--MappingKernelManager.cull_idle_timeout=300 --MappingKernelManager.cull_interval=60 \
		--MappingKernelManager.cull_busy=True

notebooks: $(VENV)/installed  ## execute the notebooks and store their outputs, to be committed
	$(BIN)/python tools/run_notebooks.py --store

assignment: $(NBGRADER)/installed  ## the notebooks as homework, without solutions, in assignment/ and assignment.zip
	$(FOR_NBGRADER) python tools/make_assignment.py

grade: $(VENV)/installed $(NBGRADER)/installed  ## SUBMISSIONS=folder or zip, into grading/; STUDENT=name, SEED=word: see INSTRUCTORS.md
	$(FOR_NBGRADER) python tools/grade_submissions.py "$(SUBMISSIONS)" grading "$(STUDENT)" "$(SEED)"

# By default nbgrader's pages would set a cookie for only one of their folders.
mark: $(NBGRADER)/installed  ## mark the texts by hand, in the browser
	@test -d grading || { echo "There is nothing to mark: run make grade SUBMISSIONS=folder-or-zip first."; exit 1; }
	cd grading && $(FOR_NBGRADER) jupyter lab --LabApp.default_url=/formgrader/gradebook/style-transfer \
		--IdentityProvider.cookie_options='{"path": "/"}'

test-assignment: $(VENV)/for-developers $(NBGRADER)/installed  ## make the release, and grade honest and cheating submissions
	$(BIN)/pytest -m assignment tests/test_assignment.py

$(VENV)/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python of 3.11 or newer was found: install one, or run make PYTHON=..."; exit 1; }
	@echo "Installing into $(VENV): a few minutes and 6 GB, most of it torch for NVIDIA GPUs; without one, see environments/README.md."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile $(PIP_OPTIONS) -r requirements.txt -e .
	touch $@

$(VENV)/for-developers: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install $(PIP_OPTIONS) -r requirements-dev.txt
	touch $@

$(VENV)/for-panel: $(VENV)/installed
	$(BIN)/python -m pip install $(PIP_OPTIONS) "voila>=0.5"
	touch $@

# nbgrader has its own environment, which only instructors need.
$(NBGRADER)/installed: tools/nbgrader.txt
	@test -n "$(PYTHON)" || { echo "No Python of 3.11 or newer was found: install one, or run make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(NBGRADER)
	$(NBGRADER)/bin/python -m pip install $(PIP_OPTIONS) -r tools/nbgrader.txt
	touch $@

clean:
	rm -rf $(VENV) $(NBGRADER) rendered assignment
