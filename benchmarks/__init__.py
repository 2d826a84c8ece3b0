"""Measurements of the machine a run lives on; nothing here is part of the installed package."""
