"""The LightningModule around a model and one adapter strategy, whatever the model predicts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_peft import distributed, engines
from lightning_peft.adapters import adapter_layers, load_peft, trainable_parameters
from lightning_peft.adapters.attach import make_report
from lightning_peft.adapters.layer import adapters_on
from lightning_peft.adapters.state import gate_buffers, load_values
from lightning_peft.assets import resolve_model
from lightning_peft.errors import UserError
from lightning_peft.models.liger import apply_liger, check_liger
from lightning_peft.models.loading import check_model, check_training
from lightning_peft.models.sharded_loading import LoadsWhole, fill, stored_parameters
from lightning_peft.modules.checkpoint import (
    checkpoint_of,
    optimizer_states,
    restore_structure,
    strategy_state,
    widen_optimizer_states,
)
from lightning_peft.modules.random_state import (
    get_random_state,
    offset_random_state,
    set_random_state,
)
from lightning_peft.runs import read_checkpoint, step_of
from lightning_peft.strategies import AdapterStrategy, LoRA

Batch = dict[str, Any]


class AdaptedModule(LightningModule):
    """Builds, trains and checkpoints an adapted model; how it is loaded and scored, others say.

    Args:
        model_name_or_path: A folder or a hub name that ``from_pretrained`` takes, or
            ``tiny_llama``, the embedded model.
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
        self.model_name_or_path = resolve_model(model_name_or_path)
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
        self._random_state: Any = None
        self._drawing = False
        self._adapted = self._prepared = False
        self.loads_state = False
        self._window: dict[str, Any] = {"loss": 0.0, "tokens": 0, "since": time.perf_counter()}

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

    def how_to_load(self) -> dict[str, Any]:
        """The base's name and the arguments that say how its weights come, for a loader."""
        trainer = self._trainer
        return {
            "name": self.model_name_or_path,
            "dtype": self.dtype_name,
            "attn_implementation": self.attn_implementation,
            "quantization": self.quantization,
            "device": "cpu" if trainer is None else trainer.strategy.root_device,
        }

    def configure_callbacks(self) -> list[Callback]:
        """The strategy is a callback, so that nobody has to call it."""
        return [self.adapter]

    def prepare_data(self) -> None:
        """Refuse a wrong model or optimizer before the data module asks for the tokenizer."""
        engines.check(self.trainer.strategy, self.adapter)
        check_model(self.model_name_or_path, self.dtype_name, self.quantization)
        if self.liger:
            check_liger(self.trainer.strategy.root_device)
        if self.trainer.state.fn in ("fit", "validate"):  # which may come first in a fit
            check_training(self.make_optimizer, self.lr_scheduler_type, self.trainer)

    def configure_model(self) -> None:
        """Load the base and attach the strategy, once; works without a trainer too."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and self.peft_path is not None:
            raise UserError("model.peft_path is for validate, test and predict, not for fit.")
        fresh = self.model is None
        # A resumed run takes the structure from its checkpoint.
        prepares = fitting and not self._prepared and self.trainer.ckpt_path is None
        if prepares:
            self._refuse_probe()
        if fresh:
            self._build()
        if prepares:
            self._prepare_strategy()
        self._prepared = self._prepared or fitting
        if fresh and self._trainer is not None:
            engine = engines.traits(self.trainer.strategy)
            if engine.restores_late and self.trainer.ckpt_path is not None:
                # Layers cannot be shared any more once the engine has wrapped them.
                saved = read_checkpoint(self.trainer.ckpt_path)
                self.adapter.restructure(self.model, saved["adapter"]["state"])
            stored = stored_parameters(self.model)
            engine.cut(self.model)
            fill(self.model, stored, self.trainer.strategy.root_device, engine.cut_parameter)
        # DDP would replace each process' masks by the first one's.
        names = [f"model.{name}" for name in gate_buffers(self.model)]
        self._ddp_params_and_buffers_to_ignore = names

    @property
    def _resumes(self) -> bool:
        """Whether a checkpoint's state is loaded next, so that nothing need be initialised."""
        return self.loads_state or (
            self._trainer is not None and self.trainer.ckpt_path is not None
        )

    def _base(self) -> Any:
        """The base, without values where the engine lets each process read its share of them."""
        if self._trainer is None or not engines.traits(self.trainer.strategy).fills_shares:
            return self.load_base()
        try:
            self._refuse_shares()
            return self.load_shapes()
        except LoadsWhole as reason:
            rank_zero_info(f"each process loads the base whole before it is cut, since {reason}.")
            return self.load_base()

    def _refuse_shares(self) -> None:
        """Raise if somebody needs the base's values before it is cut."""
        name = type(self.adapter).__name__
        if self.peft_path is not None:
            raise LoadsWhole("model.peft_path puts an adapter on it")
        if engines.WEIGHTS_AT_ATTACH in self.adapter.needs:
            raise LoadsWhole(f"{name} reads its weights when attached")
        if self.trainer.state.fn == "fit" and not self._resumes and self.adapter.looks_at_data:
            raise LoadsWhole(f"{name} looks at data before training")

    def _attach(self, model: Any) -> None:
        if not stored_parameters(model):
            rank_zero_info(str(self.adapter.attach(model, initialize=not self._resumes)))
            return
        try:
            with adapters_on(self.trainer.strategy.root_device):
                report = self.adapter.attach(model, initialize=not self._resumes)
            reads = any(p.is_meta and not hasattr(p, "stored") for p in model.parameters())
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            reads = True
        if reads:
            raise UserError(
                f"{type(self.adapter).__name__} reads the base's weights when it is attached, and "
                f"{engines.traits(self.trainer.strategy).name} loads them later: add "
                f"{engines.WEIGHTS_AT_ATTACH!r} to its `needs`, to have them loaded before."
            )
        rank_zero_info(str(report))

    def _build(self) -> None:
        model = self._base()
        if self.liger and self._trainer is not None:  # elsewhere a model may be on a CPU
            apply_liger(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if self.peft_path is not None:
            load_peft(model, self.peft_path)
            self._adapted = True
        else:
            self._attach(model)
        self.model = model

    def _refuse_probe(self) -> None:
        """Refuse a strategy that looks at data, before the base is loaded in shares for good."""
        if engines.traits(self.trainer.strategy).cuts_when_building and self.adapter.looks_at_data:
            raise UserError(
                f"{type(self.adapter).__name__} looks at data before training, when "
                f"{engines.traits(self.trainer.strategy).name} has cut the weights: give "
                "model.adapter.layout the layout.json of an earlier probe, such as that of a run "
                "on one device, with DDP or ZeRO-2 and --trainer.max_steps 1."
            )

    def _prepare_strategy(self) -> None:
        """Let the strategy look at data, on the device where the run will be."""
        if not stored_parameters(self.model):
            self.to(self.trainer.strategy.root_device)
        before = trainable_parameters(self.model, include_saved=True)
        data = getattr(self.trainer, "datamodule", None)

        def sample(ratio: float) -> Iterable[Batch]:
            if data is None or not hasattr(data, "probe_dataloader"):
                raise UserError(
                    f"{type(self.adapter).__name__} looks at a sample of the training data, for "
                    "which the data module needs probe_dataloader(ratio)."
                )
            return _Shares(data.probe_dataloader(ratio))

        def loss(batch: Batch | None) -> Tensor:
            if batch is None:  # no batch is left for this process: it only takes part
                trained = [p for p in self.model.parameters() if p.requires_grad]
                total, count = sum(p.sum() * 0.0 for p in trained), torch.zeros(())
            else:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                total, count = self.target_loss(batch)
            if torch.is_grad_enabled():  # so that averaged gradients are the mean over all targets
                count = distributed.mean(count.double()).to(self.device)
            return total / count.clamp_min(1e-6)  # type: ignore[operator]

        self.adapter.prepare(
            self.model, sample, loss, self.make_optimizer, self.trainer.accumulate_grad_batches
        )
        if trainable_parameters(self.model, include_saved=True) != before:
            rank_zero_info(str(make_report(self.model, type(self.adapter).__name__, {})))

    def configure_optimizers(self) -> Any:
        """The strategy's optimizer, and a schedule that steps with it."""
        from transformers import get_scheduler

        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.adapter.optimizer(params, self.make_optimizer)
        steps = self.trainer.estimated_stepping_batches
        total = None if math.isinf(steps) else int(steps)
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * (total or 0)
        try:
            schedule = get_scheduler(self.lr_scheduler_type, optimizer, int(warmup), total)
        except ValueError as error:
            raise UserError(
                f"model.lr_scheduler_type {self.lr_scheduler_type!r}: {error}"
            ) from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Training.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; the window's gradient is that of the mean over its targets.

        Lightning divides by the number of micro-batches and DDP by that of processes, though they
        may hold different numbers of targets: each is weighted by its share of the window's targets
        instead, which ``num_target_tokens`` counts over all processes.
        """
        total, count = self.target_loss(batch)
        accumulate, processes = self.trainer.accumulate_grad_batches, self.trainer.world_size
        # A data module that does not count windows takes all micro-batches for equal ones.
        window = batch.get("num_target_tokens", count * accumulate * processes)
        window = torch.as_tensor(window, device=total.device).clamp_min(1)
        self._window["loss"] += total.detach() / window
        self._window["tokens"] += batch["attention_mask"].sum()
        # The shares count / window sum to one over the window, and so the penalty counts once.
        share = (total + self.adapter.penalty(self.model) * count) / window
        return share * accumulate * processes

    def _stop_at_no_number(self) -> None:
        """Stop at a loss that is not a number, before it reaches the weights."""
        if not math.isfinite(float(self._window["loss"])):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise UserError(
                f"the loss is {float(self._window['loss'])} at step {self.trainer.global_step} "
                f"with learning rate {rate:g}: try a lower one, more warmup_steps or "
                f"trainer.gradient_clip_val; {self._last_checkpoint()}."
            )

    def _last_checkpoint(self) -> str:
        """Which checkpoint is from before the present step's weights."""
        callbacks = self.trainer.checkpoint_callbacks
        saved = [Path(path) for c in callbacks for path in getattr(c, "best_k_models", {})]
        good = [path for path in saved if 0 <= step_of(path) < self.trainer.global_step]
        return (
            f"the last good checkpoint is {max(good, key=step_of)}"
            if good
            else "no good checkpoint was written yet"
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log what the step is about to do, once for a whole window."""
        if self.trainer.fit_loop._should_accumulate():
            return  # DeepSpeed calls at each micro-batch
        self._share_window()
        self._stop_at_no_number()
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = bool(every) and (step + 1) % every == 0
        now, window = time.perf_counter(), self._window
        norm = distributed.gradient_norm(self.parameters()) if logs else math.nan
        ranks = [layer.rank for layer in adapter_layers(self.model).values()]
        row = {
            "train_loss": float(window["loss"]),
            "grad_norm": float(norm),
            "tokens_per_second": float(window["tokens"]) / max(now - window["since"], 1e-9),
            "lr": optimizer.param_groups[0]["lr"],
            "rank": sum(ranks) / max(len(ranks), 1),
        }
        shown = {key: row[key] for key in ("train_loss", "rank", "tokens_per_second")}
        self.log_dict(shown, prog_bar=True, logger=False)
        if logs:
            # Not by self.log, whose row would come after the checkpoint of this step, so that a run
            # killed in between would lack it.
            for logger in self.trainer.loggers:
                logger.log_metrics({**row, "epoch": self.trainer.current_epoch}, step=step)
        self._window = {"loss": 0.0, "tokens": 0, "since": now}

    def _share_window(self) -> None:
        """Add up over processes the window's shares of the loss, and its tokens."""
        shares = [torch.as_tensor(self._window[key]).double() for key in ("loss", "tokens")]
        self._window["loss"], self._window["tokens"] = distributed.total(shares)

    def on_fit_end(self) -> None:
        """A fitted model is adapted, whatever is tested next."""
        self._adapted = True

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
        self._random_state = checkpoint["random_state"]
        self._adapted = True

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Write a checkpoint's tensors where the engine keeps them."""
        load_values(self.model, {k.removeprefix("model."): v for k, v in state_dict.items()})
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_train_start(self) -> None:
        """Let a resumed run's data and its own csv files go on from here."""
        _restore_loader(self.trainer.fit_loop)
        self._window = {"loss": 0.0, "tokens": 0, "since": time.perf_counter()}
        for logger in self.trainer.loggers:
            if self.trainer.global_step > 0 and hasattr(logger, "go_on_from"):
                logger.go_on_from(self.trainer.global_step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Go on with the interrupted run's random stream, once all set-up has drawn from it."""
        if self._random_state is not None:
            set_random_state(self._random_state, distributed.process_index())
            self._random_state = None
        elif not self._drawing:
            offset_random_state(distributed.process_index())
        self._drawing = True


def _restore_loader(fit_loop: Any) -> None:
    """Give a resumed run's loader its position, where Lightning has passed it over.

    A schedule over epochs asks for the number of steps before the checkpoint's loops are read; for
    that Lightning makes the loader, and never looks at the saved position again.
    """
    if fit_loop.restarting and fit_loop._combined_loader_states_to_load:
        fit_loop._load_combined_loader_states()
        iter(fit_loop._data_fetcher)


class _Shares:
    """This process' share of a loader's batches, again and again."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return distributed.shared_out(self.loader)
