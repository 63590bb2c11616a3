"""Commands of a checkout: demo, benchmarks, data sets, small teachers and tables of the papers."""
