"""ami-builder.toml, the environment and flags: their types, their rules and how they are loaded."""
