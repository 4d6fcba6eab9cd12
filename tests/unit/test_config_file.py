"""Claims about config files: what is accepted, and the text of every message about what is not."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from app.config import Config
from app.config_fields import keys
from app.config_file import config_as_dict, config_from_checkpoint, load_config, resolved_yaml
from app.config_findings import WORDING
from app.config_yaml import dump_yaml, read_yaml
from app.env import Environment
from app.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
ENV = Environment.read({})
TOP = ", ".join(Config.model_fields)
STAGE = (
    "resolution, backbone, epochs, samples_per_epoch, batch, micro_batch, learning_rate, ema_decay, sampler_steps, "
    "sart_sweeps, prior_sweeps"
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes text to `c.yaml` in the current folder, so that messages name it shortly."""
    monkeypatch.chdir(tmp_path)

    def _write(text):
        path = Path("c.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def message(path, *overrides, env=ENV):
    """The text of the ConfigError, without the headline where the headline only counts."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, env)
    assert caught.value.exit_code == 78
    return str(caught.value)


def findings(path, *overrides, env=ENV):
    """The findings of a load, one a line."""
    head, *lines = message(path, *overrides, env=env).split("\n  ")
    assert head.startswith(f"{path}: {len(lines)} problem")
    return lines


@pytest.mark.parametrize("name", ["demo", "real-small", "runpod"])
def test_the_shipped_configs_load(name):
    """Each file fits the schema, and their resolved form loads back to the same config."""
    config = load_config(ROOT / f"configs/{name}.yaml", [], ENV)
    assert Config.model_validate(read_yaml(resolved_yaml(config)).data) == config


def test_the_shipped_configs_have_the_stages_of_the_contract():
    """Stage names stand in tags and file names."""
    names = {
        name: [stage.name for stage in load_config(ROOT / f"configs/{name}.yaml", [], ENV).stages]
        for name in ("demo", "real-small", "runpod")
    }
    small = ["stage_16", "stage_32", "stage_64"]
    assert names == {"demo": small, "real-small": small, "runpod": ["stage_64", "stage_128", "stage_256"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1e3),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        ("'1e-4'", "1e-4"),
        ("!!str 5", "5"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    """Section 10.3.2 of YAML 1.2: none of the surprises of YAML 1.1."""
    found = read_yaml(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("value", [1e-5, 1e22, 0.1, 5e-324, 3, True, None, "no", "1e4", "null", "12", "", "a: b", "#x"])
def test_dumped_values_load_back(value):
    """Text that looks like a number stays text, and floats keep every bit."""
    data = {"a": value, "b": [value, value], "c": [{"d": value}]}
    assert read_yaml(dump_yaml(data)).data == data


def test_the_resolved_config_is_ordinary_yaml():
    """Any YAML reader gets the same values, so that the file is of use outside this code."""
    config = load_config(ROOT / "configs/demo.yaml", [], ENV)
    assert yaml.safe_load(resolved_yaml(config)) == config_as_dict(config)


def test_anchors_and_merge_keys_work(write):
    """A stage may take over another's backbone and change one key; the later key wins over the merged one."""
    path = write(
        "stages:\n- resolution: 16\n  backbone: &b {patch: 1, widths: [48]}\n"
        "- {resolution: 32, backbone: {<<: *b, patch: 2}}"
    )
    first, second = load_config(path, ["stages.*.backbone.xray_widths=[16]"], ENV).stages
    assert (first.backbone.patch, second.backbone.patch) == (1, 2)
    assert second.backbone.widths == (48,)


def test_every_finding_is_reported_at_once_with_its_line(write):
    """Six mistakes in one file and one in an override: a line each, in the file's order."""
    path = write(
        "run_nam: x\nseed: 1\nseed: 2\nstages:\n- resolution: 16\n"
        "  backbone: {patch: 1, widths: [48], xray_widths: [16]}\n"
        "  epoch: 3\ndata:\n  source: cts\n  hu_window: [0, -1]\ncompute:\n  workers: .nan\nphysics:\n  weight: heavy\n"
    )
    assert findings(path, "wandb=3") == [
        "--set wandb=3: wandb: expected a section of keys, found 3",
        f"c.yaml:1: run_nam: unknown key; did you mean 'run_name'? Valid keys here: {TOP}",
        "c.yaml:3: seed: duplicate key, first on line 2: keep one of them",
        f"c.yaml:7: stages.0.epoch: unknown key; did you mean 'epochs'? Valid keys here: {STAGE}",
        "c.yaml:9: data.source: expected one of `ct`, `phantoms`, found 'cts'; did you mean 'ct'?",
        "c.yaml:12: compute.workers: expected a finite number, found .nan",
        "c.yaml:14: physics.weight: expected a number >= 0, found 'heavy': write the number without quotes and units",
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("seed: 1.5", "c.yaml:1: seed: expected a whole number >= 0, found 1.5"),
        ("seed: -1", "c.yaml:1: seed: expected a whole number >= 0, found -1"),
        ("seed: true", "c.yaml:1: seed: expected a whole number >= 0, found true"),
        (
            "seed: '7'",
            "c.yaml:1: seed: expected a whole number >= 0, found '7': write the number without quotes and units",
        ),
        (
            "run_name: a b",
            "c.yaml:1: run_name: expected text matching `^[A-Za-z0-9_-]{1,64}$` or null, found 'a b'",
        ),
        (
            "run_name: 7",
            "c.yaml:1: run_name: expected text matching `^[A-Za-z0-9_-]{1,64}$` or null, found 7: put it in quotes",
        ),
        (
            "data:\n  validation_fraction: 1",
            "c.yaml:2: data.validation_fraction: expected a number > 0, < 1, found 1",
        ),
        (
            "data:\n",
            "c.yaml:1: data: expected a section of keys, found nothing (null): indent its keys below it, or remove it",
        ),
        ("data: [1, 2]", "c.yaml:1: data: expected a section of keys, found [1, 2]"),
        ("data:\n  hu_window: [5]", "c.yaml:2: data.hu_window: expected a list of 2 numbers, found [5]"),
        ("data:\n  hu_window: [5, 6, 7]", "c.yaml:2: data.hu_window: expected a list of 2 numbers, found [5, 6, 7]"),
        (
            "data:\n  hu_window:\n  - low\n  - 5",
            "c.yaml:3: data.hu_window.0: expected a number, found 'low': write the number without quotes and units",
        ),
        (
            "compute: {device: gpu}",
            "c.yaml:1: compute.device: expected one of `auto`, `cuda`, `cpu`, found 'gpu'",
        ),
        (
            "compute: {processes: 0}",
            "c.yaml:1: compute.processes: expected `auto` or whole number >= 1, <= 64, found 0",
        ),
        (
            "compute: {processes: atuo}",
            "c.yaml:1: compute.processes: expected `auto` or whole number >= 1, <= 64, found 'atuo'; did you mean "
            "'auto'?",
        ),
        ("compute: {device: no}", "c.yaml:1: compute.device: expected one of `auto`, `cuda`, `cpu`, found 'no'"),
        ("stages: []", "c.yaml:1: stages: expected at least 1 item, found []"),
        ("stages: {}", "c.yaml:1: stages: expected a list of sections, found {}"),
        ("stages:\n- 64\n", "c.yaml:2: stages.0: expected a section of keys, found 64"),
        (
            "stages:\n- epochs: 3\n",
            "c.yaml:2: stages.0.resolution: is missing: expected a whole number >= 8, <= 512",
        ),
        (
            "stages:\n- resolution: 64\n  backbone:\n    checkpoint_activations: yes\n",
            "c.yaml:4: stages.0.backbone.checkpoint_activations: expected true or false, found 'yes'",
        ),
        ("epochs: 3", f"c.yaml:1: epochs: unknown key; did you mean 'stages.*.epochs'? Valid keys here: {TOP}"),
        ("qqq: 3", f"c.yaml:1: qqq: unknown key. Valid keys here: {TOP}"),
        ("1: 3", "c.yaml:1: expected text as key, found 1: put it in quotes if it is meant"),
        (
            "seed: !!python/name:os 1",
            "c.yaml:1: seed: the tag 'tag:yaml.org,2002:python/name:os' is not allowed in a config",
        ),
        ("data: &d\n  phantoms: *d", "c.yaml:2: data.phantoms: an alias may not contain itself"),
        ("data:\n  <<: 3", "c.yaml:2: data: '<<' takes over the keys of a mapping, such as *anchor"),
    ],
)
def test_a_wrong_value_is_explained(write, text, finding):
    """Where, what was expected, what was found, and a hint."""
    assert finding in findings(write(text))


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "seed: 1\ndata:\n  hu_window: [-2000, 0]",
            "c.yaml:2: data: hu_window needs -1000 <= low < high, found [-2000.0, 0.0]",
        ),
        (
            "geometry:\n  preset: custom",
            "c.yaml:1: geometry: preset custom needs source_to_detector_mm and source_to_isocenter_mm",
        ),
        (
            "geometry:\n  source_to_detector_mm: 1000",
            "c.yaml:1: geometry: preset chest_stand sets the distances itself: remove them or use preset: custom",
        ),
        (
            "geometry: {preset: custom, source_to_detector_mm: 1000, source_to_isocenter_mm: 1000}",
            "c.yaml:1: geometry: source_to_detector_mm must be larger than source_to_isocenter_mm",
        ),
        (
            "stages:\n- resolution: 64\n  backbone:\n    widths: [30]",
            "c.yaml:3: stages.0.backbone: widths and xray_widths must be multiples of 8, found [30]",
        ),
        (
            "stages:\n- resolution: 64\n  backbone: {vit_width: 100, vit_heads: 6}",
            "c.yaml:3: stages.0.backbone: vit_width 100 must be a multiple of 2 * vit_heads 12",
        ),
        (
            "stages:\n- resolution: 60",
            "c.yaml:2: stages.0: resolution 60 must be a multiple of 8 and at least 16 "
            "(patch 2 times 2 for each of 2 widths)",
        ),
        (
            "stages:\n- {resolution: 64, batch: 8, micro_batch: 3}",
            "c.yaml:2: stages.0: batch 8 must be a multiple of micro_batch 3",
        ),
        (
            "physics: {ramp_start: 0.9, ramp_end: 0.5}",
            "c.yaml:1: physics: ramp_start 0.9 must not be above ramp_end 0.5",
        ),
        (
            "stages: [{resolution: 64}, {resolution: 96}]",
            "c.yaml: stages must ascend, each a multiple of the one before: found [64, 96]",
        ),
    ],
)
def test_an_impossible_combination_has_the_line_of_its_section(write, text, finding):
    """Cross-field rules are reported like any other finding."""
    assert findings(write(text)) == [finding]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "data:\n\tpath: x",
            r"c.yaml:2:1: not valid YAML: found character '\t' that cannot start any token, while scanning for the "
            "next token: indent with spaces, never with tabs",
        ),
        (
            "run_name: a: b",
            "c.yaml:1:12: not valid YAML: mapping values are not allowed here: put text that contains ': ' in quotes, "
            "and check the indentation",
        ),
        (
            "data: [1\n",
            "c.yaml:2:1: not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence",
        ),
        ("data: *d", "c.yaml:1:7: not valid YAML: found undefined alias 'd'"),
        (
            "a: 1\n--- \nb: 2",
            "c.yaml:2:1: not valid YAML: but found another document, expected a single document in the stream",
        ),
        ("a: 1\nb: \x01", "c.yaml:2:1: not valid YAML: character #x0001 is not allowed"),
        ("", "c.yaml: is empty: expected keys such as run_name, data and stages"),
        ("# only a comment\n", "c.yaml: is empty: expected keys such as run_name, data and stages"),
        ("- 1\n", "c.yaml:1: expected keys with values at the top level, found a list"),
        ("demo", "c.yaml:1: expected keys with values at the top level, found a single value"),
        (b"run_name: \xff", "c.yaml: expected UTF-8 text, found byte 0xff at offset 10"),
    ],
)
def test_a_file_that_is_no_config_is_explained(write, text, expected):
    """Line and column of the syntax error, or what the file is instead."""
    assert message(write(text)) == expected


