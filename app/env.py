"""The environment of the process: the only module that reads `os.environ`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.env_variables import VARIABLES, Variable
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


INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""What tells torch's two backends which network the processes of a run talk through; NCCL's `=` is an exact match."""


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
    pod_cost_per_hour: float | None
    """USD."""
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
            pod_cost_per_hour=_price(values["POD_COST_PER_HOUR"]),
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


def this_pod(environ: Mapping[str, str] | None = None) -> tuple[str | None, Secret | None]:
    """RUNPOD_POD_ID and RUNPOD_API_KEY alone, for a process whose other variables may be wrong."""
    environ = os.environ if environ is None else environ
    only = Environment.read({name: environ[name] for name in ("RUNPOD_POD_ID", "RUNPOD_API_KEY") if name in environ})
    return only.runpod_pod_id, only.runpod_api_key


@dataclass(frozen=True)
class LauncherRanks:
    """This process's place among those that torch's elastic launcher started."""

    rank: int
    size: int
    local_rank: int
    """Among the processes of this machine: the number of its GPU."""
    local_size: int
    """Processes of this machine."""
    node: int
    """Number of this machine."""


def launcher_ranks(environ: Mapping[str, str] | None = None) -> LauncherRanks | None:
    """The place of a process that `app.launch` or `torch.distributed.run` started, or None.

    RANK and WORLD_SIZE alone are not enough: RunPod's clusters set such variables for every process of a pod, and a
    plain `python -m app train` that believed them would wait for processes that nobody starts.
    """
    environ = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    return LauncherRanks(*(int(environ[name]) for name in names))


@dataclass(frozen=True)
class ClusterNode:
    """This machine among those that train one run together."""

    rank: int
    count: int
    address: str
    """Of the first machine."""
    port: int


def cluster_node(environ: Mapping[str, str] | None = None) -> ClusterNode | None:
    """This machine's place in a cluster; None for one by itself.

    Raises:
        ConfigError: NUM_NODES says that there is a cluster, and the other variables do not say where this machine is.
    """
    environ = os.environ if environ is None else environ
    count = _whole(environ, "NUM_NODES", "1", 1)
    if count == 1:
        return None
    address = (environ.get("MASTER_ADDR") or environ.get("PRIMARY_ADDR") or "").strip()
    if not address:
        raise ConfigError(f"NUM_NODES is {count}, and neither MASTER_ADDR nor PRIMARY_ADDR names the first machine")
    rank = _whole(environ, "NODE_RANK", "", 0, count - 1)
    port = _whole(environ, "MASTER_PORT", environ.get("PRIMARY_PORT", ""), 1, LARGEST_PORT)
    return ClusterNode(rank, count, address, port)


def process_environment(place: Mapping[str, str], interface: str | None) -> dict[str, str]:
    """What a process of a launched run gets: a child's environment with its place.

    Args:
        place: RANK and its like.
        interface: of the network between the processes; a choice that stands in the environment goes before it.
    """
    found = {} if interface is None else {name: text.format(interface) for name, text in INTERFACES.items()}
    chosen = {name: text for name, text in found.items() if not os.environ.get(name)}
    return child_environment({**chosen, **place})


def hide_native_log() -> None:
    """Before torch is imported: its C++ parts print stack traces where another machine is gone, which is no mystery."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def fix_cublas_workspace() -> None:
    """Before the GPU computes anything: with a choice of its own cuBLAS may take another order of sums each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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


def _whole(environ: Mapping[str, str], name: str, default: str, least: int, most: int | None = None) -> int:
    text = environ.get(name, "").strip() or default
    if not (text.isascii() and text.isdigit()) or int(text) < least or (most is not None and int(text) > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"environment variable {name}: expected a whole number {limits}, found {text!r}")
    return int(text)


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


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price > 0):
        raise ConfigError(
            f"environment variable POD_COST_PER_HOUR: expected a price in USD per hour above 0, such as 0.44, found "
            f"{text!r}. Unset it where the price is not known"
        )
    return price


def _secrets(environ: Mapping[str, str]) -> tuple[Secret, ...]:
    texts = {text.strip() for name, text in environ.items() if SECRET_NAME.search(name) and not _is_placeholder(text)}
    # Shorter values are words such as "1" or "yes"; hiding them would make logs unreadable and protect nothing.
    return tuple(Secret(text) for text in sorted(texts, key=lambda t: (-len(t), t)) if len(text) >= SHORTEST_SECRET)
