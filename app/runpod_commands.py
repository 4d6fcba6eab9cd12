"""The commands that talk to RunPod from a desk."""

from __future__ import annotations

import argparse
from pathlib import Path

from app.env import Environment


def add_runpod_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`runpod-template` and `runpod-watch`."""
    template = commands.add_parser("runpod-template", help="create the RunPod template, or name its image")
    template.set_defaults(run=_template)
    template.add_argument("--file", type=Path, default=Path("docker/runpod-template.json"), metavar="FILE")
    template.add_argument("--pin", metavar="IMAGE@DIGEST", help="write this image into the file and do nothing else")
    watch = commands.add_parser("runpod-watch", help="start a pod again if it was taken away; for cron, at a desk")
    watch.set_defaults(run=_watch)
    watch.add_argument("pod", metavar="POD_ID")
    watch.add_argument("--max-starts", type=int, default=20, metavar="N", help="in all, counted in the ledger (20)")
    watch.add_argument("--max-usd-per-hour", type=float, required=True, metavar="USD", help="a dearer pod is left")
    ledger = Path.home() / ".local/state/hybrid_vit_cascade/runpod-watch.jsonl"
    watch.add_argument("--ledger", type=Path, default=ledger, metavar="FILE", help=f"of starts ({ledger})")


def _template(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.pod import api_of
    from app.ops.runpod import create_template, pin_image

    if arguments.pin is not None:
        pin_image(arguments.file, arguments.pin)
        print(f"{arguments.file}: the image is {arguments.pin}")
    else:
        print(f"template {create_template(arguments.file, api_of(env))} was created")
    return 0


def _watch(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.pod import api_of
    from app.ops.runpod import watch

    print(watch(api_of(env), arguments.pod, arguments.max_starts, arguments.max_usd_per_hour, arguments.ledger))
    return 0
