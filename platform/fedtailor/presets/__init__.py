"""One YAML file per published experiment, plus the demo."""
