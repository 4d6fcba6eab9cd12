"""What a container needs before its programs run: a runtime folder off the volume, and SSH where a key is given."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from app.env import shell_environment

log = logging.getLogger(__name__)

RUNTIME = Path("/run")
SHELL_FILE = "hybrid_vit_cascade.env"
SSH_FOLDER = "hybrid_vit_cascade_ssh"
SSHD = "/usr/sbin/sshd"
PRIVILEGE_SEPARATION = Path("/run/sshd")
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
KEYGEN_DEADLINE_S = 20


def runtime_folder(wanted: Path) -> Path:
    """The folder for what must not lie on a volume that others may mount: `wanted`, or a private one."""
    if wanted.is_dir() and os.access(wanted, os.W_OK):
        return wanted
    return Path(tempfile.mkdtemp(prefix="hybrid_vit_cascade_"))


def write_shell_file(folder: Path) -> Path:
    """The variables of the container for shells by SSH, which do not inherit them; readable by this user alone."""
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in shell_environment().items()]
    path = folder / SHELL_FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "w") as file:
        file.writelines(lines)
    return path


def sshd_command(public_keys: str, folder: Path, port: int = 22) -> list[str] | None:
    """The command line of an SSH server that lets in these keys and nothing else, with a host key of its own.

    Args:
        public_keys: authorized keys, a line each.
        folder: the runtime folder.
        port: where it listens.

    Returns:
        None where it cannot run; the log says why.
    """
    if not Path(SSHD).exists() or shutil.which("ssh-keygen") is None:
        log.error("PUBLIC_KEY is set, but there is no %s here: no SSH", SSHD)
        return None
    own = folder / SSH_FOLDER
    own.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    authorized, host_key = own / "authorized_keys", own / "host_key"
    authorized.write_text(public_keys.strip() + "\n")
    authorized.chmod(PRIVATE_FILE)
    if not host_key.exists():
        made = subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)],
            capture_output=True,
            text=True,
            timeout=KEYGEN_DEADLINE_S,
            check=False,
        )
        if made.returncode != 0:
            log.error("no SSH: ssh-keygen could not make a host key: %s", made.stderr.strip())
            return None
    options = {
        "Port": port,
        "HostKey": host_key,
        "AuthorizedKeysFile": authorized,
        "PidFile": "none",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "AllowAgentForwarding": "no",
        "X11Forwarding": "no",
        # Keys alone decide; and scp speaks sftp.
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    # A file of its own: what the image's says does not matter.
    config = own / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    return [SSHD, "-D", "-e", "-f", str(config)]
