"""What a user runs; `mixzoo.scripts.cli` fronts the rest as the command ``mixzoo``."""
