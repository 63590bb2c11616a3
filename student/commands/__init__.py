"""The commands of `student`, one module each: read options, call one function, print."""
