"""Tests of the plugins of serving engines."""
