"""What the processes of a comparison share: everything that a run imports, imported once."""

import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto  # noqa: F401

import lightning_peft.comparison.worker
import lightning_peft.modules.causal_lm
import lightning_peft.modules.classification
import lightning_peft.reports.pictures
import lightning_peft.settings.cli  # noqa: F401
