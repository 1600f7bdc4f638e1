"""python -m posttrain.serve --model tiny: a local server for the tinker SDK."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.extras import need
from posttrain.backend.ranges import POSITIVE, SEED, Range
from posttrain.tracking.command_line import parse
from posttrain.tracking.frozen_heap import startup_objects_frozen
from posttrain.tracking.one_line_errors import one_line_errors
from posttrain.tracking.open_files import allow_open_files, most_connections
from posttrain.tracking.run_lock import lock_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = Range(0, 65535, whole=True)


@chz.chz
class ServeConfig:
    """Serves models of this machine to the tinker SDK and to OpenAI clients."""

    model: str = chz.field(
        doc="NAME, or NAME=PRESET_OR_FOLDER where clients know the model by another name; several separated by "
        "commas, or as several --model"
    )
    host: str = chz.field(default="127.0.0.1", doc="address to listen at; others than loopback need an API key")
    port: int = chz.field(default=8000, validator=PORT, doc="port to listen at; 0 = any free one")
    api_key: str | None = chz.field(
        default=None,
        doc="clients must show it as TINKER_API_KEY; it begins with tml-, or the SDK refuses it. None = TINKER_API_KEY "
        "of the server's environment, if set",
    )
    checkpoint_dir: str = chz.field(default="tinker_checkpoints", doc="folder behind the tinker:// paths")
    client_folder: str | None = chz.field(
        default=None,
        doc="writes each model's tokenizer to CLIENT_FOLDER/NAME, where scripts started in that folder find it "
        "without the hub",
    )
    substitute: str | None = chz.field(
        default=None,
        doc="LOSS=LOSS, several separated by commas: computes the second where a client names the first, such as "
        "stable_reinforce=importance_sampling",
    )
    renderer: str | None = chz.field(
        default=None,
        doc="renderer of messages from OpenAI clients; None = the model's chat template, or role_colon if it has none",
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights of presets")
    session_minutes: float = chz.field(
        default=10.0,
        validator=POSITIVE,
        doc="minutes without a heartbeat after which a session ends and its models are freed",
    )
    backend: BackendConfig = chz.field(
        default_factory=lambda: BackendConfig(share_engines=True),
        doc="trainer and sampler; all weights of a model take turns in one engine unless share_engines=false",
    )


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ServeConfig, _joined_models(sys.argv[1:] if argv is None else argv))
        serve(config)


def serve(config: ServeConfig) -> None:
    """Runs until SIGINT or SIGTERM. Prints the address when it listens."""
    for package in ("starlette", "uvicorn", "google.protobuf"):
        need(package, "posttrain-serve")
    import uvicorn  # and torch below: --help and errors do not wait for them

    from posttrain.backend.service_client import ServiceClient
    from posttrain.serve.app import create_app
    from posttrain.serve.bases import open_bases, write_tokenizers
    from posttrain.serve.local_server import KEEP_ALIVE_SECONDS
    from posttrain.serve.state import Limits, State
    from posttrain.serve.store import Store

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    allow_open_files()
    key, losses = api_key(config), substitutes(config.substitute)
    listening = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _port_errors(config):  # before the models are opened
        listening.bind((config.host, config.port))
    bases = open_bases(config.model.split(","), config.backend.max_length)
    store = Store(Path(config.checkpoint_dir))
    lock = lock_folder(store.root)
    if config.client_folder:
        write_tokenizers(bases, Path(config.client_folder))
    tokenizers = store.root / "tokenizers" if config.host in LOOPBACK else None
    if tokenizers:
        write_tokenizers(bases, tokenizers)
    service, limits = ServiceClient(config.backend, store.root), Limits(session_seconds=60 * config.session_minutes)
    state = State(service, bases, store, config.seed, losses, limits, tokenizers)
    settings = uvicorn.Config(
        create_app(state, config.host, key, config.renderer),
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,  # long polls are open
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=most_connections(),  # beyond it 503, which clients repeat
        # the SDK parses each header of each answer in Python
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=2048,
    )
    with _port_errors(config):
        listening.listen(settings.backlog)  # a client that comes at once waits, and is not refused
    url = f"http://{config.host}:{listening.getsockname()[1]}"
    print(f"serving {', '.join(bases)} at {url}", flush=True)
    print(f"  export TINKER_BASE_URL={url} TINKER_API_KEY={'(the key)' if key else 'tml-local'}", flush=True)
    print(f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={'(the key)' if key else 'none'}", flush=True)
    with startup_objects_frozen():
        uvicorn.Server(settings).run(sockets=[listening])
    lock.close()


@contextmanager
def _port_errors(config: ServeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"host={config.host} port={config.port}: {error.strerror}; give another port, or port=0 for a free one"
        ) from error


def _joined_models(argv: list[str]) -> list[str]:
    """Several --model NAME=FOLDER as one option."""
    models, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in ("--model", "model"):
            models.append(value if equals else next(arguments, ""))
        else:
            rest.append(argument)
    return [*rest, f"model={','.join(models)}"] if models else rest


def substitutes(text: str | None) -> dict[str, str]:
    parts = [pair.partition("=") for pair in (text or "").split(",") if pair]
    pairs = {name: loss for name, _, loss in parts}
    if not pairs:
        return {}
    from posttrain.backend.losses import LOSSES

    for name, loss in pairs.items():
        if loss not in LOSSES or name in LOSSES:
            raise ConfigError(
                f"substitute={name}={loss}: it names a loss this server lacks, and one of {', '.join(LOSSES)} for it"
            )
    return pairs


def api_key(config: ServeConfig) -> str | None:
    key = config.api_key or os.environ.get("TINKER_API_KEY") or None
    if key is not None and not key.startswith("tml-"):
        raise ConfigError("api_key: the SDK sends only keys that begin with tml-")
    if key is None and config.host not in LOOPBACK:
        raise ConfigError(f"host={config.host} can be reached from other machines: set api_key=tml-SECRET")
    return key
