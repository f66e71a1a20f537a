"""What every run would say, and what says nothing about this one, is not said."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Drop such lines of Lightning's and transformers', for this process."""
    import huggingface_hub.utils
    import transformers

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_wanted)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning, r"lightning\.pytorch\.")
    # A run that is resumed goes on in its own folder.
    warnings.filterwarnings(
        "ignore", "Checkpoint directory .* exists and is not empty", UserWarning
    )
    # Validation is a choice, and without it there is no loader.
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero", UserWarning)
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # a download takes long enough to be shown


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡 Tip:", "Seed set to"))
