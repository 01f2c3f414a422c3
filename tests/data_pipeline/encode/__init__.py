"""Tests of data_pipeline.encode."""
