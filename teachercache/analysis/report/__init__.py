"""The report of `tc analyze`: what a person sees."""
