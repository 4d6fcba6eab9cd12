"""`python -m app doctor`: which checks are made of a machine, a config and an environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from app.config import Config
from app.doctor import gpu, machine, services, settings, volume
from app.doctor.finding import Check, Finding, Verdict, examine
from app.env import Environment, cluster_node, preset_ranks, unresolved_placeholders, visible_gpus, wandb_api
from app.errors import ConfigError
from app.train.processes import processes_of
from app.workspace import RunDir, Workspace

COUNTING_S = 300.0
"""For sizes and memory, which are counted on shapes alone, on a busy machine."""
READING_S = 120.0
"""For a scan or an event file of some hundred MiB over a network."""
REMOTE_S = 10.0
"""Of one request. It has a shorter deadline of its own, which a resolver that hangs does not keep."""
NETWORK = "Look at the pod's network; it trains without"


class Examination:
    """What is examined.

    Args:
        env: the usable part of the environment.
        problems: what is wrong with the rest.
        load: the config and its name; raises ConfigError.
        offline: ask no server.
        brief: at the start of a container, where what takes long, and what the trainer says itself, is left out.
    """

    def __init__(
        self,
        env: Environment,
        problems: Sequence[str],
        load: Callable[[], tuple[str, Config]],
        offline: bool = False,
        brief: bool = False,
    ) -> None:
        self._env, self._problems, self._load, self._offline, self._brief = env, problems, load, offline, brief
        self._config: Config | None = None

    def findings(self) -> Iterator[Finding]:
        """One after the other, as they come."""
        yield from examine([Check("config", self._read_config)])
        yield from examine([*self._of_settings(), *(self._of_config(self._config) if self._config else [])])

    def _read_config(self) -> Finding:
        try:
            path, self._config = self._load()
        except ConfigError as error:
            return settings.config_refused("it is refused; the trainer says why" if self._brief else str(error))
        return settings.config_loaded(path, self._config)

    def _of_settings(self) -> list[Check]:
        """What can be asked without a config."""
        env = self._env
        checks = [
            Check("variables", lambda: settings.variables(self._problems)),
            Check("secrets", lambda: settings.secrets(unresolved_placeholders())),
            Check("launch", lambda: settings.launch(preset_ranks(), cluster_node())),
            Check("volume", lambda: volume.filesystem(env.workspace)),
            Check("pod_disk", lambda: volume.pod_disk(env)),
            Check("wandb_key", lambda: services.wandb_key(env)),
        ]
        if not self._offline:
            checks.append(_remote("wandb", lambda: services.wandb_reach(env, wandb_api())))
        return checks

    def _of_config(self, config: Config) -> list[Check]:
        env, device = self._env, config.compute.device
        workspace = Workspace(env.workspace)
        run_dir = workspace.run_dir(config.run_name)
        on_pod = env.runpod_pod_id is not None
        seen = cache(lambda: gpu.look(device, visible_gpus()))
        sizes = cache(lambda: self._sizes(config, run_dir))

        def largest() -> int:
            return max(sizes().values(), default=0)

        def used() -> int:
            return processes_of(config, (), len(seen().cards), _machines())

        def data() -> Finding:
            # Imported late: reading volumes takes libraries that every start would wait for.
            from app.doctor.data import data

            return data(config, workspace)

        kernels = Check("kernels", lambda: gpu.kernels(device, seen()), COUNTING_S)
        memory = Check("memory", lambda: gpu.memory(config, seen(), machine.usable_ram()), COUNTING_S)
        checks = [
            Check("driver", lambda: gpu.driver_suits(device, seen(), gpu.wheel_cuda())),
            Check("gpus", lambda: gpu.gpus(device, seen(), used(), on_pod)),
            *([] if self._brief else [kernels, memory]),
            Check("shm", lambda: machine.shm(config)),
            Check("ram", lambda: machine.ram(config, largest(), gpu.trains_on_gpu(device, seen())), COUNTING_S),
            Check("write", lambda: volume.write(run_dir.path, largest())),
            Check("room", lambda: volume.room(config, run_dir, sizes())),
            Check("clock", lambda: machine.clock(run_dir), READING_S, Verdict.WARN),
            # torch is imported last where the trainer is about to import it, too.
            kernels if self._brief else Check("data", data, READING_S),
        ]
        if not self._offline:
            checks.append(_remote("runpod", lambda: services.runpod(env, config.pod)))
        return checks

    def _sizes(self, config: Config, run_dir: RunDir) -> dict[str, int]:
        """Bytes of a checkpoint of each stage; at the start of a container only of those that have one already."""
        known = volume.known_sizes(run_dir)
        if self._brief:
            return known
        from app.train.memory import checkpoint_bytes

        return {stage.name: checkpoint_bytes(config, stage) for stage in config.stages} | known


def _machines() -> int:
    """Of the run; variables that contradict each other are the finding of another check."""
    try:
        node = cluster_node()
    except ConfigError:
        return 1
    return 1 if node is None else node.count


def _remote(name: str, ask: Callable[[], Finding | None]) -> Check:
    return Check(name, ask, REMOTE_S, late=Verdict.WARN, late_advice=NETWORK, remote=True)
