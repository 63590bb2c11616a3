"""The commands of `tc`, one module each: read options, call one function, print."""
