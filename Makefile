# make demo | test | check | bench.   Each does its own set-up: .venv appears on first use, and again when pyproject.toml changes.
PY := .venv/bin/python

demo: .venv/installed
	$(PY) recipes/demo.py

test: .venv/installed
	$(PY) -m pytest -q

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

.venv/installed: install.sh pyproject.toml
	./install.sh
	touch $@

clean:
	rm -rf .venv runs *.egg-info

.PHONY: demo test check clean
