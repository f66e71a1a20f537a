"""``lightning-peft export``: the adapter of a checkpoint in PEFT's format, or the merged model.

A method that trains the model's own weights has no adapter; its model is written either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_peft.atomic import write_folder
from lightning_peft.commands.parsing import command_parser
from lightning_peft.errors import MissingFile, UserError


def main(words: list[str]) -> None:
    """Export a checkpoint.

    Args:
        words: The command's options.

    Raises:
        UserError: If the checkpoint does not belong to its run's configuration or holds NaN or
            infinite values, or the folder is full.
    """
    parser = command_parser(__name__, __doc__)
    parser.add_argument(
        "--ckpt_path", required=True, help="a checkpoint, or a run's folder (its newest)"
    )
    parser.add_argument("--output", required=True, help="folder to write; must be empty or absent")
    parser.add_argument(
        "--config", help="the run's configuration; config.yaml of its folder by default"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write the base with the adapter merged in"
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="allow merging into a quantized base"
    )
    options = parser.parse_args(words)

    from lightning_peft.runs import check_checkpoint, find_last, folder_of, read_checkpoint

    path, output = Path(options.ckpt_path), Path(options.output)
    if output.is_file():
        raise UserError(f"--output: {output} is a file; give a new folder.")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; give a new folder.")
    path = find_last(path) if path.is_dir() else path
    checkpoint = check_checkpoint(read_checkpoint(path), path)
    config = Path(options.config) if options.config else folder_of(path) / "config.yaml"
    module, merges, dequantize = _restored(config, checkpoint), options.merge, options.dequantize
    write_folder(output, lambda part: print(_write(module, part, merges, dequantize), end=": "))
    print(output)


def _restored(config: Path, checkpoint: dict[str, Any]) -> Any:
    """The run's module as it was when it wrote a checkpoint."""
    module: Any = _module(config)
    module.loads_state = True
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module.eval()


def _write(module: Any, output: Path, merges: bool, dequantize: bool) -> str:
    """Write what is asked for, and say what it is."""
    from lightning_peft.adapters import adapter_layers, adapter_state_dict, merge, save_peft
    from lightning_peft.adapters.finite import refuse_broken
    from lightning_peft.adapters.groups import refusal
    from lightning_peft.models.quantization import forget_quantization

    layers = adapter_layers(module.model).values()
    adapted, config = bool(layers), getattr(module.model, "config", None)
    if adapted and not merges:
        save_peft(module.model, output)
        return "adapter"
    refused = refusal(config) if any(layer.resized for layer in layers) else None
    if refused is not None:
        raise UserError(
            f"{type(config).__name__} refuses the base as it is in this checkpoint ({refused}); "
            "export one from after the last removal."
        )
    if adapted:
        refuse_broken(adapter_state_dict(module.model), "the merged model")
        merge(module.model, dequantize)
        forget_quantization(module.model)
    # Also what only the sum makes infinite, in half precision.
    refuse_broken(dict(module.model.named_parameters()), "the model")
    module.model.save_pretrained(output)
    _tokenizer(module.model_name_or_path, output)
    reason = "" if adapted else f" ({type(module.adapter).__name__} has no adapter)"
    return f"{'merged model' if adapted else 'model'}{reason}"


def _module(config: Path) -> Any:
    """The run's module, from the ``model`` part of its configuration."""
    if not config.is_file():
        raise MissingFile(f"--config: {config} does not exist; give the run's configuration.")
    import lightning_peft.modules
    import lightning_peft.strategies  # noqa: F401 - so that short class names resolve
    from lightning_peft.settings.parser import make_module
    from lightning_peft.settings.tree import read_file

    content = read_file(str(config), Path())
    if not content.get("model"):
        raise UserError(f"--config: {config} has no model; give the run's configuration.")
    return make_module(content["model"])


def _tokenizer(name: str, output: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(output)
