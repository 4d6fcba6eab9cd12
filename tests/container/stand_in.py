"""A stand-in for the base image, for machines without an image registry: the host's Debian release, bare, as an image.

It has what the host's pip and apt need to reach their registries: the bundle of certificates, pip's settings with the
folder of wheels that they name, apt's settings. The product's image takes the rest from its own Dockerfile.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "hybrid-vit-cascade-stand-in"
CERTIFICATES = "etc/ssl/host-bundle.crt"
"""Not under its usual name, which the package ca-certificates writes."""
WHEELS = "opt/wheels"


def stand_in_base() -> str:
    """The name of the image; made where the engine does not have it from an earlier run."""
    settings = pip_settings()
    name = f"{NAME}:{_fingerprint(settings)}"
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0:
        return name
    folder = Path(tempfile.mkdtemp(prefix="stand-in-", dir="/var/tmp"))
    try:
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        run = ["debootstrap", "--variant=minbase", release, str(folder / "root")]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(run)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        _add_settings(folder / "root", settings)
        with subprocess.Popen(["tar", "-C", str(folder / "root"), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["docker", "import", "-", name], stdin=tar.stdout, capture_output=True, check=True)
        assert tar.returncode == 0
    finally:
        shutil.rmtree(folder)
    return name


def pip_settings() -> dict[str, str]:
    """The host's pip settings that say where packages come from; the later of two sources of one setting wins.

    Indexes that are folders of the host stay out: they are too large to carry, and what they hold is elsewhere too.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, cwd="/"
    )
    lines = [
        line.partition("=") for line in sorted(done.stdout.splitlines(), key=lambda line: line.startswith(":env:"))
    ]
    found = {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in lines}
    indexes = [url for url in found.get("extra-index-url", "").split() if not url.startswith("file:")]
    settings = {key: found[key] for key in ("index-url", "find-links", "cert", "trusted-host") if key in found}
    if indexes:
        settings["extra-index-url"] = " ".join(indexes)
    return settings


def wheel_folders(settings: dict[str, str]) -> list[Path]:
    """The folders of the host among pip's find-links."""
    return [Path(place) for place in settings.get("find-links", "").split() if Path(place).is_dir()]


def _add_settings(root: Path, settings: dict[str, str]) -> None:
    certificates = settings.get("cert", "/etc/ssl/certs/ca-certificates.crt")
    (root / CERTIFICATES).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(certificates, root / CERTIFICATES)
    inside = {key: value for key, value in settings.items() if key not in ("cert", "find-links")}
    inside |= {"cert": f"/{CERTIFICATES}", "disable-pip-version-check": "1", "timeout": "180"}
    if folders := wheel_folders(settings):
        inside["find-links"] = f"/{WHEELS}"
        for folder in folders:
            shutil.copytree(folder, root / WHEELS, dirs_exist_ok=True)
    text = "".join(f"{key} = {value}\n" for key, value in inside.items())
    (root / "etc/pip.conf").write_text(f"[global]\n{text}")
    apt = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True)
    kept = [line for line in apt.stdout.splitlines() if line.startswith(("Acquire::Check", "Acquire::http"))]
    (root / "etc/apt/apt.conf.d/90host").write_text("".join(f"{line}\n" for line in kept))


def _fingerprint(settings: dict[str, str]) -> str:
    """Changes with everything that the image is made of."""
    certificates = Path(settings.get("cert", "/etc/ssl/certs/ca-certificates.crt"))
    wheels = [[path.name, path.stat().st_size] for folder in wheel_folders(settings) for path in folder.iterdir()]
    parts = [Path(__file__).read_text(), certificates.read_text(), settings, sorted(wheels), os.uname().machine]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
