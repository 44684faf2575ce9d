"""Keys of tcp links: files in one directory, made by `rtml keys make`. Names say what they are.

dispatcher.secret   the dispatcher's; it lets in whoever has the secret of a NAME.public beside it
client.secret       of all that submit: programs, gateways, commands
node.secret         of worker nodes
NAME.public         the other half of NAME.secret; at a dispatcher node.public and node-*.public are of nodes, and all
                    others may only submit
data.secret         of all that read and write large objects at nodes' data endpoints; it has no other half

So a dispatcher needs its secret and the public keys of its peers; a peer needs its secret and `dispatcher.public`. Both
sides prove who they are, and everything is encrypted (CURVE, which is Curve25519).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rtml.link.base import AddressError

DISPATCHER: Final = "dispatcher"
CLIENT: Final = "client"
NODE: Final = "node"
DATA: Final = "data"

#: 32 bytes in Z85.
_KEY: Final = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
#: Names of nodes' keys at a dispatcher; all others are of clients.
_OF_NODE: Final = re.compile(rf"{NODE}(-.*)?\.public")
_MADE_BY: Final = "`rtml keys make DIR` makes keys"


@dataclass(frozen=True)
class CurveKeys:
    """Keys in Z85 text, 32 bytes each."""

    public: str
    secret: str = field(repr=False)
    #: At a peer: the hub's public key.
    server: str = ""
    #: At a hub: the public keys of the peers that may connect, and of those among them that may join as nodes.
    allowed: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()


def make_keys(directory: str) -> list[str]:
    """Write new key pairs of a dispatcher, its clients and its nodes, and a secret of data endpoints.

    Only their owner can read the files.

    Args:
        directory: made if it is not there, with mode 0700.

    Returns:
        The paths of the files.

    Raises:
        AddressError: there are keys already; nothing is changed then.
        OSError: the directory cannot be written.
    """
    from rtml.link.zeromq import new_pair

    folder = Path(directory)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    texts: dict[Path, str] = {}
    for name in (DISPATCHER, CLIENT, NODE):
        public, secret = new_pair()
        texts[folder / f"{name}.public"], texts[folder / f"{name}.secret"] = public, secret
    texts[folder / f"{DATA}.secret"] = new_pair()[1]
    written: list[str] = []
    try:
        for path, text in texts.items():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                written.append(str(path))
                file.write(text + "\n")
    except BaseException as error:
        for made in written:
            with contextlib.suppress(OSError):
                os.unlink(made)
        if isinstance(error, FileExistsError):
            raise AddressError(f"{error.filename} is there already; move it away, or name another directory") from None
        raise
    return written


def hub_keys(directory: str) -> CurveKeys:
    """The dispatcher's keys, and those of the peers that may connect.

    Raises:
        AddressError: a file is missing or no key, a secret can be read by everybody, or nobody could connect.
    """
    from rtml.link.zeromq import public_of

    secret = _read(Path(directory), f"{DISPATCHER}.secret")
    public = public_of(secret)
    keys = {path.name: _read(Path(directory), path.name) for path in sorted(Path(directory).glob("*.public"))}
    allowed = frozenset(keys.values()) - {public}
    nodes = frozenset(key for name, key in keys.items() if _OF_NODE.fullmatch(name)) - {public}
    if not allowed:
        raise AddressError(f"{directory} has no public key of a peer, like {CLIENT}.public: nobody could connect")
    return CurveKeys(public, secret, allowed=allowed, nodes=nodes)


def peer_keys(directory: str, role: str = CLIENT) -> CurveKeys:
    """The keys of one that connects.

    Args:
        directory: where they are.
        role: `CLIENT` or `NODE`.

    Raises:
        AddressError: a file is missing or no key, or a secret can be read by everybody.
    """
    from rtml.link.zeromq import public_of

    secret = _read(Path(directory), f"{role}.secret")
    return CurveKeys(public_of(secret), secret, server=_read(Path(directory), f"{DISPATCHER}.public"))


def has_data_secret(directory: str) -> bool:
    """Whether the directory has the secret of data endpoints. Keys of earlier versions have none."""
    return bool(directory) and Path(directory, f"{DATA}.secret").exists()


def data_secret(directory: str) -> bytes:
    """The secret of data endpoints.

    Raises:
        AddressError: the file is missing or no key, or can be read by everybody.
    """
    return _read(Path(directory), f"{DATA}.secret").encode()


def _read(directory: Path, name: str) -> str:
    path = directory / name
    try:
        # Readable by the group is what Kubernetes makes of a Secret for a user who is not root.
        if name.endswith(".secret") and stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO:
            raise AddressError(f"{path} can be read by every user: chmod 600 {path}")
        text = path.read_text("ascii", "replace").strip()
    except OSError as error:
        raise AddressError(f"{path}: {error.strerror or error}; {_MADE_BY}") from None
    if not _KEY.fullmatch(text):
        raise AddressError(f"{path} is no key (40 characters of Z85); {_MADE_BY}")
    return text
