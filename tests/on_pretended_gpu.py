"""`python -m pytest -n 0 -p tests.on_pretended_gpu tests/test_losses.py`: a file as on a machine with a GPU
(pretend_gpu.py), without vLLM. Left out: tests that start processes, which have no such GPU; test_pretend_gpu.py.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as conftest.py, which is imported later

from posttrain.backend import alarms, vllm_settings
from tests.pretend_gpu import pretend_gpu

vllm_settings.vllm_is_installed = lambda: False
alarms.START_TOKENS["cuda"] = alarms.START_TOKENS["cpu"]  # here attention computes every pair of tokens
ENTERED = pretend_gpu()  # kept: collected, it would end
ENTERED.__enter__()
