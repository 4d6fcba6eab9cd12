"""Size of the image and its start: `scripts/bench container`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.container.engine import Container, build_image, docker
from tests.container.stand_in import stand_in_base
from tests.runs import manifest

RUN = Path("hybrid_vit_cascade/checkpoints/demo")
STARTS = 3


def main() -> None:
    """Print both."""
    image, base = build_image(), stand_in_base()
    sizes = {name: int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e6 for name in (image, base)}
    print(f"image {sizes[image]:.0f} MB, of which the stand-in base with its folder of wheels is {sizes[base]:.0f} MB")
    print("layers of the product:")
    for line in docker("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines():
        size, _, command = line.partition("\t")
        if size != "0B":
            print(f"  {size:>8}  {' '.join(command.split())[:80]}")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        workspace = Path(folder)
        config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
        config["data"]["phantoms"]["count"] = 8
        config["checkpoint"]["save_every_s"] = 0.001
        (workspace / "demo.yaml").write_text(yaml.safe_dump(config))
        start_and_stop(workspace)
        fresh = []
        for _ in range(STARTS):
            shutil.rmtree(workspace / RUN)
            fresh.append(start_and_stop(workspace))
        resumed = [start_and_stop(workspace) for _ in range(STARTS)]
    print("from `docker create` to the saved first training step of the demo, cases prepared, files in memory:")
    print(f"  a new run, which validates first: {listed(start for start, _ in fresh)} s")
    print(f"  a resumed run: {listed(start for start, _ in resumed)} s")
    print(f"`docker stop` during training: {listed(stop for _, stop in fresh + resumed)} s")


def listed(values: Iterable[float]) -> str:
    """Numbers for people."""
    return ", ".join(f"{value:.1f}" for value in values)


def start_and_stop(workspace: Path) -> tuple[float, float]:
    """Seconds from the start of a container to the commit of the state after its first step, and those of its stop."""
    before = newest_step(workspace / RUN)
    started = time.monotonic()
    with Container(workspace=workspace, env={"CONFIG": "/workspace/demo.yaml"}) as container:
        container.wait_for(lambda: newest_step(workspace / RUN) > before, "the first step", 300, every_s=0.02)
        seconds = time.monotonic() - started
        return seconds, container.stop(10)


def newest_step(run: Path) -> int:
    """The last committed step of the first stage; 0 before there is one."""
    return max((line["step"] for line in manifest(run)), default=0)


if __name__ == "__main__":
    main()
