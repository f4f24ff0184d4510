"""What the tests of whole runs share: a run in this process or in a forked one that can be killed, and its outcome."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vlmpeft import checkpoint, train
from vlmpeft.batch import IMAGE_TOKEN_ID
from vlmpeft.build import Bundle, assemble, build
from vlmpeft.config import load_recipe
from vlmpeft.errors import VlmpeftError, run_command
from vlmpeft.loop import StageTrainer
from vlmpeft.preflight import prepare_stages
from vlmpeft.resume import Position

gc.freeze()  # so that collections between stages need not walk all that is imported
FAST = ("vision.image_size=64", "stages.instruct.optim.epochs=1.5")
WRITES = ("open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir")  # audit events that change the disk
CLOCKED = ("tokens_per_s",)


def run_train(recipe: Path, directory: Path, *overrides: str) -> int:
    """`vlmpeft train` in this process. Returns: its exit status."""
    return run_command(train.main, [f"recipe={recipe}", f"run.dir={directory}", *FAST, *overrides])


def in_child(work: Callable[[], int | None]) -> int:
    """Run `work` in a forked process. Returns: its exit status; -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def refusal(call: Callable[[], object]) -> VlmpeftError | None:
    """The error with a code that `call` ends in, if any."""
    try:
        call()
    except VlmpeftError as error:
        return error
    return None


def signal_at(owner: Any, name: str, count: int, number: int = signal.SIGKILL, after: bool = False) -> None:
    """From now on the `count`-th call of `owner.name` sends this process a signal before (or after) its work."""
    original = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **options)
        if calls == count and after:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, counted)


def on_write(root: Path, act: Callable[[int], None]) -> Callable[[], int]:
    """Call `act` with the running number of every change to the disk below `root`. For a child: audit hooks stay.

    Returns: a function that tells how many there were.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WRITES and str(arguments[0]).startswith(str(root)):
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            count += 1
            act(count)

    sys.addaudithook(hook)
    return lambda: count


def kill_at_write(root: Path, number: int) -> None:
    """From now on the `number`-th change to the disk below `root` ends this process before it is made."""
    on_write(root, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; floats as exact hexadecimal text, without what the clock decides."""

    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: exact(v) for k, v in value.items()}
        return value.hex() if isinstance(value, float) else value

    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: exact(v) for k, v in row.items() if k not in CLOCKED} for row in rows]


def tensors(directory: Path) -> dict[str, bytes]:
    """Every safetensors file of a model directory, byte for byte: weights, and the optimizer's state in checkpoints."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*.safetensors"))}


def outcome(directory: Path) -> dict[str, Any]:
    """All that must agree between a straight run and an interrupted one."""
    kept = {p.name: tensors(p) for p in sorted((directory / "checkpoints").iterdir())}
    summary = json.loads((directory / "summary.json").read_text())
    stages = [{k: v for k, v in stage.items() if k != "seconds"} for stage in summary["stages"]]
    return {"metrics": metrics(directory), "checkpoints": kept, "final": tensors(directory / "final"), "stages": stages}


def make_bundle(recipe: Path, *overrides: str, seed: int = 0) -> Bundle:
    """A model as the recipe's last stage tunes it, with every trainable tensor away from its start."""
    bundle = build(load_recipe(str(recipe), [*FAST, *overrides]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bundle.tuned.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return bundle


def vary(bundle: Bundle) -> Bundle:
    """Give an untrained model weights so large that its texts vary; in place."""
    language = bundle.model.language
    language.lm_head.weight = torch.nn.Parameter(torch.zeros_like(language.lm_head.weight))
    torch.manual_seed(3)
    for parameter in bundle.model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return bundle


def some_logits(bundle: Bundle) -> torch.Tensor:
    """Logits of a fixed prompt about a fixed picture, (1, s, vocabulary)."""
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[7, *[IMAGE_TOKEN_ID] * bundle.image_tokens, 40, 41, 42, 60]])
    bundle.model.eval()
    with torch.no_grad():
        logits: torch.Tensor = bundle.model(ids, pixel_values=images).logits
    return logits


def make_trainer(recipe: Path, stage: str, directory: Path, *overrides: str) -> StageTrainer:
    """A stage ready to train, as if the stages before it had left their start weights."""
    loaded = load_recipe(str(recipe), [*FAST, *overrides])
    bundle = assemble(loaded, torch.device("cpu"), torch.float32, loaded.run.seed)
    directory.mkdir(exist_ok=True)
    stages, facts = prepare_stages(bundle, directory, lambda _: None)
    position = Position(stage=list(loaded.stages).index(stage))
    accelerator = Accelerator(cpu=True)
    return StageTrainer(
        bundle, stage, loaded.stages[stage], stages[stage], loaded.run, directory, accelerator, position, facts
    )


HOLDER = """
import sys, time
from pathlib import Path
from vlmpeft import fs
fs.acquire(Path(sys.argv[1])); print("held", flush=True); time.sleep(60)
"""


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock file; killed at the end at the latest."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def assert_answers_alone_as_in_company(bundle: Bundle, image: Path, directory: Path) -> None:
    """An answer is the same alone, in a batch of other lengths, beside a question about the same image, and from a
    directory it was saved to; and another without the adapters."""
    question = "What is shown?"
    alone = bundle.generate(image, question, max_new_tokens=6)
    asked = [(image, question), (None, "What is 1 plus 1?"), (image, "Is there a red square?")]
    assert bundle.generate_batch(asked, max_new_tokens=6)[0] == alone
    shared = bundle.generate_batch([(image, question), (image, question + " Now?")], max_new_tokens=6)
    assert shared[0] == alone
    with bundle.tuned.disable():
        assert bundle.generate(image, question, max_new_tokens=6) != alone
    checkpoint.save(bundle, directory)
    assert checkpoint.load(directory, device="cpu").generate(image, question, max_new_tokens=6) == alone
