"""The environment of the process: the only module that reads `os.environ`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.errors import ConfigError

PLACEHOLDER = re.compile(r"\s*\{\{.*\}\}\s*", re.DOTALL)
RUNPOD_PLACEHOLDER = re.compile(r"\{\{\s*RUNPOD_SECRET_\w+\s*\}\}")
PRESET_BY_CLUSTERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NUM_NODES", "NUM_TRAINERS")
WANDB_API = "https://api.wandb.ai"
SECRET_NAME = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$|^NOTIFY_URL$")
WEBHOOK = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?([/?][!-~]*)?", re.IGNORECASE)
SHORTEST_SECRET = 4
DASHBOARD_AUTHS = ("password", "none")
LARGEST_PORT = 65535
WANDB_MODES = ("online", "offline", "disabled")
SHELL_VARIABLES = ("PATH", "PYTHONPATH", "LANG", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "RUNPOD_DC_ID")
"""Besides our own, what a shell by SSH gets of the container's environment."""
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


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
)


class Secret:
    """A value that shows itself only on request."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for the one place that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True)
class Environment:
    """The variables of `VARIABLES`, typed; empty values and unresolved placeholders count as unset."""

    workspace: Path
    config: str | None
    run_name: str | None
    log_level: str
    dashboard_password: Secret | None
    dashboard_auth: str
    dashboard_host: str
    port: int
    wandb_api_key: Secret | None
    wandb_mode: str | None
    notify_url: Secret | None
    public_key: str | None
    runpod_pod_id: str | None
    runpod_volume_id: str | None
    runpod_api_key: Secret | None
    secrets: tuple[Secret, ...]
    """Values of all variables whose names say that they are secret, ours or not; logs hide them."""
    warnings: tuple[str, ...]
    """One sentence for each variable that is set and counts as unset."""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The process's environment, or `environ` in its place.

        Raises:
            ConfigError: a variable has a value that it may not have.
        """
        environ = os.environ if environ is None else environ
        warnings = [
            _placeholder_warning(variable.name, environ[variable.name])
            for variable in VARIABLES
            if _is_placeholder(environ.get(variable.name, ""))
        ]
        values = {variable.name: _value(environ, variable) for variable in VARIABLES}
        key = values["WANDB_API_KEY"]
        password = values["DASHBOARD_PASSWORD"]
        runpod_key = values["RUNPOD_API_KEY"]
        return cls(
            workspace=Path(values["WORKSPACE"] or ""),
            config=values["CONFIG"],
            run_name=values["RUN_NAME"],
            log_level=_one_of("LOG_LEVEL", values["LOG_LEVEL"] or "", LOG_LEVELS),
            dashboard_password=None if password is None else Secret(password),
            dashboard_auth=_one_of("DASHBOARD_AUTH", values["DASHBOARD_AUTH"] or "", DASHBOARD_AUTHS),
            dashboard_host=values["DASHBOARD_HOST"] or "",
            port=_port(values["PORT"] or ""),
            wandb_api_key=None if key is None else Secret(key),
            wandb_mode=values["WANDB_MODE"] and _one_of("WANDB_MODE", values["WANDB_MODE"], WANDB_MODES),
            notify_url=_webhook(values["NOTIFY_URL"]),
            public_key=values["PUBLIC_KEY"],
            runpod_pod_id=values["RUNPOD_POD_ID"],
            runpod_volume_id=values["RUNPOD_VOLUME_ID"],
            runpod_api_key=None if runpod_key is None else Secret(runpod_key),
            secrets=_secrets(environ),
            warnings=tuple(warnings),
        )

    @classmethod
    def read_usable(cls, environ: Mapping[str, str] | None = None) -> tuple[Self, tuple[str, ...]]:
        """The environment without the variables that have a value they may not have, and what is wrong with each."""
        usable, problems = dict(os.environ if environ is None else environ), []
        for variable in VARIABLES:
            try:
                cls.read({variable.name: usable.get(variable.name, "")})
            except ConfigError as error:
                problems.append(str(error))
                del usable[variable.name]
        return cls.read(usable), tuple(problems)

    @property
    def wandb_on(self) -> bool:
        """Whether this process talks to Weights & Biases or writes an offline run for it."""
        if self.wandb_mode == "disabled":
            return False
        return self.wandb_api_key is not None or self.wandb_mode == "offline"


