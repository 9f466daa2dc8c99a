"""One rank of a storm of signals: fit after fit in one process, each ended by a real signal and gone on with.

Run as a script: `signal_storm.py SHARDS FOLDER TRIALS`.
It says `running N` when trial N trains; the parent signals, and then
writes a line to its input.
"""

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from launch import signals
from tests.support.stepping_fits import Steps, build, losses

#: Steps of the undisturbed run, and how many a stopped one takes after it has gone on.
WHOLE, MORE = 500, 7
EVERY_OTHER_ACCUMULATES = (1, 2)


class Says(Callback):
    """Tells the parent that training begins."""

    def __init__(self, line: str) -> None:
        self.line = line

    def on_train_start(self, trainer, pl_module):
        print(self.line, flush=True)


def fit(shards, folder: Path, *, accumulate: int, steps: int, callbacks=()) -> Trainer:
    trainer, data, stop = build(shards, folder, steps=steps, accumulate=accumulate, callbacks=callbacks)
    last = stop.last_checkpoint.path
    try:
        trainer.fit(Steps(), datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    except signals.Stopped:
        dist.barrier()  # the last exchange of all ranks is over
        stop.agreement.close()
        raise
    return trainer


def forget_signals() -> None:
    while signal.sigtimedwait({signals.stop_signal(), signal.SIGTERM}, 0) is not None:
        pass


def trial(shards, folder: Path, number: int) -> tuple[int, bool]:
    """The step that was saved, and whether that is the one that was stopped after."""
    accumulate = EVERY_OTHER_ACCUMULATES[number % 2]
    try:
        fit(shards, folder, accumulate=accumulate, steps=10**6, callbacks=[Says(f"running {number}")])
        raise AssertionError("the fit has ended by itself")
    except signals.Stopped as stopped:
        where, status = stopped.where, stopped.code
    assert status == 75, status
    assert sys.stdin.readline() == f"sent {number}\n"  # both ranks have been signalled by now
    forget_signals()
    path = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0
    fit(shards, folder, accumulate=accumulate, steps=saved + MORE)
    return saved, where == f"after step {saved}"


def main(shards: str, root: Path, trials: int) -> None:
    signals.block_signals("fit")
    torch.set_num_threads(1)
    whole = {}
    for accumulate in EVERY_OTHER_ACCUMULATES:
        trainer = fit(shards, root / f"whole-{accumulate}", accumulate=accumulate, steps=WHOLE)
        if trainer.is_global_zero:
            whole[accumulate] = losses(root / f"whole-{accumulate}")
            assert [step for step, _ in whole[accumulate]] == [str(step) for step in range(WHOLE)]
    for number in range(trials):
        saved, there = trial(shards, root / f"trial-{number}", number)
        if trainer.is_global_zero:
            assert saved + MORE <= WHOLE, f"trial {number} came to step {saved}, further than what it is compared with"
            expected = whole[EVERY_OTHER_ACCUMULATES[number % 2]][: saved + MORE]
            assert losses(root / f"trial-{number}") == expected, f"trial {number} differs after step {saved}"
            print(f"done {number} {saved} {int(there)}", flush=True)
    print("finished", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
