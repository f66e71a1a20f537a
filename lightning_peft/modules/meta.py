"""An adapted model on the meta device: every shape, no values, from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_peft.errors import UserError
from lightning_peft.models.checking import check_dtype
from lightning_peft.modules.adapted import AdaptedModule
from lightning_peft.modules.classification import SequenceClassificationModule, train_in_full


def meta_base(module: AdaptedModule, labels: int = 2) -> Any:
    """The module's base model in shape only; of a hub's model only ``config.json`` is read.

    Args:
        module: As instantiated from a configuration; its adapter's ``modules_to_save`` gets the
            head of a classifier, as loading would.
        labels: Outputs of a classification head.

    Returns:
        The model on the meta device, in training mode, in the dtype in which it would be loaded.

    Raises:
        UserError: If there is no such configuration, or the module's dtype is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifies = isinstance(module, SequenceClassificationModule)
    config = read_config(module.model_name_or_path)
    dtype = _dtype(config, module.dtype_name)
    if classifies:
        config.num_labels = labels
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    extra = {}
    if module.attn_implementation is not None:
        extra["attn_implementation"] = module.attn_implementation
    with torch.device("meta"):
        model = kind.from_config(config, **extra)
    model = model.to(dtype)
    if classifies:
        head = [n for n, _ in model.named_children() if n != model.base_model_prefix]
        train_in_full(module.adapter, head)
        for name in head:  # heads train in single precision, whatever the base's dtype
            model.get_submodule(name).float()
    return model.train()


def read_config(name: str) -> Any:
    """The configuration of a model in a folder, in the local cache, or on the hub.

    Args:
        name: A folder or a hub name.

    Raises:
        UserError: If it cannot be had.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            reason = "holds no config.json that transformers can read"
        else:
            reason = (
                "is no folder, and its config.json is neither in the local cache nor within reach; "
                "that file alone would do"
            )
        raise UserError(f"model.model_name_or_path: {name} {reason}.") from error


def _dtype(config: Any, name: str) -> torch.dtype:
    check_dtype(name)
    if name != "auto":
        return getattr(torch, name)
    saved = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32
