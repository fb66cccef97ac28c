"""Emissary: one agent for lab test machines."""

__version__ = "0.1.0"
