"""The files for `accelerate launch`: accelerate knows every key, and the launcher makes of them what we read."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from vlmpeft.errors import EnvironmentFault
from vlmpeft.sharding import wanted

FOLDER = Path(__file__).parents[1] / "recipes" / "launch"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def arguments(name: str, *more: str) -> Namespace:
    """What `accelerate launch --config_file NAME.yaml` makes of a file."""
    line = ["--config_file", str(FOLDER / f"{name}.yaml"), *more, "-m", "vlmpeft.train", "recipe=llava_lora"]
    return _validate_launch_command(launch_command_parser().parse_args(line))[0]


@pytest.mark.parametrize("name", KINDS)
def test_every_key_is_one_accelerate_knows(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses unknown keys of the file itself
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name]
    options = {action.dest for action in launch_command_parser()._actions}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert section.keys() <= options, "a nested key the launcher would pass over in silence"
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= set(vars(config)) | {"distributed_type"}


def test_there_is_a_test_for_every_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


def test_the_fsdp2_file_reaches_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepare_multi_gpu_env(arguments("fsdp2", "--num_processes", "2", "--main_process_port", "29501"))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    several, one = Namespace(num_processes=2), Namespace(num_processes=1)
    assert wanted(several)  # type: ignore[arg-type]
    assert not wanted(one)  # type: ignore[arg-type]
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(EnvironmentFault, match=r"E431.*fsdp_offload_params"):
        wanted(several)  # type: ignore[arg-type]
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(EnvironmentFault, match=r"E431.*fsdp_version 1"):
        wanted(several)  # type: ignore[arg-type]


def test_the_ddp_file_asks_for_no_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepare_multi_gpu_env(arguments("ddp", "--num_processes", "2", "--main_process_port", "29501"))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert not wanted(Namespace(num_processes=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_give_their_stage_to_the_launcher(stage: int) -> None:
    found = arguments(f"deepspeed_zero{stage}", "--num_processes", "2")
    assert (found.use_deepspeed, int(found.zero_stage), float(found.gradient_clipping)) == (True, stage, 1.0)
