"""Calibration methods, one file for each published one."""
