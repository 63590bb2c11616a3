"""Metrics: functions of arrays or texts that return numbers."""
