"""Configuration: dataclasses, TOML, fingerprints."""
