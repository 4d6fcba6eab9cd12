"""A real process with too little memory for its micro-batch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from app.config_file import load_config
from app.env import Environment
from app.train.memory import step_memory
from tests.conftest import ROOT
from tests.runs import RUN, assert_same_run, command

CONFIG = """
run_name: tiny
data: {source: phantoms, phantoms: {count: 4, seed: 3}, validation_fraction: 0.3}
stages:
  - resolution: 64
    backbone: {patch: 2, widths: [16], blocks: 1, vit_width: 32, vit_depth: 1, vit_heads: 2, xray_widths: [8]}
    epochs: 1
    samples_per_epoch: 8
    batch: 4
    learning_rate: 1e-3
    ema_decay: 0.9
    sampler_steps: 1
    prior_sweeps: 1
    sart_sweeps: 1
validation: {cases: 1, noise_levels: 1, pictures: 1, sampled_cases: 1}
logging: {log_every_n_steps: 1}
compute: {device: cpu, threads: 1}
"""
"""Samples whose activations outweigh by far what two starts of one program differ by."""

EXACT_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""The same address space each time: no arena per thread, and no freed tensor that stays as a hole in the heap."""


def train(workspace: Path, config: Path, *arguments: str, limit: int | None = None) -> tuple[int, int, str]:
    """Exit code, most address space in bytes, and output of a training with so many bytes of address space."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    with (workspace / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "train", "--config", str(config), *arguments],
            cwd=ROOT,
            env={**os.environ, "WORKSPACE": str(workspace)} | EXACT_MALLOC,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=limited,
        )
        peak = 0
        while process.poll() is None:
            fields = Path(f"/proc/{process.pid}/status").read_text().split()
            if "VmPeak:" in fields:
                peak = int(fields[fields.index("VmPeak:") + 1]) * 1024
            time.sleep(0.05)
        output.seek(0)
        return process.returncode, peak, output.read()


def test_too_little_memory_halves_the_micro_batch_and_changes_no_curve(tmp_path: Path) -> None:
    """Room for 2 samples and a half: weights and curves are those of a run that began with 2, bit for bit."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    config = load_config(file, (), Environment.read({}))
    code, peak, output = train(small, file, "--set", "stages.stage_64.micro_batch=2")
    assert code == 0, output
    assert "did not fit" not in output
    one_sample = (
        step_memory(config, config.stages[0], "fp32", 2).peak - step_memory(config, config.stages[0], "fp32", 1).peak
    )
    code, _, output = train(large, file, limit=peak + one_sample // 2)
    assert code == 0, output
    assert output.count("did not fit") == 1
    assert "stage_64: 4 samples at a time did not fit" in output
    assert json.loads((large / RUN / "micro_batches.json").read_text())["fits"] == {"stage_64": 2}
    assert_same_run(large / RUN, small / RUN)
    shown = command(large, "status", "--config", str(file)).stdout
    assert "from now on it takes 2 at a time" in shown
