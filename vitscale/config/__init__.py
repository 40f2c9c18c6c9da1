"""Typed configuration: schema, YAML loading, durations and the generated reference."""
