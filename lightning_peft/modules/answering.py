"""What modules share that answer records: the predictions' files, the scores, what is logged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.modules.adapted import AdaptedModule
from lightning_peft.modules.predictions import PredictionWriter
from lightning_peft.modules.window import Batch
from lightning_peft.runs import run_folder


class AnsweringModule(AdaptedModule):
    """An adapted module whose tests answer records, one file of predictions for each task.

    A kind of model overrides :meth:`answer`, and :meth:`named_scores` where its scores have other
    names. An interrupted test goes on with what it had written (:class:`PredictionWriter`).

    Args:
        kwargs: The arguments of :class:`AdaptedModule`.
    """

    bare_base: ClassVar[str] = "the bare base model"  # that a test without adapters scores

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.writer: PredictionWriter | None = None
        # Whether adapters have learned something: here, in a checkpoint, or in peft_path.
        self._adapted = self.peft_path is not None

    # What a kind of model says.

    def data_module(self) -> Any:
        """Gives the records, and judges and scores the answers."""
        return getattr(self.trainer, "datamodule", None)

    def answer(self, batch: Batch, writer: PredictionWriter) -> list[Any]:
        """Answer the records of a batch that are not answered yet, and write the answers.

        Returns:
            The answers.
        """
        raise NotImplementedError

    def named_scores(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """What is logged under ``test/``, by name.

        Args:
            scores: By task and metric.
        """
        named = {
            f"{task}/{metric}": value
            for task, metrics in scores.items()
            for metric, value in metrics.items()
        }
        return {**named, **mean_loss(scores)}

    # Lightning calls these.

    def on_fit_end(self) -> None:
        """A fitted model is adapted, whatever is tested next."""
        self._adapted = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint's model is adapted."""
        super().on_load_checkpoint(checkpoint)
        self._adapted = True

    def on_test_start(self) -> None:
        """Open the predictions, and go on with those of an interrupted test."""
        if not self._adapted and self.trainer.ckpt_path is None:
            rank_zero_warn(
                f"neither a checkpoint nor an adapter was given: this scores {self.bare_base} "
                "(--ckpt_path last, or --model.peft_path FOLDER)."
            )
        self.on_predict_start()

    def on_predict_start(self) -> None:
        """Open the predictions, and go on with those of an interrupted run."""
        trainer = self.trainer
        folder = run_folder(trainer)
        if folder is None:  # a trial, which keeps nothing
            self._scratch = TemporaryDirectory()
            folder = Path(self._scratch.name)
        weights = str(trainer.ckpt_path or self.peft_path or self.model_name_or_path)
        place = folder / "predictions"
        self.writer = PredictionWriter(place, self.data_module(), weights, trainer.global_rank)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer a batch, and write and judge the answers."""
        self.predict_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """Answer a batch, and write and judge the answers."""
        assert self.writer is not None
        return self.answer(batch, self.writer)

    def on_test_epoch_end(self) -> None:
        """Put the predictions together, score each task, and say all scores."""
        assert self.writer is not None
        scores = self.named_scores(self.writer.finish())
        if not scores:  # such as conversations, which are judged elsewhere
            rank_zero_info(f"no scores; the answers are in {self.writer.folder}")
            return
        for name, value in scores.items():
            self.log(f"test/{name}", value, rank_zero_only=True)
        lines = [f"  {name:28}{value:.4f}" for name, value in scores.items()]
        rank_zero_info("\n".join(["scores", *lines]))

    def on_predict_epoch_end(self) -> None:
        """Put the predictions together."""
        assert self.writer is not None
        self.writer.finish(score=False)


def mean_loss(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """``loss``, the unweighted mean of the tasks' losses; nothing unless all tasks have one.

    Args:
        scores: By task and metric.
    """
    losses = [metrics["loss"] for metrics in scores.values() if "loss" in metrics]
    complete = losses and len(losses) == len(scores)
    return {"loss": sum(losses) / len(losses)} if complete else {}
