"""The configuration, from command line and files."""
