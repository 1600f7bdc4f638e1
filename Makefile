# make install | demo | test | test-slow | test-cluster | test-no-vllm | check | docs | evidence | evidence-status | clean.   Each does its own set-up: .venv appears on first use, and again when pyproject.toml changes.
PY := .venv/bin/python
# Modules stay compiled: each of the hundred processes of the tests would compile them again.
export PYTHONDONTWRITEBYTECODE =
# Files with a mark: to read all others only to leave them out takes a worker a quarter of a minute.
marked = $(shell grep -lE 'mark\.$(1)\b' tests/test_*.py)

install: .venv/installed

demo: .venv/installed
	$(PY) recipes/demo.py

# Two workers with a thread each: the models are so small that a second thread gains less than a second test.
test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 -m "not slow and not cluster"

# What takes minutes: every model family against vLLM, long kill-and-resume runs.
test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10 -m slow $(call marked,slow)

# Processes that Ray starts, and kills: in one process, for Ray ends the program that started it when it is lost.
# Clusters that are joined in another: after a Ray of its own, which has a token, a process refuses one without.
test-cluster: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m cluster $(filter-out tests/test_joined_cluster.py,$(call marked,cluster))
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m cluster tests/test_joined_cluster.py

# An installation from a package index that lacks vLLM, as on a machine for which it has no wheel.
test-no-vllm:
	tests/without_vllm.sh .venv-no-vllm

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# The site of docs/, into site/.
docs: .venv/installed
	$(PY) -m pip install --quiet -e '.[docs]'
	$(PY) -m mkdocs build --strict

# Every run behind a figure of the pages, hours long; a killed one goes on. Then the pages' tables.
evidence: .venv/installed
	$(PY) -m benchmarks.evidence

evidence-status: .venv/installed
	$(PY) -m benchmarks.evidence status=true

.venv/installed: install.sh pyproject.toml
	./install.sh
	touch $@

clean:
	rm -rf .venv runs site *.egg-info

.PHONY: install demo test test-slow test-cluster test-no-vllm check docs evidence evidence-status clean
