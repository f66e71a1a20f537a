"""``python -m lightning_peft`` is ``lightning-peft``."""

from lightning_peft.cli import main

if __name__ == "__main__":
    main()
