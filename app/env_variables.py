"""The environment variables that the application reads: names, defaults, meanings. `app.env` reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable that the application reads."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "WORKSPACE", "/workspace", "Folder of data, cache, checkpoints and logs; `scripts/up` sets `./workspace`."
    ),
    Variable("CONFIG", "", "Config file for commands that are called without `--config`."),
    Variable("RUN_NAME", "", "Overrides `run_name` of the config file: the folder below `checkpoints/`."),
    Variable("LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR."),
    Variable(
        "DASHBOARD_PASSWORD",
        "",
        "Password of the dashboard, for any user name. Without one it is generated and printed in the log wherever the "
        "dashboard can be reached from other machines.",
    ),
    Variable(
        "DASHBOARD_AUTH",
        "password",
        "`none` asks for no password and answers only at localhost addresses; a password that is set is asked anyway.",
    ),
    Variable("DASHBOARD_HOST", "127.0.0.1", "Address that the dashboard listens on; the image sets 0.0.0.0."),
    Variable("PORT", "6006", "Port of the dashboard."),
    Variable("WANDB_API_KEY", "", "Turns Weights & Biases on. A secret: it appears in no log and no file."),
    Variable("WANDB_MODE", "", "online, offline (writes into the run folder, needs no key) or disabled."),
    Variable(
        "NOTIFY_URL",
        "",
        "Webhook that gets a JSON POST when a run starts, resumes, finishes a stage, finishes, is refused or stops. A "
        "secret.",
    ),
    Variable(
        "PUBLIC_KEY", "", "SSH public keys, a line each: turns the container's SSH server on, for these keys only."
    ),
    Variable("RUNPOD_POD_ID", "", "Set by RunPod: the container runs on this pod, which `pod.on_finish` may stop."),
    Variable(
        "RUNPOD_VOLUME_ID",
        "",
        "Set by RunPod where the pod has a network volume; without one the disk is deleted with the pod.",
    ),
    Variable("RUNPOD_API_KEY", "", "Set by RunPod: stops the pod. At a desk: your key for the scripts. A secret."),
    Variable(
        "POD_COST_PER_HOUR",
        "",
        "Price of this machine in USD per hour, for the cost curves and `pod.max_cost_usd`; unset, a RunPod pod asks "
        "RunPod's API.",
    ),
)

CLUSTER_VARIABLES = (
    Variable("NUM_NODES", "1", "Set by RunPod on an Instant Cluster: its machines, which train one run."),
    Variable(
        "NODE_RANK", "", "Set with it: the number of this machine. The first one, 0, writes and has the dashboard."
    ),
    Variable(
        "MASTER_ADDR", "", "Set with it: the first machine's address in the cluster's own network; or `PRIMARY_ADDR`."
    ),
    Variable("MASTER_PORT", "", "Set with it: the port that the machines meet at; or `PRIMARY_PORT`."),
)
"""Read only where NUM_NODES is more than one: some of them stand on machines that are by themselves, too."""
