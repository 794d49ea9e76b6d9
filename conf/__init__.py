"""Option groups: one folder per configuration dataclass, one YAML file per option."""
