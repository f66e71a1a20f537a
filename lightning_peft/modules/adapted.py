"""The LightningModule around a model and one adapter strategy, whatever the model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_peft import distributed, engines
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.state import gate_buffers, load_values
from lightning_peft.assets import resolve_model
from lightning_peft.errors import UserError
from lightning_peft.models.checking import BaseSource, check_model, check_vocabulary
from lightning_peft.models.liger import check_liger
from lightning_peft.models.sharded_loading import LoadsWhole
from lightning_peft.modules.building import Building
from lightning_peft.modules.checkpoint import (
    checkpoint_of,
    optimizer_states,
    restore_loader,
    restore_structure,
    strategy_state,
    widen_optimizer_states,
)
from lightning_peft.modules.optimization import check_callbacks, check_training, with_schedule
from lightning_peft.modules.probing import prepare_strategy
from lightning_peft.modules.random_state import (
    get_random_state,
    offset_random_state,
    set_random_state,
)
from lightning_peft.modules.window import Batch, Window, stop_at_no_number
from lightning_peft.strategies import AdapterStrategy, LoRA


class AdaptedModule(LightningModule):
    """Builds, trains and checkpoints an adapted model; how it is loaded and scored, others say.

    Args:
        model_name_or_path: A folder or a hub name that ``from_pretrained`` takes, or
            ``tiny_llama``, the embedded model; ``smollm2`` or ``minilm``, pretrained ones that come
            as packages (extras of these names); or a ``.gguf`` file.
        adapter: The strategy; a fresh :class:`LoRA` when None.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler_type: A name that ``transformers.get_scheduler`` knows, stepped at every
            optimizer step.
        warmup_steps: Optimizer steps of warm-up; below 1 a share of all steps.
        dtype: Of the base's weights: ``auto`` (as saved), ``float32``, ``bfloat16``, ``float16``.
            Adapters are float32 over a half-precision base.
        quantization: Of the base (QLoRA): ``nf4`` (4 bits, double quantization), ``int8``, or None.
            Needs the extra ``bitsandbytes``.
        gradient_checkpointing: Recompute activations in the backward pass.
        attn_implementation: As in transformers; None for its choice.
        liger: On a GPU, run the base's RoPE, RMSNorm and SwiGLU by Liger's kernels. Needs the extra
            ``liger``.
        peft_path: An adapter in PEFT's format to validate, test or predict with instead of a
            strategy.
    """

    def __init__(
        self,
        model_name_or_path: str,
        adapter: AdapterStrategy | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler_type: str = "linear",
        warmup_steps: float = 0,
        dtype: str = "auto",
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        liger: bool = False,
        peft_path: str | None = None,
    ) -> None:
        super().__init__()
        self._model = model_name_or_path
        self.adapter = adapter if adapter is not None else LoRA()
        self.make_optimizer = optimizer
        self.lr_scheduler_type = lr_scheduler_type
        self.warmup_steps = warmup_steps
        self.dtype_name = dtype
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.liger = liger
        self.peft_path = peft_path
        # A checkpoint holds the adapters only.
        self.strict_loading = False
        self.model: Any = None
        # Set by who loads a checkpoint's state without a trainer: adapters need not begin.
        self.loads_state = False
        # Whether a fit has passed the point where a strategy looks at data; a second one does not.
        self._prepared = False
        # Called with the process' number before the first batch, once all set-up has drawn.
        self._begin_random: Callable[[int], None] | None = offset_random_state
        self._window = Window()

    @cached_property
    def model_name_or_path(self) -> str:
        """What ``from_pretrained`` takes: a folder, or a hub name.

        Raises:
            UserError: See :func:`~lightning_peft.assets.resolve_model`, which is called when this
                is first asked for: it may convert a file for a minute.
        """
        return resolve_model(self._model)

    # What a kind of model says.

    def load_base(self) -> Any:
        """Load the base model, in training mode."""
        raise NotImplementedError

    def load_shapes(self) -> Any:
        """The base with its values still in their files, in training mode.

        Raises:
            LoadsWhole: If it can only be loaded whole.
        """
        raise LoadsWhole(f"{type(self).__name__} cannot do otherwise")

    def target_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the loss over a batch's targets, and their count."""
        raise NotImplementedError

    # Building.

    def source(self) -> BaseSource:
        """Where the base comes from, for a loader."""
        trainer = self._trainer
        return BaseSource(
            name=self.model_name_or_path,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            device="cpu" if trainer is None else trainer.strategy.root_device,
        )

    def configure_callbacks(self) -> list[Callback]:
        """The strategy is a callback, so that nobody has to call it."""
        return [self.adapter]

    def prepare_data(self) -> None:
        """Refuse a wrong model or optimizer before the data module asks for the tokenizer."""
        check_callbacks(self.trainer)
        engines.check(self.trainer.strategy, self.adapter)
        check_model(self.source())
        if self.liger:
            check_liger(self.trainer.strategy.root_device)
        if self.trainer.state.fn in ("fit", "validate"):  # which may come first in a fit
            check_training(self.make_optimizer, self.lr_scheduler_type, self.trainer)

    def configure_model(self) -> None:
        """Load the base and attach the strategy, once; works without a trainer too."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and self.peft_path is not None:
            raise UserError("model.peft_path is for validate, test and predict, not for fit.")
        building = self._building(first_fit=fitting and not self._prepared)
        building.refuse_probe()
        fresh = self.model is None
        if fresh:
            self.model = building.build(self.load_base, self.load_shapes)
            self._check_vocabulary()
        if building.prepares:
            prepare_strategy(self)
        self._prepared = self._prepared or fitting
        if fresh:
            building.cut(self.model)
        # DDP would replace each process' masks by the first one's.
        names = [f"model.{name}" for name in gate_buffers(self.model)]
        self._ddp_params_and_buffers_to_ignore = names

    def _check_vocabulary(self) -> None:
        """Refuse data whose tokens the model could not read."""
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if (tokens := getattr(data, "tokens_known", None)) is not None:
            check_vocabulary(self.model, tokens)

    def _building(self, first_fit: bool) -> Building:
        """What is known of this run where its model is built."""
        trainer = self._trainer
        ckpt_path = None if trainer is None else trainer.ckpt_path
        return Building(
            adapter=self.adapter,
            engine=None if trainer is None else trainer.strategy,
            peft_path=self.peft_path,
            gradient_checkpointing=self.gradient_checkpointing,
            liger=self.liger,
            ckpt_path=ckpt_path,
            loads_state=self.loads_state,
            # A resumed run takes the structure from its checkpoint.
            prepares=first_fit and ckpt_path is None,
        )

    def configure_optimizers(self) -> Any:
        """The strategy's optimizer, and a schedule that steps with it."""
        optimizer = self.adapter.make_optimizer(self.model, self.make_optimizer)
        steps = self.trainer.estimated_stepping_batches
        return with_schedule(optimizer, self.lr_scheduler_type, self.warmup_steps, steps)

    # Training.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled as :mod:`lightning_peft.modules.window` says."""
        total, count = self.target_loss(batch)
        penalty = self.adapter.penalty(self.model)
        accumulate, processes = self.trainer.accumulate_grad_batches, self.trainer.world_size
        return self._window.add(batch, total, count, penalty, accumulate, processes)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log what the step is about to do, once for a whole window."""
        if self.trainer.fit_loop._should_accumulate():
            return  # DeepSpeed calls at each micro-batch
        loss, tokens_per_second = self._window.close()
        stop_at_no_number(loss, self.trainer)
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = bool(every) and (step + 1) % every == 0
        norm = distributed.gradient_norm(self.parameters()) if logs else math.nan
        ranks = [layer.rank or 0 for layer in adapter_layers(self.model).values()]
        row = {
            "train_loss": loss,
            "grad_norm": float(norm),
            "tokens_per_second": tokens_per_second,
            "lr": optimizer.param_groups[0]["lr"],
            "rank": sum(ranks) / max(len(ranks), 1),
        }
        # As tensors of the host: Lightning would send numbers to the device and read them back.
        shown = {k: torch.tensor(row[k]) for k in ("train_loss", "rank", "tokens_per_second")}
        self.log_dict(shown, prog_bar=True, logger=False)
        if logs:
            # Not by self.log, whose row would come after the checkpoint of this step, so that a run
            # killed in between would lack it.
            for logger in self.trainer.loggers:
                logger.log_metrics({**row, "epoch": self.trainer.current_epoch}, step=step)

    def on_train_start(self) -> None:
        """Let a resumed run's data and its own csv files go on from here."""
        restore_loader(self.trainer.fit_loop)
        self._window.restart()
        for logger in self.trainer.loggers:
            if self.trainer.global_step > 0 and hasattr(logger, "go_on_from"):
                logger.go_on_from(self.trainer.global_step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin this process' random stream, or go on with that of the interrupted run."""
        if self._begin_random is not None:
            self._begin_random(distributed.process_index())
            self._begin_random = None

    # Checkpoints: adapters, structure, random state.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is not the base's, and what a resumed run needs to go on exactly."""
        state = strategy_state(self.adapter, checkpoint)
        checkpoint.update(checkpoint_of(self.model, self.adapter, "model.", state))
        checkpoint["random_state"] = distributed.everywhere(get_random_state())
        masks = {f"model.{name}": mask.cpu() for name, mask in gate_buffers(self.model).items()}
        checkpoint["masks"] = distributed.everywhere(masks)
        if checkpoint.get("optimizer_states"):
            checkpoint.update(optimizer_states(self.model, self.trainer.optimizers))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is ours, and give the model its structure and ranks."""
        restore_structure(self.model, self.adapter, checkpoint, prefix="model.")
        self.adapter.load_state_dict(checkpoint["adapter"]["state"])
        widen_optimizer_states(self.model, checkpoint)
        masks = checkpoint.get("masks", [])
        if len(masks) == distributed.world_size():
            checkpoint["state_dict"].update(masks[distributed.process_index()])
        self._begin_random = partial(set_random_state, checkpoint["random_state"])

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Write a checkpoint's tensors where the engine keeps them."""
        load_values(self.model, {k.removeprefix("model."): v for k, v in state_dict.items()})
        return torch.nn.modules.module._IncompatibleKeys([], [])
