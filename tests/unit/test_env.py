from pathlib import Path

import pytest

from app.env import (
    ClusterNode,
    Environment,
    LauncherRanks,
    Secret,
    cluster_node,
    launcher_ranks,
    preset_ranks,
    process_environment,
    this_pod,
    unresolved_placeholders,
    wandb_api,
)
from app.env_variables import CLUSTER_VARIABLES, VARIABLES
from app.errors import ConfigError


def test_an_empty_environment_has_the_defaults():
    """Nothing set: the workspace of the container, no W&B, no run name."""
    env = Environment.read({})
    assert env.workspace == Path("/workspace")
    assert (env.config, env.run_name, env.wandb_api_key, env.wandb_mode) == (None, None, None, None)
    assert (env.log_level, env.wandb_on, env.secrets, env.warnings) == ("INFO", False, (), ())


def test_empty_values_count_as_unset():
    """A template that passes empty variables changes nothing."""
    assert Environment.read({variable.name: " " for variable in VARIABLES}) == Environment.read({})


def test_an_unresolved_placeholder_counts_as_unset_and_is_reported():
    """RunPod hands over the placeholder's own text where the secret does not exist."""
    env = Environment.read({"WANDB_API_KEY": "{{ RUNPOD_SECRET_wandb }}"})
    assert env.wandb_api_key is None
    assert not env.wandb_on
    assert env.secrets == ()
    assert env.warnings == (
        "WANDB_API_KEY holds the unresolved placeholder {{ RUNPOD_SECRET_wandb }} and counts as unset: "
        "create that secret in the RunPod console, or set WANDB_API_KEY itself",
    )


def test_a_secret_shows_itself_only_on_request():
    """Neither repr nor str of the environment holds the key."""
    env = Environment.read({"WANDB_API_KEY": "0123456789abcdef", "NOTIFY_URL": "https://hooks.example/T0/B1"})
    assert "0123456789abcdef" not in f"{env!r} {env} {env.wandb_api_key}"
    assert "hooks.example" not in f"{env!r}"
    assert env.wandb_api_key == Secret("0123456789abcdef")
    assert env.wandb_api_key.reveal() == "0123456789abcdef"


def test_secrets_are_found_by_name_longest_first():
    """Keys, tokens, passwords, secrets and the webhook; values of fewer than 4 characters are words."""
    env = Environment.read(
        {
            "RUNPOD_API_KEY": "rp_1234",
            "HF_TOKEN": "hf_12345",
            "DASHBOARD_PASSWORD": "pass",
            "MY_SECRET": "no",
            "NOTIFY_URL": "https://hooks.example/1",
            "KEYBOARD": "qwerty",
        }
    )
    assert [secret.reveal() for secret in env.secrets] == ["https://hooks.example/1", "hf_12345", "rp_1234", "pass"]


@pytest.mark.parametrize(
    ("environ", "on"),
    [
        ({"WANDB_API_KEY": "abcd"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_API_KEY": "abcd", "WANDB_MODE": "disabled"}, False),
        ({"WANDB_MODE": "online"}, False),
    ],
)
def test_wandb_is_on_with_a_key_or_offline(environ, on):
    """A key turns it on, offline needs none, disabled wins, online without a key stays off."""
    assert Environment.read(environ).wandb_on is on


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"WANDB_MODE": "ofline"},
            "environment variable WANDB_MODE: expected one of online, offline, disabled, found 'ofline'",
        ),
        (
            {"LOG_LEVEL": "loud"},
            "environment variable LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR, found 'loud'",
        ),
    ],
)
def test_a_value_outside_the_choices_is_an_error(environ, message):
    """The message names the variable, the choices and what was found."""
    with pytest.raises(ConfigError) as caught:
        Environment.read(environ)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.slack.com/services/T0/B1/x",
        "http://127.0.0.1:8080",
        "https://h.example?token=1",
        "http://[::1]/x",
    ],
)
def test_a_webhook_is_an_address_of_the_web(url):
    """And a secret."""
    env = Environment.read({"NOTIFY_URL": url})
    assert env.notify_url == Secret(url)
    assert env.secrets == (Secret(url),)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h.example/T0P53CR3T",
        "h.example/T0P53CR3T",
        "https:///T0P53CR3T",
        "https://u:T0P53CR3T@h.example/",
        "http://h/ T0P53CR3T",
    ],
)
def test_another_address_is_an_error_that_does_not_show_it(url):
    """It may be a mistyped secret."""
    with pytest.raises(ConfigError, match=r"^environment variable NOTIFY_URL: expected http:// or https://") as caught:
        Environment.read({"NOTIFY_URL": url})
    assert "T0P53CR3T" not in str(caught.value)


def test_only_the_elastic_launcher_makes_a_process_one_of_several():
    """RunPod's clusters set WORLD_SIZE and its like for every process; TORCHELASTIC_RUN_ID is the launcher's own."""
    ranks = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    assert launcher_ranks({**ranks, "MASTER_ADDR": "10.0.0.1"}) is None
    place = LauncherRanks(rank=6, size=8, local_rank=2, local_size=4, node=1)
    assert launcher_ranks({**ranks, "TORCHELASTIC_RUN_ID": "none"}) == place


