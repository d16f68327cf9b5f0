"""Tests of mixedprec_plugin.quantize."""
