"""Every configuration that is shipped can be read, and the real ones say what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from jf_cluster.command import load
from jf_cluster.config import Config, ConfigError, load_config
from jf_cluster.ray_environment import HOME_VARIABLE

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert load_config(path, ["train.learning_rate=1e-5"]).train.learning_rate == 1e-5
    by_round = load_config(path, ["train.learning_rate=[3e-5,2e-5]", "train.ar_weight=[5,20]"]).train
    rounds = [by_round.of_round(r) for r in (1, 2, 3)]
    assert [(each.learning_rate, each.ar_weight) for each in rounds] == [(3e-5, 5.0), (2e-5, 20.0), (2e-5, 20.0)]


def test_the_papers_settings() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "qwen2.5-coder-7b"))
    assert [config.collect.block_size_of(r) for r in (1, 2, 3)] == [16, 32, 32]
    assert (config.noise.window, config.noise.schedule) == (16, "progressive")
    assert (config.train.ar_weight, config.train.learning_rate) == (10.0, 1e-6)
    assert config.train.workers == 8 and config.train.gpus_per_worker == 1
    assert config.prompts.source == "nvidia/OpenCodeInstruct"


def test_relative_paths_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "q.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    path = CONFIGS[-1].parent / "tiny.yaml"
    config = load_config(path, ["prompts.source=q.jsonl", "store=there"]).anchored(tmp_path)
    monkeypatch.chdir("/")
    assert config.run_dir == tmp_path / "runs" / "tiny" and config.store_url == str(tmp_path / "there")
    assert config.prompts.source == str(tmp_path / "here" / "q.jsonl") and config.model.path == "tiny"
    assert load_config(path, ["store=s3://bucket/run"]).anchored(tmp_path).store_url == "s3://bucket/run"


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell replaces it at the start of a word only, and YAML never."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    path = CONFIGS[-1].parent / "tiny.yaml"
    places = ["runs_dir=~/runs", "store=~/store", "model.path=~/model", "prompts.source=~/q.jsonl"]
    config = load(path, [*places, "evaluate.source=~/e.jsonl"])
    me = tmp_path / "me"
    assert config.run_dir == me / "runs" / "tiny" and config.store_url == str(me / "store")
    assert (config.model.path, config.prompts.source) == (str(me / "model"), str(me / "q.jsonl"))
    assert config.evaluate.source == str(me / "e.jsonl")


def test_a_job_in_a_copy_of_its_directory_reads_and_writes_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every edit gives the copy another name, and the run's settings must stay the same."""
    home, copies = tmp_path / "home", [tmp_path / "runtime_resources" / name for name in ("a", "b")]
    for directory in (home, *copies):
        (directory / "data").mkdir(parents=True)
        (directory / "data" / "q.jsonl").write_text("{}")
    path = CONFIGS[-1].parent / "tiny.yaml"
    overrides = ["prompts.source=data/q.jsonl", "model.path=data", "evaluate.source=data/q.jsonl"]
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    for directory in copies:
        monkeypatch.chdir(directory)
        config = load(path, overrides)
        assert config.run_dir == home / "runs" / "tiny"
        assert config.prompts.source == config.evaluate.source == str(home / "data" / "q.jsonl")
        assert config.model.path == str(home / "data")
        assert load(path, [*overrides, f"runs_dir={tmp_path}"]).prompts == config.prompts
    monkeypatch.delenv(HOME_VARIABLE)
    with pytest.raises(ConfigError, match="results would be lost"):
        load(path, overrides)
    assert load(path, [f"runs_dir={tmp_path}", "store=s3://bucket/run"]).run_dir == tmp_path / "tiny"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key"),
        ("train.steps=none", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.workers=3", "multiple of workers"),
        ("name=../else", "name"),
        ("tracking.experiment=../../../else", r"tracking\.experiment: .*leave out '\.\.'"),
        ("tracking.experiment=team/..", r"tracking\.experiment"),
        ("tracking.experiment=a\\\\b", r"tracking\.experiment"),
        ("steps", "not of the form key.sub=value"),
        ("collect.responses=mine", "collect.responses"),
        ("runs_dir=s3://bucket/runs", "runs_dir: .*only store may be a URL"),
        ("runs_dir=~nobody-at-all/runs", "runs_dir: .*nobody's home directory is ~nobody-at-all"),
        ("collect.block_size=0", r"collect\.block_size"),
        ("train.learning_rate=.inf", r"train\.learning_rate.*finite"),
        ("train.betas=[.nan,0.9]", r"train\.betas\.0.*finite"),
        ("train.gpus_per_worker=0.5", r"train\.gpus_per_worker: .*integer"),
        ("train.betas=[0.9,1.0]", r"train\.betas\.1.*less than 1"),
        ("train.lora.target_modules=[q_proj,lm_head]", r"train\.lora\.target_modules: .*lm_head cannot have adapters"),
        ("collect.block_size.0=8", r"block_size\.0=8: .*override a list"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS[-1].parent / "tiny.yaml", [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- name: x\n", "mine.yaml holds a list; a configuration is keys with their values"),
        (b"name: caf\xe9\n", "mine.yaml cannot be read as YAML in UTF-8"),
        (b"5\n", "mine.yaml cannot be read"),
        (b"name: [x\n", "mine.yaml cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_one_block_size_is_that_of_every_round(tmp_path: Path) -> None:
    one, listed = (load_config(CONFIGS[-1].parent / "tiny.yaml", [f"collect.block_size={v}"]) for v in ("8", "[8]"))
    assert one == listed and one.collect.block_size_of(3) == 8
    assert one.to_yaml() == listed.to_yaml(), "a run begun with one goes on with the other"
    assert Config.model_validate_json(one.model_dump_json()) == one
