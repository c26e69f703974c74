"""How far a long job is: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 10.0


class _Shown:
    """A count on its way to a total."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label, self.loss = console, label, ""
        self.bar: Progress | None = None
        self.last_line = time.monotonic()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _start(self, label: str, total: int, done: int) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total, completed=done, loss="")
        self.bar.start()

    def _show(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, loss=self.loss)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.console.print(f"{self.label}: {done} of {total} {self.loss}")


class StageProgress(_Shown):
    """Shows the stages of a computation, one after the other; called with the stage, the number done and of all."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "")

    def __call__(self, stage: str, done: int, count: int) -> None:
        if stage != self.label:
            self.stop()
            self.label = stage
            self._start(stage, count, done)
        self._show(done, count)
        if done == count:
            self.stop()


class StepProgress(_Shown, TrainerCallback):
    """Shows the optimizer steps of a run and its newest loss, then the batches of an evaluation."""

    def __init__(self, console: Console, label: str) -> None:
        super().__init__(console, label)
        self.is_training = False
        self.measured = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.is_training = True
        if state.is_world_process_zero:
            self._start(self.label, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._show(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.4g}"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.is_training = False
        self.stop()

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.is_training or not state.is_world_process_zero:
            return  # an evaluation between epochs: the bar of the training stays
        total = len(eval_dataloader) if eval_dataloader is not None else 0
        if self.bar is None:
            self.measured = 0
            self._start(f"{self.label}: measuring", total, 0)
        self.measured += 1
        self._show(self.measured, total)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.is_training:
            self.stop()