@pytest.mark.parametrize("text", ["free", "0", "-1", "nan", "inf", "0,44"])
def test_a_price_is_a_positive_number(text):
    """The cost curves and the budget rest on it."""
    with pytest.raises(ConfigError, match="POD_COST_PER_HOUR: expected a price in USD per hour above 0"):
        Environment.read({"POD_COST_PER_HOUR": text})


def test_an_unknown_price_is_none():
    """And no reason not to train."""
    assert Environment.read({"POD_COST_PER_HOUR": " "}).pod_cost_per_hour is None
    assert Environment.read({"POD_COST_PER_HOUR": "0.44"}).pod_cost_per_hour == 0.44


def test_the_pod_is_known_though_other_variables_are_wrong():
    """A container that cannot start must still be stopped."""
    assert this_pod({"LOG_LEVEL": "LOUD", "RUNPOD_POD_ID": "abc", "RUNPOD_API_KEY": "rpa_1"}) == (
        "abc",
        Secret("rpa_1"),
    )
    assert this_pod({"LOG_LEVEL": "LOUD"}) == (None, None)


CLUSTER = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29400", "WORLD_SIZE": "16"}


def test_a_cluster_is_what_has_more_than_one_machine():
    """RunPod's variables, by either of their names; without NUM_NODES above 1 the others mean nothing."""
    assert cluster_node(CLUSTER) == ClusterNode(1, 2, "10.65.0.2", 29400)
    other = {name.replace("MASTER", "PRIMARY"): value for name, value in CLUSTER.items()}
    assert cluster_node(other) == ClusterNode(1, 2, "10.65.0.2", 29400)
    assert cluster_node({}) is None
    assert cluster_node({**CLUSTER, "NUM_NODES": "1", "NODE_RANK": "x"}) is None
    assert {variable.name for variable in CLUSTER_VARIABLES} == set(CLUSTER) - {"WORLD_SIZE"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NUM_NODES", "two", "environment variable NUM_NODES: expected a whole number of at least 1, found 'two'"),
        ("NODE_RANK", "2", "environment variable NODE_RANK: expected a whole number from 0 to 1, found '2'"),
        ("NODE_RANK", "", "environment variable NODE_RANK: expected a whole number from 0 to 1, found ''"),
        ("MASTER_PORT", "0", "environment variable MASTER_PORT: expected a whole number from 1 to 65535, found '0'"),
        ("MASTER_ADDR", " ", "NUM_NODES is 2, and neither MASTER_ADDR nor PRIMARY_ADDR names the first machine"),
    ],
)
def test_a_cluster_that_does_not_say_where_this_machine_is_is_an_error(name, value, message):
    """It names the variable and what it may be."""
    with pytest.raises(ConfigError) as caught:
        cluster_node({**CLUSTER, name: value})
    assert str(caught.value) == message


def test_the_processes_of_a_run_talk_through_one_network_unless_the_user_chose_another(monkeypatch):
    """NCCL matches prefixes, so its name says that it is whole."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    found = process_environment({"RANK": "3"}, "ens1")
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"], found["RANK"]) == ("eth1", "=ens1", "3")
    assert "NCCL_SOCKET_IFNAME" not in process_environment({}, None)


def test_ranks_without_a_launcher_are_preset_by_the_cluster():
    """With a launcher they are its own."""
    ranks = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": " ", "PATH": "/bin"}
    assert preset_ranks(ranks) == {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    assert preset_ranks({**ranks, "TORCHELASTIC_RUN_ID": "none"}) == {}


def test_placeholders_are_found_in_any_variable():
    """In ours, in secrets of others, and inside a longer text; a text with braces of its own is none."""
    environ = {
        "RUN_NAME": "{{ name }}",
        "HF_TOKEN": "{{ hf }}",
        "AUTHORIZATION": "Bearer {{ RUNPOD_SECRET_hf }}",
        "TEMPLATE": "{{ title }}",
        "WANDB_API_KEY": "0123",
    }
    assert unresolved_placeholders(environ) == {
        "AUTHORIZATION": "{{ RUNPOD_SECRET_hf }}",
        "HF_TOKEN": "{{ hf }}",
        "RUN_NAME": "{{ name }}",
    }


def test_the_usable_part_of_an_environment():
    """Every value that a variable may not have is reported, and the others stand."""
    env, problems = Environment.read_usable({"PORT": "http", "WANDB_MODE": "ofline", "RUNPOD_VOLUME_ID": "vol1"})
    assert (env.port, env.wandb_mode, env.runpod_volume_id) == (6006, None, "vol1")
    assert [problem.split(":")[0] for problem in problems] == [
        "environment variable PORT",
        "environment variable WANDB_MODE",
    ]


def test_weights_and_biases_is_where_it_looks_itself():
    """A server of one's own is in its own variable."""
    assert wandb_api({}) == "https://api.wandb.ai"
    assert wandb_api({"WANDB_BASE_URL": "http://wandb.example/"}) == "http://wandb.example"