@dataclass(frozen=True)
class LauncherRanks:
    """This process's place among those that torch's elastic launcher started."""

    rank: int
    size: int
    local_rank: int
    """Among the processes of this machine: the number of its GPU."""


def launcher_ranks(environ: Mapping[str, str] | None = None) -> LauncherRanks | None:
    """The place of a process that `torch.distributed.run` started, or None.

    RANK and WORLD_SIZE alone are not enough: RunPod's clusters set such variables for every process of a pod, and a
    plain `python -m app train` that believed them would wait for processes that nobody starts.
    """
    environ = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    return LauncherRanks(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]))


def preset_ranks(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a launcher that are set though none started this process, as on RunPod's clusters."""
    environ = os.environ if environ is None else environ
    if launcher_ranks(environ) is not None:
        return {}
    return {name: environ[name] for name in PRESET_BY_CLUSTERS if environ.get(name, "").strip()}


def unresolved_placeholders(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """`{{ RUNPOD_SECRET_name }}` by the variable, ours or not, that holds it in place of a secret."""
    environ = os.environ if environ is None else environ
    found = {}
    for name, text in sorted(environ.items()):
        match = RUNPOD_PLACEHOLDER.search(text)
        if match:
            found[name] = match[0]
        elif _is_placeholder(text) and (SECRET_NAME.search(name) or any(name == each.name for each in VARIABLES)):
            found[name] = text.strip()
    return found


def wandb_api(environ: Mapping[str, str] | None = None) -> str:
    """Address of Weights & Biases, which reads WANDB_BASE_URL itself."""
    environ = os.environ if environ is None else environ
    return environ.get("WANDB_BASE_URL", "").strip().rstrip("/") or WANDB_API


def visible_gpus(environ: Mapping[str, str] | None = None) -> str | None:
    """CUDA_VISIBLE_DEVICES as it stands: unset is all GPUs, and empty, unlike for our own variables, is none."""
    environ = os.environ if environ is None else environ
    return environ.get("CUDA_VISIBLE_DEVICES")


def child_environment(added: Mapping[str, str]) -> dict[str, str]:
    """What a child process gets: this process's variables, the defaults of ours that are unset, and `added`."""
    defaults = {variable.name: variable.default for variable in VARIABLES if variable.default}
    return {**defaults, **os.environ, **added}


def shell_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a shell by SSH needs to work as the container does; all others stay where they are."""
    environ = os.environ if environ is None else environ
    allowed = [*(variable.name for variable in VARIABLES), *SHELL_VARIABLES]
    return {name: environ[name] for name in allowed if environ.get(name, "").strip()}


def _is_placeholder(text: str) -> bool:
    return PLACEHOLDER.fullmatch(text) is not None


def _placeholder_warning(name: str, text: str) -> str:
    return (
        f"{name} holds the unresolved placeholder {text.strip()} and counts as unset: "
        f"create that secret in the RunPod console, or set {name} itself"
    )


def _value(environ: Mapping[str, str], variable: Variable) -> str | None:
    text = environ.get(variable.name, "").strip()
    if not text or _is_placeholder(text):
        return variable.default or None
    return text


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"environment variable {name}: expected one of {', '.join(choices)}, found {value!r}")
    return value


def _webhook(text: str | None) -> Secret | None:
    if text is None:
        return None
    if not WEBHOOK.fullmatch(text):
        raise ConfigError(
            "environment variable NOTIFY_URL: expected http:// or https:// and a host, without user and password, in "
            "printable ASCII without blanks; what was found is not shown, because it may be a secret"
        )
    return Secret(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= LARGEST_PORT):
        raise ConfigError(f"environment variable PORT: expected a number from 1 to {LARGEST_PORT}, found {text!r}")
    return int(text)


def _secrets(environ: Mapping[str, str]) -> tuple[Secret, ...]:
    texts = {text.strip() for name, text in environ.items() if SECRET_NAME.search(name) and not _is_placeholder(text)}
    # Shorter values are words such as "1" or "yes"; hiding them would make logs unreadable and protect nothing.
    return tuple(Secret(text) for text in sorted(texts, key=lambda t: (-len(t), t)) if len(text) >= SHORTEST_SECRET)
