"""Runs saved circuits on ciphertexts in files, here or at a server."""

from pathlib import Path
from typing import TYPE_CHECKING

from fheconv.cli.arguments import check_output, say, token_of_environment
from fheconv.cli.kinds import check_kind

if TYPE_CHECKING:
    from fheconv.circuits.ciphertext import Ciphertext
    from fheconv.serving.tls import Tls


def run_circuit(
    server_file: Path,
    evaluation_keys: Path,
    encrypted: Path,
    output: Path,
    *,
    keep: Path | None,
    time_limit: float | None,
    force: bool,
) -> None:
    """Run the circuit of a server.zip on a ciphertext, with the keys of the ciphertext's owner."""
    from fheconv.circuits.ciphertext import Ciphertext
    from fheconv.circuits.keys import StoredKeys
    from fheconv.circuits.server import load_server

    check_output(output, force=force)
    check_kind(server_file, "server.zip", "The file")
    check_kind(evaluation_keys, "a file of evaluation keys", "--evaluation-keys")
    check_kind(encrypted, "a ciphertext", "--input")
    keys = StoredKeys.of(evaluation_keys)
    images = Ciphertext.load(encrypted)
    results = load_server(server_file).run(images, keys, keep=keep, time_limit=time_limit)
    write_ciphertext(results, output)


def run_remotely(
    client_file: Path,
    url: str,
    keys: Path,
    encrypted: Path,
    output: Path,
    *,
    tls: "Tls | None",
    force: bool,
) -> None:
    """Run a circuit on a ciphertext at a server."""
    from fheconv.circuits.ciphertext import Ciphertext
    from fheconv.serving.remote import RemoteCircuit

    check_output(output, force=force)
    check_kind(client_file, "client.zip", "The file")
    check_kind(keys, "a file of secret keys", "--keys")
    check_kind(encrypted, "a ciphertext", "--input")
    images = Ciphertext.load(encrypted)
    remote = RemoteCircuit(url, client_file, token=token_of_environment(), tls=tls)
    remote.load_keys(keys)
    results = remote.run(images)
    write_ciphertext(results, output)


def write_ciphertext(ciphertext: "Ciphertext", output: Path) -> None:
    """Write a ciphertext to a file, and say so."""
    ciphertext.save(output)
    say(f"Wrote {output}: {ciphertext.images} encrypted, {output.stat().st_size:,} bytes.")