def test_a_missing_file_names_those_that_exist(write):
    """With the nearest one suggested."""
    write("seed: 1")
    shipped = ", ".join(f"{ROOT}/configs/{name}.yaml" for name in ("demo", "real-small", "runpod"))
    assert message("d.yaml") == f"d.yaml: no such file; did you mean c.yaml? Configs that exist: c.yaml, {shipped}"
    assert message("xyz/elsewhere.toml") == f"xyz/elsewhere.toml: no such file. Configs that exist: {shipped}"


def test_a_folder_is_no_config(write, tmp_path):
    """What the system says is passed on with the name."""
    assert message(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


def test_overrides_reach_every_stage_by_index_name_or_star(write):
    """Later overrides win over earlier ones and over the file."""
    path = write("stages: [{resolution: 64}, {resolution: 128, epochs: 9}]")
    config = load_config(
        path,
        ["stages.*.epochs=3", "stages.0.epochs=4", "stages.stage_128.learning_rate=1e-4", "data.phantoms.count=5"],
        ENV,
    )
    assert [stage.epochs for stage in config.stages] == [4, 3]
    assert config.stages[1].learning_rate == 1e-4
    assert config.data.phantoms.count == 5


def test_overrides_reach_lists_that_stand_only_in_the_defaults(write):
    """A file that does not name the stages has those of the schema."""
    config = load_config(write("seed: 1"), ["stages.stage_128.epochs=3", "stages.0.backbone.widths.1=64"], ENV)
    assert [stage.epochs for stage in config.stages] == [100, 3, 100]
    assert config.stages[0].backbone.widths == (64, 64)


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("seed", "--set seed: expected KEY=VALUE, such as stages.0.epochs=3"),
        ("a..b=1", "--set a..b=1: expected KEY=VALUE, such as stages.0.epochs=3"),
        (
            "wandb.project=[1",
            "--set wandb.project=[1: the value is not valid YAML: expected ',' or ']', but got '<stream end>', while "
            "parsing a flow sequence",
        ),
        ("seed=.inf", "--set seed=.inf: expected a finite number, found .inf"),
        ("seed.x=3", "--set seed.x=3: seed is a single value and has no key 'x'"),
        (
            "stages.stage_32.epochs=3",
            "--set stages.stage_32.epochs=3: stages is a list: expected one of stage_64, stage_128, an index or *, "
            "found 'stage_32'",
        ),
        ("stages.2.epochs=3", "--set stages.2.epochs=3: stages has 2 items, numbered from 0: there is no 2"),
        (
            "data.hu_window.low=3",
            "--set data.hu_window.low=3: data.hu_window is a list: expected an index or *, found 'low'",
        ),
        (
            "seed=x",
            "--set seed=x: seed: expected a whole number >= 0, found 'x': write the number without quotes and units",
        ),
        ("dta.path=x", f"--set dta.path=x: dta: unknown key; did you mean 'data'? Valid keys here: {TOP}"),
        (
            "stages.1.micro_batch=3",
            "c.yaml:3 (with --set stages.1.micro_batch=3): stages.1: batch 8 must be a multiple of micro_batch 3",
        ),
    ],
)
def test_a_wrong_override_is_named(write, override, finding):
    """The finding stands at the override, not at the line that it replaced."""
    path = write("seed: 1\nstages: [{resolution: 64},\n {resolution: 128}]")
    assert findings(path, override) == [finding]


