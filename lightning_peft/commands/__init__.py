"""The commands of ``lightning-peft``, one file each."""
