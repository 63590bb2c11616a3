"""Commands of a checkout: the demo, benchmarks, data sets, small teachers and the tables of the papers."""
