"""Serves saved circuits."""

from pathlib import Path
from typing import Annotated

import typer

from fheconv.basics.errors import InvalidArgumentError
from fheconv.cli.arguments import Authority, Certificate, PrivateKey, tls_of, token_of_environment
from fheconv.cli.kinds import check_kind


def serve(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Each server.zip that circuit.save wrote.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that clients must bear. Or set FHECONV_TOKEN.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Images that run at once.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 8,
    folder: Annotated[
        Path | None, typer.Option(help="Where evaluation keys are stored. Default: the user's data folder.")
    ] = None,
    quota: Annotated[int, typer.Option(help="Gigabytes of keys to store at most.", min=1)] = 10,
    expiry: Annotated[int, typer.Option(help="Days after which unused keys go.", min=1)] = 30,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen for other machines without a token.")
    ] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Tell Prometheus of it at /metrics.")] = False,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    authority: Authority = None,
) -> None:
    """Serve saved circuits over HTTP, for fheconv.RemoteCircuit; /docs describes the API.

    Example: FHECONV_TOKEN=$(cat token) fheconv serve server.zip --workers 2

    Several circuits share the workers and the stored keys. Clients use the same keys for all that were
    compiled with --keys-of: fheconv serve old/server.zip new/server.zip

    With a --certificate it is HTTPS. With an --authority, clients need a certificate that it signed:
    fheconv serve server.zip --host 0.0.0.0 --certificate server.pem --private-key server.key
    --authority clients.pem
    """
    from platformdirs import user_data_path

    from fheconv.circuits.native.worker import worker
    from fheconv.circuits.server import load_server
    from fheconv.serving.app import serve as serve_circuits

    try:
        token = token_of_environment() if token_file is None else token_file.read_text().strip()
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"--token-file={token_file} cannot be read: {error}.") from error
    for file in files:
        check_kind(file, "server.zip", "The file")
    servers = [load_server(file) for file in files]
    worker().stop()  # the copies that serve have their own workers
    serve_circuits(
        servers,
        host=host,
        port=port,
        token=token,
        allow_remote=allow_remote,
        tls=tls_of(certificate, private_key, authority),
        folder=folder or user_data_path("fheconv") / "keys",
        workers=workers,
        queue=queue,
        quota=quota * 10**9,
        expiry=expiry * 86_400,
        metrics=metrics,
    )