def test_run_name_of_the_environment_replaces_that_of_the_file(write):
    """The value is text as it stands, never parsed as YAML; a wrong one is reported at its variable."""
    path = write("run_name: a")
    assert load_config(path, ["run_name=b"], Environment.read({"RUN_NAME": "123"})).run_name == "123"
    assert findings(path, env=Environment.read({"RUN_NAME": "../x"})) == [
        "environment variable RUN_NAME: run_name: expected text matching `^[A-Za-z0-9_-]{1,64}$` or null, found '../x'"
    ]


@pytest.mark.parametrize("bad", [None, True, -1, 1.5, 1e9, "x", [], ["x"], {}, {"x": 1}])
def test_every_error_of_the_schema_has_its_wording(bad):
    """Each key with each kind of wrong value: no error type without words."""
    for key in keys():
        data = config_as_dict(Config())
        place = data
        parts = [0 if part == "*" else part for part in key.path]
        for part in parts[:-1]:
            place = place[part]
        place[parts[-1]] = bad
        try:
            Config.model_validate(data)
        except ValidationError as error:
            unknown = {item["type"] for item in error.errors()} - set(WORDING) - {"missing"}
            assert unknown == set(), key.name


def test_a_checkpoint_of_an_older_version_takes_the_defaults_and_a_foreign_one_is_refused():
    """Keys that it lacks are not differences; keys that nobody knows are an error."""
    old = config_as_dict(Config())
    del old["physics"]
    assert config_from_checkpoint(old, Path("a.pt")) == Config()
    with pytest.raises(CheckpointError) as caught:
        config_from_checkpoint({"sed": 1}, Path("a.pt"))
    assert str(caught.value) == (
        "a.pt: 1 problem in the configuration\n"
        f"  config in a.pt: sed: unknown key; did you mean 'seed'? Valid keys here: {TOP}\n"
        "the checkpoint was written by another version of the application, or the file is not one of its own"
    )
