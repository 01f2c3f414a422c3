"""Tests of data_pipeline.store."""
