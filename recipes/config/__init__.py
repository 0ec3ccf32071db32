"""The recipe: its sections and keys, ``run_config.yaml``, overrides and checks."""
