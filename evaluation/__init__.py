"""Measures anything that encodes pictures and texts. It never imports `student`."""
